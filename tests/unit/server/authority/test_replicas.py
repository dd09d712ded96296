"""Several processes over one store: replicas, restarts, keys and rows of different days, deaths between two steps."""

import os
import shutil
from datetime import timedelta

import pytest

from broker.errors import Misconfigured, NotFound, Unavailable
from broker.keys import DiskKeys, MemoryKeys
from broker.server.authority.authorities import Authorities
from broker.server.authority.journal import Journal
from broker.server.authority.plan import AHEAD, LEASE, PRUNE_GRACE
from broker.server.authority.replica import replica_name
from broker.server.authority.rotation import Rotation, RotationRules
from broker.server.authority.upstream import SelfSigned
from broker.server.store.rows import AuthorityKind, AuthorityState
from broker.server.store.sqlite import SqliteStore
from tests.unit.server.authority.world import DOMAIN, StandingClock

X509 = AuthorityKind.X509
KINDS = (AuthorityKind.X509, AuthorityKind.JWT, AuthorityKind.TASK)
DAY = timedelta(days=1)


class Stopped(BaseException):
    """The process died."""


class Replica:
    def __init__(self, store, clock, name="me", keys=None):
        self.name, self.clock, self.store = name, clock, store
        self.keys = MemoryKeys() if keys is None else keys
        self.authorities = Authorities(DOMAIN, self.keys)
        self.journal = Journal(store, self.authorities, clock)
        rules = RotationRules(DOMAIN, KINDS, DAY, name)
        self.rotation = Rotation(self.journal, self.keys, SelfSigned(DOMAIN, clock), clock, rules)

    async def settle(self):
        await self.rotation._beat()
        await self.rotation.settle()

    async def live(self):
        await self.rotation.start()
        await self.rotation.prepare(X509, "tester")
        await self.rotation.activate(self.rows(state=AuthorityState.PREPARED)[-1], "tester")

    def rows(self, kind=X509, state=None):
        return [row for row in self.authorities.rows if row.kind is kind and state in (None, row.state)]

    def is_sound(self):
        """Whatever signs is published, active, ours and held; one of each kind at most."""
        published = {row.id: row for row in self.authorities.rows}
        for row in published.values():
            if row.state is AuthorityState.ACTIVE and row.replica == self.name:
                assert (
                    sum(
                        one.kind is row.kind and one.state is AuthorityState.ACTIVE and one.replica == self.name
                        for one in published.values()
                    )
                    == 1
                )
        signer = self.authorities.x509()
        assert published[signer.id].state is AuthorityState.ACTIVE
        assert signer.id in self.keys.ids()
        assert self.authorities.jwt().id in self.authorities.bundle.jwt_authorities
        return True


@pytest.fixture
def clock():
    return StandingClock()


@pytest.fixture
async def store(tmp_path, clock):
    async with SqliteStore.open(tmp_path / "broker.db", clock=clock) as one:
        yield one


@pytest.mark.bears("K02")
async def test_each_replica_signs_with_its_own_and_publishes_it_before(store, clock):
    first = Replica(store, clock, "first")
    await first.settle()
    second = Replica(store, clock, "second")
    await second.settle()
    # The first was heard a moment ago: what it has is its own, and the second waits until all know its certificate.
    assert {row.replica: row.state.value for row in second.rows()} == {"first": "active", "second": "prepared"}
    with pytest.raises(Unavailable):
        second.authorities.x509()
    await first.settle()
    assert second.rows(state=AuthorityState.PREPARED)[0].id in {row.id for row in first.rows()}
    clock.advance(AHEAD)
    await first.settle()
    await second.settle()
    await first.settle()
    assert second.is_sound() and first.is_sound()
    assert first.authorities.x509().id != second.authorities.x509().id
    assert first.authorities.bundle.x509_authorities == second.authorities.bundle.x509_authorities
    assert len(first.rows(state=AuthorityState.ACTIVE)) == 2


@pytest.mark.bears("K02", "K07")
async def test_what_a_dead_replica_signed_counts_until_its_end_and_then_goes(store, clock):
    dead, other = Replica(store, clock, "dead"), Replica(store, clock, "other")
    await dead.settle()
    left = dead.authorities.x509().id
    clock.advance(timedelta(hours=13))
    await dead.settle()
    prepared = dead.rows(state=AuthorityState.PREPARED)[0].id
    await other.settle()
    clock.advance(LEASE)
    await other.settle()
    states = {row.id: row.state for row in other.rows()}
    assert states[left] is AuthorityState.OLD
    assert prepared not in states
    assert other.is_sound()
    clock.advance(timedelta(hours=11) + PRUNE_GRACE)
    await other.settle()
    assert left not in {row.id for row in other.rows()}
    assert left not in {row.id for row in other.journal.published.authorities}


@pytest.mark.bears("K02")
async def test_a_replica_that_was_taken_for_dead_finds_its_way(store, clock):
    slow, other = Replica(store, clock, "slow"), Replica(store, clock, "other")
    await slow.settle()
    await other.settle()
    clock.advance(LEASE)
    await other.settle()
    await slow.settle()
    clock.advance(AHEAD)
    await slow.settle()
    assert slow.is_sound() and other.is_sound()


