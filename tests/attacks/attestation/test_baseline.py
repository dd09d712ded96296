"""Without an attack: who is entitled is served, and nobody else (A01)."""

import pytest

from tests.attacks.attestation.arena import DENIED, EVIL_UID, UID, Arena, served

pytestmark = pytest.mark.asyncio(loop_scope="package")


@pytest.mark.bears("A01")
async def test_another_program_of_the_same_user_is_denied(duel: Arena) -> None:
    async with duel.puppet(duel.victim, uid=UID) as victim, duel.puppet(duel.evil, uid=UID) as evil:
        assert await victim.do("ask", duel.socket) == served("/wl/victim")
        assert await evil.do("ask", duel.socket) == DENIED


@pytest.mark.root("another user")
@pytest.mark.bears("A01")
async def test_the_same_program_of_another_user_is_denied(duel: Arena) -> None:
    async with duel.puppet(duel.victim, uid=EVIL_UID) as stranger:
        assert await stranger.do("ask", duel.socket) == DENIED
