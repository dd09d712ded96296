"""Streams of security events whose transmitter misbehaves: it is asked again after a pause, never in a circle."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from broker.server.tasks.config import Transmitter
from broker.server.tasks.signal_poll import MAX_EVENTS, Poller
from broker.server.tasks.signals import VERIFICATION
from tests.attacks.tasks.userends_rig import CAEP, Scene, playing
from tests.fakes.oidc import OidcIssuer

ROUNDS = 4
"""Pauses after which a stream is looked at."""


def transmitter(oidc: OidcIssuer, jwks: str = "/jwks") -> Transmitter:
    return Transmitter(
        oidc.issuer,
        frozenset({"broker"}),
        subject_issuer=oidc.issuer,
        ca_path=oidc.ca_path,
        jwks_url=oidc.issuer + jwks,
        poll_url=f"{oidc.issuer}/poll",
        token="secret",
    )


@pytest.fixture
async def scene(tmp_path: Path, oidc: OidcIssuer) -> AsyncIterator[Scene]:
    oidc.events, oidc.polled, oidc.poll_token = {}, [], "Bearer secret"
    async with playing(tmp_path, oidc, transmitters=(transmitter(oidc, "/nowhere"),)) as keyless:
        yield keyless
    oidc.events, oidc.fault = {}, ""


async def run(poller: Poller) -> None:
    """Let it run for some rounds."""
    async with asyncio.timeout(30):
        with pytest.raises(asyncio.CancelledError):
            await poller.run()
    await poller.aclose()


def poller_of(scene: Scene) -> Poller:
    pauses = 0

    async def sleep(_: float) -> None:
        nonlocal pauses
        pauses += 1
        if pauses == ROUNDS:
            raise asyncio.CancelledError

    ends = scene.estate.ends
    return Poller(transmitter(scene.oidc), ends.events, ends.signals, sleep=sleep)


async def test_one_that_always_has_more_is_asked_once_in_a_round(scene: Scene) -> None:
    scene.oidc.fault = "more"
    await run(poller_of(scene))
    assert len(scene.oidc.polled) == ROUNDS


async def test_one_that_hears_no_acknowledgement_is_told_once_more_in_each_round(
    tmp_path: Path, oidc: OidcIssuer
) -> None:
    oidc.events, oidc.polled, oidc.poll_token, oidc.fault = {}, [], "Bearer secret", "deaf"
    async with playing(tmp_path, oidc, transmitters=(transmitter(oidc),)) as scene:
        oidc.events = {
            "one": scene.event(CAEP + "session-revoked", jti="one"),
            "two": scene.event(CAEP + "session-revoked", jti="two", aud="another"),
        }
        await run(poller_of(scene))
        told = [(asked["ack"], sorted(asked.get("setErrs", {}))) for asked in oidc.polled]
        assert told == [([], []), *[(["one"], ["two"])] * ROUNDS]
        assert oidc.poll_language == "en", "RFC 8936 has the language of an error's description named"
        assert len(await scene.records("signal_received")) == 1
    oidc.events, oidc.fault = {}, ""


async def test_events_that_cannot_be_judged_now_are_not_asked_for_in_a_circle(scene: Scene) -> None:
    scene.oidc.fault = "more"
    scene.oidc.events = {"one": scene.event(CAEP + "session-revoked", jti="one")}
    await run(poller_of(scene))
    assert len(scene.oidc.polled) == ROUNDS
    assert all(asked["ack"] == [] and "setErrs" not in asked for asked in scene.oidc.polled)
    assert set(scene.oidc.events) == {"one"}


async def test_of_more_than_were_asked_for_none_is_lost(tmp_path: Path, oidc: OidcIssuer) -> None:
    oidc.events, oidc.polled, oidc.poll_token, oidc.fault = {}, [], "Bearer secret", "eager"
    async with playing(tmp_path, oidc, transmitters=(transmitter(oidc),)) as scene:
        work = await scene.work()
        oidc.events = {f"e{n}": scene.event(VERIFICATION, jti=f"e{n}") for n in range(MAX_EVENTS)}
        oidc.events["last"] = scene.event(CAEP + "session-revoked", jti="last")
        await run(poller_of(scene))
        assert oidc.events == {}
        assert await work.is_dead()
        assert len(await scene.records("signal_received")) == MAX_EVENTS + 1
    oidc.fault = ""