@pytest.mark.bears("K06")
async def test_keys_and_rows_of_different_days(store, clock, tmp_path):
    keys = tmp_path / "keys"
    before = Replica(store, clock, keys=DiskKeys(keys))
    await before.rotation.start()
    first = before.authorities.x509().id
    shutil.copytree(keys, tmp_path / "yesterday")
    # The same keys: the same authorities.
    same = Replica(store, clock, keys=DiskKeys(keys))
    await same.rotation.start()
    assert same.authorities.x509().id == first
    clock.advance(timedelta(hours=20))
    await same.rotation.settle()
    second = same.authorities.x509().id
    assert second != first
    # Keys of yesterday under rows of today: the key of an old authority is forgotten, and a fresh one is made.
    shutil.rmtree(keys)
    shutil.copytree(tmp_path / "yesterday", keys)
    restored = Replica(store, clock, keys=DiskKeys(keys))
    await restored.rotation.start()
    third = restored.authorities.x509().id
    assert third not in {first, second}
    assert restored.is_sound()
    assert not (keys / f"{first}.pem").exists()
    # Keys of today under rows that never heard of them: they sign nothing.
    async with SqliteStore.open(tmp_path / "other.db", clock=clock) as empty:
        strange = Replica(empty, clock, keys=DiskKeys(keys))
        await strange.rotation.start()
        assert third not in {row.id for row in strange.authorities.rows}
        with pytest.raises(NotFound):
            strange.keys.signer(third)
        assert strange.is_sound()


@pytest.mark.bears("K05", "K06")
async def test_no_key_is_published_that_is_not_on_the_disk(store, clock, tmp_path, monkeypatch):
    keys = tmp_path / "keys"
    here = Replica(store, clock, keys=DiskKeys(keys))
    looked = []

    def look(writer, task_keys):
        looked.append(({row.id for row in writer.authorities()}, {one.stem for one in keys.iterdir()}))

    monkeypatch.setattr(here.journal, "_on_task_keys", look)
    await here.rotation.start()
    assert looked and all(published <= on_disk for published, on_disk in looked)
    before, signing = here.authorities.rows, here.authorities.x509().id

    def full(*_args, **_more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "open", full)
    clock.advance(timedelta(hours=12))
    with pytest.raises(Unavailable):
        await here.rotation.prepare(X509, "op")
    assert (here.authorities.rows, here.authorities.x509().id) == (before, signing)
    monkeypatch.undo()
    await here.settle()
    assert here.is_sound()


@pytest.mark.bears("K09")
async def test_a_clock_that_jumps_leaves_one_active_authority_that_is_published(store, clock):
    here = Replica(store, clock)
    await here.settle()
    for jump in (
        timedelta(days=10),
        timedelta(days=-10),
        timedelta(hours=13),
        timedelta(hours=-1),
        timedelta(days=400),
    ):
        clock.advance(jump)
        await here.settle()
        assert here.is_sound()
        # Forwards nothing that has ended signs.
        assert jump < timedelta(0) or here.authorities.x509().issuer.validity.not_after > clock.now()


@pytest.mark.bears("K06")
async def test_another_key_under_the_same_name_stops_the_server(store, clock, tmp_path):
    keys = tmp_path / "keys"
    before = Replica(store, clock, keys=DiskKeys(keys))
    await before.rotation.start()
    names = sorted(keys.iterdir())
    names[0].rename(keys / "x")
    names[1].rename(names[0])
    (keys / "x").rename(names[1])
    with pytest.raises(Misconfigured) as caught:
        await Replica(store, clock, keys=DiskKeys(keys)).rotation.start()
    assert caught.value.reason == "key_mismatch"


@pytest.mark.bears("K05")
@pytest.mark.parametrize("is_on_disk", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", ["prepare", "activate", "retire", "prune"])
async def test_a_death_between_two_steps_is_survived(store, clock, tmp_path, monkeypatch, when, step, is_on_disk):
    def keys():
        return DiskKeys(tmp_path / "keys") if is_on_disk else MemoryKeys()

    def die(name):
        if name == f"authority.{when}_{step}":
            raise Stopped

    if step in {"retire", "prune"}:  # of what an earlier life left
        await Replica(store, clock, keys=keys()).rotation.start()
    until = {}  # when nothing that it signed can be valid any more
    for hours in (60, 60, 60) if step == "prune" else (0, 12, 8, 12, 8):
        clock.advance(timedelta(hours=hours))
        if step == "retire" and is_on_disk:
            shutil.rmtree(tmp_path / "keys")
        dying = Replica(store, clock, keys=keys())
        monkeypatch.setattr("broker.server.failpoints.reach", die)
        with pytest.raises(Stopped):
            await dying.live()
        monkeypatch.undo()
        after = Replica(store, clock, keys=keys())
        await after.rotation.start()
        assert after.is_sound()
        published = {row.id: row for row in after.authorities.rows}
        for key_id in after.keys.ids():
            assert published[key_id].state is not AuthorityState.OLD
        # An authority that signed stays in the bundle while what it signed may live.
        assert all(key_id in published or clock.now() > end for key_id, end in until.items())
        active = published[after.authorities.x509().id]
        until[active.id] = active.not_after + PRUNE_GRACE


def test_the_name_of_a_replica_stays_and_is_used_once(tmp_path):
    with replica_name(tmp_path) as first:
        assert len(first) == 32
        with pytest.raises(Misconfigured) as caught, replica_name(tmp_path):
            pass
        assert caught.value.reason == "data_dir_in_use"
    with replica_name(tmp_path) as again:
        assert again == first
    (tmp_path / "replica").write_text("what")
    with replica_name(tmp_path) as fresh:
        assert fresh not in {first, "what"}
    (tmp_path / "replica").unlink()
    (tmp_path / "replica").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Misconfigured), replica_name(tmp_path):
        pass
