from datetime import timedelta

import pytest

from broker.errors import Unavailable
from broker.keys import MemoryKeys
from broker.server.authority.authorities import Authorities
from broker.server.authority.forced import Forced
from broker.server.authority.journal import Journal
from broker.server.authority.plan import PRUNE_GRACE
from broker.server.authority.rotation import Rotation, RotationRules
from broker.server.authority.upstream import SelfSigned
from broker.server.store.rows import AuthorityKind, AuthorityState
from broker.server.store.sqlite import SqliteStore
from tests.unit.server.authority.world import DOMAIN, StandingClock

KINDS = (AuthorityKind.X509, AuthorityKind.JWT, AuthorityKind.TASK)
DAY = timedelta(days=1)


class Process:
    """One life of the server: its keys die with it."""

    def __init__(self, store, clock, on_task_keys=None, *, keys=None, replica="me", upstream=None):
        self.keys = MemoryKeys() if keys is None else keys
        self.authorities = Authorities(DOMAIN, self.keys)
        rules = RotationRules(DOMAIN, KINDS, DAY, replica)
        self.journal = Journal(store, self.authorities, clock, on_task_keys=on_task_keys)
        upstream = upstream or SelfSigned(DOMAIN, clock)
        self.rotation = Rotation(self.journal, self.keys, upstream, clock, rules)
        self.forced = Forced(self.journal, self.rotation, is_below=upstream.is_above)

    def states(self, kind=AuthorityKind.X509):
        # The clock stands, so their ages are equal: show them in the order of a life instead.
        order = ["old", "active", "prepared"]
        return sorted((row.state.value for row in self.authorities.rows if row.kind is kind), key=order.index)


@pytest.fixture
def clock():
    return StandingClock()


@pytest.fixture
async def store(tmp_path, clock):
    async with SqliteStore.open(tmp_path / "broker.db", clock=clock) as one:
        yield one


async def test_nothing_signs_before_the_first_is_published(store, clock):
    process = Process(store, clock)
    for signer in (process.authorities.x509, process.authorities.jwt, process.authorities.task_signer):
        with pytest.raises(Unavailable):
            signer()
    await process.rotation.settle()
    rows = await store.read(lambda reader: reader.authorities())
    assert {row.id for row in rows} >= {process.authorities.x509().id, process.authorities.jwt().id}
    assert process.authorities.task_signer().id in process.authorities.task_keys()
    assert process.authorities.jwt().id in process.authorities.bundle.jwt_authorities
    # Each kind has its own key.
    assert len({process.keys.signer(row.id).public_key.public_numbers() for row in rows}) == len(KINDS)


async def test_settling_again_changes_nothing(store, clock):
    process = Process(store, clock)
    await process.rotation.settle()
    before, sequence = process.authorities.rows, process.authorities.bundle.sequence
    await process.rotation.settle()
    assert process.authorities.rows == before
    assert process.authorities.bundle.sequence == sequence


@pytest.mark.bears("K01", "TB-02")
async def test_a_day_of_rotation(store, clock):
    process = Process(store, clock)
    await process.rotation.settle()
    first, sequence = process.authorities.x509(), process.authorities.bundle.sequence
    clock.advance(timedelta(hours=12))
    await process.rotation.settle()
    assert process.states() == ["active", "prepared"]
    assert process.authorities.x509().id == first.id
    assert process.authorities.bundle.sequence > sequence
    clock.advance(timedelta(hours=8))
    await process.rotation.settle()
    assert process.states() == ["old", "active"]
    assert process.authorities.x509().id != first.id
    # The old key signs nothing more: it is forgotten, its certificate is not.
    assert first.id not in process.keys.ids()
    assert len(process.authorities.bundle.x509_authorities) == 2
    clock.advance(timedelta(hours=4) + PRUNE_GRACE + timedelta(seconds=1))
    await process.rotation.settle()
    assert first.id not in {row.id for row in process.authorities.rows}


async def test_a_restart_keeps_the_old_published_and_signs_with_a_new_one(store, clock):
    before = Process(store, clock)
    await before.rotation.settle()
    after = Process(store, clock)
    await after.rotation.settle()
    assert after.states() == ["old", "active"]
    assert after.authorities.x509().id != before.authorities.x509().id
    assert set(before.authorities.bundle.x509_authorities) < set(after.authorities.bundle.x509_authorities)
    assert set(before.authorities.task_keys()) < set(after.authorities.task_keys())
    assert (after.authorities.bundle.sequence or 0) > (before.authorities.bundle.sequence or 0)


async def test_a_restart_drops_what_was_prepared_and_never_signed(store, clock):
    before = Process(store, clock)
    await before.rotation.settle()
    clock.advance(timedelta(hours=12))
    await before.rotation.settle()
    after = Process(store, clock)
    await after.rotation.settle()
    assert after.states() == ["old", "active"]


async def test_task_keys_are_announced_in_their_own_transaction(store, clock):
    told = []

    def announce(writer, keys):
        told.append((set(keys), {row.id for row in writer.authorities(AuthorityKind.TASK)}))

    process = Process(store, clock, announce)
    await process.rotation.settle()
    assert told == [({process.authorities.task_signer().id},) * 2]


async def test_listeners_are_told_once_per_change(store, clock):
    process, calls = Process(store, clock), []
    process.authorities.subscribe(lambda: calls.append(process.authorities.bundle.sequence))
    await process.rotation.settle()
    told = len(calls)
    await process.rotation.settle()
    assert len(calls) == told > 0


async def test_a_key_that_could_not_be_published_never_signs(store, clock):
    def fail(writer, keys):
        raise Unavailable("the feed is full")

    process = Process(store, clock, fail)
    with pytest.raises(Unavailable):
        await process.rotation.settle()
    assert set(process.keys.ids()) == {row.id for row in process.authorities.rows}
    assert AuthorityKind.TASK not in {row.kind for row in process.authorities.rows}


async def test_every_step_is_recorded(store, clock):
    process = Process(store, clock)
    await process.rotation.settle()
    records = await store.read(lambda reader: reader.records(0, 100))
    bodies = [record.body for record in records]
    assert sum(b'"authority_prepared"' in body for body in bodies) == len(KINDS)
    assert sum(b'"authority_activated"' in body for body in bodies) == len(KINDS)
    assert AuthorityState.ACTIVE in {row.state for row in process.authorities.rows}
