"""The contract suite: it passes what keeps the contract, and names each breach."""

import asyncio
import os
import time
from typing import ClassVar

import pytest
from pydantic import BaseModel, ConfigDict

from attestors.workload.unix import UnixAttestor, UnixSettings
from broker.attestation.contract import AttestorFailed, SelectorDoc, Strength
from broker.attestation.process import Process
from broker.attestation.testing import (
    ContractBroken,
    WorkloadAttestorContract,
    check_cancelled,
    check_declaration,
    check_ended_process,
    check_refuses,
    check_workload_attestor,
    ended_process,
    started_process,
)
from broker.errors import NotAttested
from broker.spiffe import Selector


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Loose(BaseModel):
    pass


class Attestor:
    """Keeps the contract, unless told otherwise."""

    name: ClassVar[str] = "own"
    settings: ClassVar[type[BaseModel]] = Settings
    selectors: ClassVar[tuple[SelectorDoc, ...]] = (SelectorDoc("own:pid:<number>", "its number", Strength.KERNEL),)

    def __init__(self, act=None) -> None:
        self._act = act

    async def attest(self, process: Process) -> frozenset[Selector]:
        if self._act is None:
            return frozenset({Selector(f"own:pid:{process.pid}")})
        answer = self._act(process)
        return await answer if asyncio.iscoroutine(answer) else answer


class TestOwn(WorkloadAttestorContract):
    def make_attestor(self):
        return Attestor()


class TestUnix(WorkloadAttestorContract):
    def make_attestor(self):
        return UnixAttestor(UnixSettings(discover_workload_path=True))


async def broken(act, within: float = 5.0) -> str:
    with started_process() as process, pytest.raises(ContractBroken) as breach:
        await check_workload_attestor(Attestor(act), process, within=within)
    return str(breach.value)


async def test_gives_the_answer() -> None:
    with started_process() as process:
        assert await check_workload_attestor(Attestor(), process) == {Selector(f"own:pid:{process.pid}")}


@pytest.mark.parametrize(
    ("act", "rule"),
    [
        (lambda _: {Selector("own:pid:1")}, "frozenset"),
        (lambda _: frozenset({"own:pid:1"}), "only Selector"),
        (lambda _: frozenset({Selector("unix:uid:0")}), "no documented form"),
        (lambda _: frozenset({Selector("own:exe:x")}), "no documented form"),
        (lambda _: 1 / 0, "not ZeroDivisionError"),
        (lambda process: os.read(process.pidfd + 1000, 1), "not OSError"),
    ],
)
async def test_breaches(act, rule: str) -> None:
    assert rule in await broken(act)


async def test_another_refusal_is_a_breach() -> None:
    def refuse(_):
        raise NotAttested("no", code="because")

    assert "not NotAttested (because)" in await broken(refuse)


async def test_a_selectors_value_stays_out_of_the_message() -> None:
    said = await broken(lambda _: frozenset({Selector("own:token:swordfish")}))
    assert "own:'token'" in said and "swordfish" not in said


async def test_too_late() -> None:
    assert "no answer within" in await broken(lambda _: asyncio.sleep(30), within=0.2)


async def test_blocking_the_loop() -> None:
    def block(process):
        time.sleep(1.2)  # the breach itself
        return frozenset()

    assert "blocks the event loop" in await broken(block)


@pytest.mark.bears("A21")
async def test_leaked_descriptors(monkeypatch) -> None:
    monkeypatch.setattr("broker.attestation.testing.SETTLE", 0.1)
    leaked = []

    def leak(_):
        leaked.append(os.open("/dev/null", os.O_RDONLY))
        return frozenset()

    try:
        assert "leaves descriptors open: 3" in await broken(leak)
    finally:
        for fd in leaked:
            os.close(fd)


async def test_what_is_opened_once_and_kept_is_no_leak() -> None:
    kept = []

    def keep(_):
        if not kept:
            kept.append(os.open("/dev/null", os.O_RDONLY))
        return frozenset()

    with started_process() as process:
        await check_workload_attestor(Attestor(keep), process)
    os.close(kept[0])


async def test_a_refusal_is_passed_on() -> None:
    def fail(_):
        raise AttestorFailed("cannot tell")

    with started_process() as process:
        with pytest.raises(AttestorFailed):
            await check_workload_attestor(Attestor(fail), process)
        assert (await check_refuses(Attestor(fail), process)).message == "cannot tell"
        with pytest.raises(ContractBroken, match="answers where it should refuse"):
            await check_refuses(Attestor(), process)


async def test_an_ended_process() -> None:
    await check_ended_process(Attestor(lambda process: process.read("stat") and frozenset()))
    with pytest.raises(ContractBroken, match="not ProcessLookupError"):
        await check_ended_process(Attestor(lambda process: os.kill(process.pid, 0)))
    with ended_process() as process:
        assert process.is_gone()


async def test_cancelled() -> None:
    async def stubborn(_):
        until = time.monotonic() + 3
        while time.monotonic() < until:
            try:
                await asyncio.sleep(0.02)
            except asyncio.CancelledError:
                raise RuntimeError("no") from None
        return frozenset()

    with started_process() as process:
        await check_cancelled(Attestor(), process)
        quick = iter([True])
        with pytest.raises(ContractBroken, match="cancelled, it fails with RuntimeError"):
            await check_cancelled(Attestor(lambda p: frozenset() if next(quick, False) else stubborn(p)), process)


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"name": "Own"}, "name is"),
        ({"selectors": ()}, "not empty"),
        ({"selectors": [SelectorDoc("own:<x>", "x", Strength.KERNEL)]}, "tuple of SelectorDoc"),
        ({"selectors": ("own:<x>",)}, "only SelectorDoc"),
        ({"selectors": (SelectorDoc("own", "x", Strength.KERNEL),)}, "type:value"),
        ({"selectors": (SelectorDoc("own:<x>", " ", Strength.KERNEL),)}, "says what it means"),
        ({"selectors": (SelectorDoc("own:<x>", "x", "strong"),)}, "is a Strength"),
        ({"settings": dict}, "pydantic"),
        ({"settings": Loose}, "refuses unknown names"),
    ],
)
def test_declarations(changed: dict, rule: str) -> None:
    with pytest.raises(ContractBroken, match=rule):
        check_declaration(type("Changed", (Attestor,), changed)())


@pytest.mark.root("another user's process")
async def test_another_users_process() -> None:
    with started_process(user=45678) as process:
        found = await check_workload_attestor(UnixAttestor(UnixSettings()), process)
    assert Selector("unix:uid:45678") in found
