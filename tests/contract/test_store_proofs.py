"""Proofs of possession: shown once, whoever asks; the leaves of a session outlive its rotations."""

import asyncio
from dataclasses import replace

import pytest

from broker.errors import Refused
from broker.server.store.ports import Store
from tests.contract.acts import Opener
from tests.unit.server.store.samples import HOUR, NOW, SECOND, session

X5T, ROTATED = "A" * 42 + "w", "B" * 42 + "w"
JKT, OTHER = "C" * 42 + "w", "D" * 42 + "w"


@pytest.mark.bears("PB04", "X06")
async def test_a_proof_is_taken_once_and_a_restart_changes_nothing(opener: Opener) -> None:
    async with opener() as store:
        spent = await asyncio.gather(
            *(store.write(lambda w: w.spend_proof("p1", NOW + HOUR)) for _ in range(20)), return_exceptions=True
        )
        assert sorted(type(each).__name__ for each in spent) == ["NoneType"] + ["Refused"] * 19
    async with opener() as again:
        with pytest.raises(Refused) as refused:
            await again.write(lambda w: w.spend_proof("p1", NOW + HOUR))
        assert refused.value.reason == "proof_replayed"


async def test_what_has_expired_is_forgotten(store: Store) -> None:
    await store.write(
        lambda w: (
            w.spend_proof("p1", NOW + SECOND),
            w.add_nonce("n1", NOW + SECOND),
            w.claim_assertion("a1", JKT, NOW + SECOND),
        )
    )
    assert await store.write(lambda w: w.sweep(NOW, 100)) == 0
    assert await store.write(lambda w: w.sweep(NOW + SECOND, 100)) == 3


@pytest.mark.bears("SP07", "X06")
async def test_an_assertion_belongs_to_the_key_that_it_came_with(store: Store) -> None:
    for _ in range(2):
        await store.write(lambda w: w.claim_assertion("a1", JKT, NOW + HOUR))
    with pytest.raises(Refused) as refused:
        await store.write(lambda w: w.claim_assertion("a1", OTHER, NOW + HOUR))
    assert refused.value.reason == "assertion_replayed"
    await store.write(lambda w: w.claim_assertion("a2", OTHER, NOW + HOUR))


async def test_a_nonce_is_known_until_it_expires(store: Store) -> None:
    for _ in range(2):
        await store.write(lambda w: w.add_nonce("n1", NOW + SECOND))
    known = [("n1", NOW), ("n1", NOW + SECOND), ("n2", NOW)]
    assert [await store.read(lambda r, one=one: r.knows_nonce(*one)) for one in known] == [True, False, False]


@pytest.mark.bears("PB11", "PB12")
async def test_a_session_holds_its_leaves_until_they_or_it_end(store: Store) -> None:
    held = session(x5t=X5T, not_after=NOW + HOUR)
    await store.write(
        lambda w: (w.put_session(held), w.put_session(replace(held, x5t=ROTATED, not_after=NOW + 2 * HOUR)))
    )

    def holds(x5t: str, at=NOW, session_id: str = held.id):
        return store.read(lambda r: r.holds_leaf(session_id, x5t, at))

    assert [await holds(X5T), await holds(ROTATED), await holds(JKT), await holds(X5T, session_id="ws_9")] == [
        True, True, False, False
    ]  # fmt: skip
    assert [await holds(X5T, NOW + HOUR), await holds(ROTATED, NOW + HOUR)] == [False, True]
    found = await store.read(lambda r: (r.session_by_x5t(X5T), r.session_by_x5t(ROTATED)))
    assert found[0] == found[1] == replace(held, x5t=ROTATED, not_after=NOW + 2 * HOUR)
    await store.write(lambda w: w.end_session(held.id, NOW))
    assert not await holds(ROTATED)
