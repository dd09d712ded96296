"""One arena for all attacks that need no other, with a bystander that must be served while each of them goes on."""

from collections.abc import AsyncIterator

import pytest_asyncio

from tests.attacks.attestation.arena import BOUND, Arena, Witness, arena, bystander_of


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def ground() -> AsyncIterator[Arena]:
    """The shared arena. What a test registers there, it takes away again."""
    async with arena() as it:
        yield it
        assert it.agent.returncode is None, "an attack ended the agent"
        assert "Traceback" not in it.log


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def witness(ground: Arena) -> AsyncIterator[Witness]:
    """The shared arena's bystander."""
    async with bystander_of(ground) as bystander:
        yield bystander


@pytest_asyncio.fixture(loop_scope="package")
async def duel(ground: Arena, witness: Witness) -> AsyncIterator[Arena]:
    """The shared arena, and afterwards the two questions that every attack is asked: was the victim served all the
    same, and was the bystander, in time?
    """
    before = await witness.report()
    known = set(ground.server.entries)
    yield ground
    for name in set(ground.server.entries) - known:
        ground.server.remove(name)
    await ground.serve_victim()
    after = await witness.report()
    assert after["calls"] > before["calls"]
    assert not after["failed"]
    print(f"bystander: {after}")
    assert after["p99"] < BOUND
