"""The caller dies, and its number is a victim's, at the worst moments of a call (A02), or it becomes another program (A05)."""

import hashlib

import pytest

from tests.attacks.attestation.arena import (
    CLOSED,
    DENIED,
    REFUSED,
    UID,
    WITH_PATHS,
    Arena,
    arena,
    bystander_of,
    served,
)
from tests.fakes.running_agent import until

pytestmark = pytest.mark.asyncio(loop_scope="package")
needs_numbers = pytest.mark.root("chosen process ids, processes of other users")
# Says nothing of anybody, and that not before the file ``go`` is there; ``asked`` says that it has been asked.
SLOW = """#!/bin/sh
: > "$1/asked"
while [ ! -e "$1/go" ]; do sleep 0.01; done
echo '{"version": 1, "selectors": []}'
"""


def slowly(it: Arena) -> str:
    """Settings with an attestor that takes its time when a test wants it."""
    program = it.executable("slow", SLOW)
    (it.directory / "go").touch()
    digest = hashlib.sha256(program.read_bytes()).hexdigest()
    return (
        f"{WITH_PATHS}[[agent.attestors.workload.exec.programs]]\n"
        f'name = "slow"\npath = "{program}"\nargs = ["{it.directory}"]\nsha256 = "{digest}"\ntimeout = 5.0\n'
    )


# --- the number is used again


@needs_numbers
@pytest.mark.bears("A02")
async def test_dead_before_the_first_byte(duel: Arena) -> None:
    async with duel.rebirth() as born, duel.puppet(uid=UID) as attacker:
        assert await attacker.do("connect", duel.socket)
        held = await attacker.give()
        await attacker.end()
        await born(attacker.pid)
        assert await held.is_closed()


@needs_numbers
@pytest.mark.bears("A02")
async def test_dead_between_two_calls(duel: Arena) -> None:
    async with duel.rebirth() as born, duel.puppet(uid=UID) as attacker:
        assert await attacker.do("connect", duel.socket)
        held = await attacker.give()
        assert await held.call() == DENIED
        await attacker.end()
        await born(attacker.pid)
        assert await held.call() == CLOSED


@needs_numbers
@pytest.mark.bears("A02")
async def test_dead_while_it_is_attested() -> None:
    async with (
        arena(attestors=slowly) as it,
        bystander_of(it) as witness,
        it.rebirth() as born,
        it.puppet(uid=UID) as attacker,
    ):
        await witness.report()
        assert await attacker.do("connect", it.socket)
        held = await attacker.give()
        go, asked = it.directory / "go", it.directory / "asked"
        go.unlink()
        asked.unlink()
        stream = await held.open_stream()
        await until(asked.exists)
        await attacker.end()
        await born(attacker.pid)
        go.touch()
        assert await held.hear(stream) in REFUSED
        await it.serve_victim()
        assert not (await witness.report())["failed"]


@needs_numbers
@pytest.mark.bears("A02", "A10")
async def test_dead_while_its_certificate_is_signed(duel: Arena) -> None:
    """Entitled when it was attested; whoever holds its connection when the answer is ready is not."""
    fresh = duel.program("fresh")
    duel.register("fresh", f"unix:uid:{UID}", f"unix:path:{fresh}")
    async with duel.rebirth() as born, duel.puppet(fresh, uid=UID) as honest:
        assert await honest.do("connect", duel.socket)
        held = await honest.give()
        duel.server.sign_gate.clear()
        asked = len(duel.server.batches)
        try:
            stream = await held.open_stream()
            await until(lambda: len(duel.server.batches) > asked)
            await honest.end()
            await born(honest.pid)
        finally:
            duel.server.sign_gate.set()
        assert await held.hear(stream) in REFUSED
    async with duel.puppet(fresh, uid=UID) as honest:
        assert await honest.do("ask", duel.socket) == served("/wl/fresh")


# --- another program under the same number, and a sibling that kept the connection


@pytest.mark.bears("A05")
@pytest.mark.parametrize("asked_before", [False, True], ids=["at the first call", "after a call"])
async def test_a_sibling_of_whoever_became_the_victim(duel: Arena, asked_before: bool) -> None:
    async with duel.puppet(uid=UID) as attacker:
        assert await attacker.do("connect", duel.socket)
        held = await attacker.give()
        if asked_before:
            assert await held.call() == DENIED
        await duel.transform(attacker, duel.victim)
        assert await held.call() in REFUSED
        assert await held.is_closed()


@pytest.mark.bears("A05")
async def test_a_victim_that_became_another_program(duel: Arena) -> None:
    async with duel.puppet(duel.victim, uid=UID) as victim:
        assert await victim.do("connect", duel.socket)
        held = await victim.give()
        assert await held.call() == served("/wl/victim")
        await duel.transform(victim, duel.evil)
        assert await held.call() in REFUSED
        assert await held.is_closed()


@pytest.mark.bears("A05")
async def test_a_child_of_whoever_became_the_victim(duel: Arena) -> None:
    async with duel.puppet(uid=UID) as attacker:
        assert await attacker.do("connect", duel.socket)
        async with attacker.sibling() as child:
            await duel.transform(attacker, duel.victim)
            assert await child.do("call") in REFUSED
