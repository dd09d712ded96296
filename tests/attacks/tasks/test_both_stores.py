"""The same requests at the real port of servers over both stores; and, over two replicas, no use after an end."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import httpx2
import pytest

from broker.server.authority import plan
from tests.attacks.tasks.binding_rig import (
    TOKEN_URL,
    Desk,
    Process,
    desk,
    desk_settings,
    eventually,
    short_directory,
)
from tests.attacks.tasks.listening import Ear, listening
from tests.attacks.tasks.test_outward import TABLE
from tests.fakes.oidc import OidcIssuer
from tests.integration.identity_rig import Estate, own_bundle, running
from tests.integration.test_token_endpoint import TRIAGE
from tests.unit.server.api.http.test_token import FAULTS

ROUNDS = int(os.environ.get("BROKER_RACE_ROUNDS", "8"))
"""Ends that are raced against questions; the plan asks for 1,000, which BROKER_RACE_ROUNDS=1000 does in some minutes."""
BOUND = 5.0
"""Seconds within which a verifier must have heard of an end."""


@pytest.fixture(params=["sqlite", "postgres"])
async def at(request: pytest.FixtureRequest, oidc: OidcIssuer) -> AsyncIterator[Desk]:
    url = request.getfixturevalue("postgresql") if request.param == "postgres" else ""
    with short_directory() as directory:
        async with desk(directory, oidc, store=url) as opened:
            yield opened


def body_of(at: Desk, changes: dict[str, Any]) -> str:
    """Write a form in which a parameter is left out (None), or sent several times (a list)."""
    pairs: list[tuple[str, str]] = []
    for name, value in {**at.form(), "purpose": None, **changes}.items():
        pairs += [(name, one) for one in (value if isinstance(value, list) else [value]) if one is not None]
    return str(httpx2.QueryParams(pairs))


@pytest.mark.bears(
    "TX01", "TX02", "TX08", "TX09", "TX10", "TX11", "TX12", "TX13", "TX14", "TX23", "TX24", "X01",
)  # fmt: skip
async def test_every_fault_of_a_request_has_its_answer_and_its_record(at: Desk) -> None:
    agent = await at.process("ws_1")
    headers = {"content-type": "application/x-www-form-urlencoded"}
    took = []
    faults = [*FAULTS, *TABLE]
    for number, (name, changes, error) in enumerate(faults):
        began = time.perf_counter()
        answer = await agent.http.post("/token", content=body_of(at, changes), headers=headers)
        took.append(time.perf_counter() - began)
        body = answer.json()
        assert (answer.status_code, body["error"]) == (400, error), (name, answer.text)
        assert answer.headers["content-type"] == "application/json", name
        assert answer.headers["cache-control"] == "no-store", name
        assert not any(word in answer.text for word in ("eyJ", "Traceback", "SELECT", "psycopg", "sqlite")), name
        refused = at.records("token_refused")
        assert (len(refused), refused[-1].actor) == (number + 1, str(TRIAGE)), name
    for path, content, kind in (
        (TOKEN_URL.rpartition("/")[2] + "?subject_token=x", body_of(at, {}), headers["content-type"]),
        ("token", body_of(at, {}), "application/json"),
        ("token", "", headers["content-type"]),
    ):
        answer = await agent.http.post(f"/{path}", content=content, headers={"content-type": kind})
        assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")
    assert at.records("task_started", "token_issued") == []
    took.sort()
    print(f"refusals: {len(took)}, p50 {took[len(took) // 2] * 1e3:.1f} ms, most {took[-1] * 1e3:.1f} ms")
    # The plan's 50 ms are for a machine of one's own.
    assert took[-1] < 5


# ---- use after an end


class Replicas:
    """Two servers over one store, a process that has a way to each, and a verifier that follows each."""

    def __init__(self, processes: list[Process], ears: list[Ear]) -> None:
        self.processes, self.ears = processes, ears

    async def is_active(self, replica: int, token: str) -> bool:
        answer = await self.processes[replica].http.post("/introspect", data={"token": token})
        return bool(answer.json()["active"])


@asynccontextmanager
async def replicas(oidc: OidcIssuer, url: str) -> AsyncIterator[tuple[Desk, Replicas]]:
    with short_directory() as directory, short_directory() as second:
        async with (
            desk(directory, oidc, store=url) as at,
            running(Estate(second, url), **desk_settings(oidc)) as two,
        ):
            at.node.trusted = await own_bundle(two)
            async with at.node.dial(two.port) as channel, listening(at.channel) as first, listening(channel) as other:
                here = await at.process("ws_1")
                there = Desk(two, oidc, second, at.stack, at.node, at.agent_id, channel, at.entry)
                made = Replicas([here, await there.process("ws_2")], [first, other])
                token = (await here.http.post("/token", data=at.form())).json()["access_token"]

                async def both_know() -> bool:
                    return all([await made.is_active(one, token) for one in (0, 1)])

                await eventually(both_know)
                yield at, made


@pytest.mark.bears("V01", "RV02", "RV11")
async def test_no_replica_and_no_verifier_takes_a_token_after_its_end_was_answered(
    oidc: OidcIssuer, postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three questioners at each replica, and a verifier on the feed of each, while the task ends."""
    # How long a second replica waits before it signs: nobody here looks at bundles seldom.
    monkeypatch.setattr(plan, "AHEAD", timedelta(seconds=1))
    wrong: list[tuple[int, int]] = []
    asked, delays = 0, []
    async with replicas(oidc, postgresql) as (at, two):
        for number in range(ROUNDS):
            issued = (await two.processes[0].http.post("/token", data=at.form())).json()
            token, ended = issued["access_token"], asyncio.Event()

            async def question(replica: int, token: str = token, ended: asyncio.Event = ended, n: int = number) -> None:
                nonlocal asked
                after = 0
                while after < 2:
                    began_after = ended.is_set()
                    if await two.is_active(replica, token) and began_after:
                        wrong.append((n, replica))
                    asked += 1
                    after += began_after

            async def verify(ear: Ear, token: str = token, ended: asyncio.Event = ended) -> float:
                await ear.refuses(token)
                heard = time.perf_counter()
                await ended.wait()
                return heard

            questions = [asyncio.ensure_future(question(one)) for one in (0, 1) for _ in range(3)]
            verifiers = [asyncio.ensure_future(verify(ear)) for ear in two.ears]
            assert [ear.says(token) for ear in two.ears] == ["alive", "alive"]
            answer = await _ends(two, number)(issued)
            answered = time.perf_counter()
            ended.set()
            assert answer.status_code == 200, answer.text
            await asyncio.gather(*questions)
            delays += [heard - answered for heard in await asyncio.gather(*verifiers)]
        assert wrong == []
        assert asked >= ROUNDS * 12
        assert len(at.records("task_ended")) == ROUNDS
    delays.sort()
    print(f"rounds {ROUNDS}, questions {asked}, verifiers behind the answer at most {delays[-1] * 1e3:.1f} ms")
    assert delays[-1] < BOUND


def _ends(two: Replicas, number: int) -> Callable[[dict[str, Any]], Awaitable[httpx2.Response]]:
    """Give one of the ways in which the holder ends its task."""
    mine = two.processes[0].http

    async def complete(issued: dict[str, Any]) -> httpx2.Response:
        return await mine.post(f"/tasks/{issued['task']}/complete")

    async def revoke(issued: dict[str, Any]) -> httpx2.Response:
        return await mine.post("/revoke", data={"token": issued["access_token"], "end": "task"})

    return (complete, revoke)[number % 2]
