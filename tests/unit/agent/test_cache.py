"""What the agent knows, and who hears of a change."""

import asyncio
from datetime import UTC, datetime

import pytest

from broker.agent.cache import Bell, EstateCache
from broker.agent.wire import ToldBundle, bundle, entry
from broker.spiffe import Selector, TrustDomain
from tests.fakes.fake_server import TD, FakeCa, entry_message

NOW = datetime(2026, 11, 1, tzinfo=UTC)
UID = frozenset({Selector("unix:uid:1")})


def told(ca: FakeCa) -> ToldBundle:
    return bundle(ca.message())


def one(entry_id="e1", path="/a", selectors=("unix:uid:1",), **fields):
    return entry(entry_message(entry_id, path, selectors, **fields), TD)


@pytest.fixture
def cache() -> EstateCache:
    cache = EstateCache(TD)
    cache.replace([one()], [told(FakeCa())])
    return cache


def test_nothing_is_known_before_the_first_snapshot() -> None:
    cache = EstateCache(TD)
    assert (cache.is_synced, len(cache), cache.own_bundle) == (False, 0, None)
    cache.start_with(FakeCa().bundle)
    assert not cache.is_synced
    assert cache.own_bundle is not None


def test_matching_serves_workloads_only(cache) -> None:
    message = entry_message("alias", "/nodes", ("unix:uid:1",))
    message.entry.parent_id.path = "/spire/server"
    stored = entry_message("stored", "/stored", ("unix:uid:1",))
    stored.entry.store_svid = True
    cache.apply(upserted=[entry(message, TD), entry(stored, TD)])
    assert [one.id for one in cache.match(UID, NOW)] == ["e1"]


def test_an_explanation_is_the_same_decision_with_reasons() -> None:
    alias = entry_message("alias", "/nodes", ("unix:uid:1",))
    alias.entry.parent_id.path = "/spire/server"
    entries = [
        one("old", "/old", hint="web", created_at=1),
        one("new", "/new", hint="web", created_at=2),
        one("weak", "/weak", ("says:me",)),
        one("near", "/near", ("unix:uid:1", "unix:gid:1")),
        entry(alias, TD),
    ]
    cache = EstateCache(TD, vouched=lambda selector: selector.type == "unix")
    cache.replace(entries[:2], [told(FakeCa())])
    cache.apply(upserted=entries[2:])
    held = UID | {Selector("says:me")}
    decision = cache.explain(held, NOW)
    assert decision.issued == cache.match(held, NOW)
    assert [found.id for found in decision.issued] == ["old"]
    assert {each.entry.id: (len(each.missing), each.unvouched, each.withheld) for each in decision.refused} == {
        "new": (0, False, "hint_taken"),
        "weak": (0, True, ""),
        "near": (1, False, ""),
        "alias": (0, False, "names_nodes"),
    }
    cache.apply(upserted=[one("weak", "/weak", ("says:me", "unix:uid:1"))])
    assert [found.id for found in cache.match(held, NOW)] == ["old", "weak"]
    cache.apply(deleted=["weak"], upserted=[one("weak", "/weak", ("says:me",))])
    assert [found.id for found in cache.match(held, NOW)] == ["old"]


@pytest.mark.bears("WA-13", "W05")
def test_the_oldest_keeps_a_hint(cache) -> None:
    cache.replace(
        [
            one("new", "/new", hint="web", created_at=2),
            one("old", "/old", hint="web", created_at=1),
            one("none", "/none", created_at=3),
        ],
        [told(FakeCa())],
    )
    assert [found.id for found in cache.match(UID, NOW)] == ["old", "none"]


def test_deltas(cache) -> None:
    before = cache.version
    cache.apply(upserted=[one("e2", "/b")], deleted=["e1", "unknown"])
    assert [found.id for found in cache.match(UID, NOW)] == ["e2"]
    assert cache.version > before


def test_bundles_come_and_go_but_not_the_own_one(cache) -> None:
    other = FakeCa(TrustDomain("other.example"))
    cache.apply(bundles=[told(other)])
    assert other.trust_domain in cache.bundles
    cache.apply(deleted_bundles=[other.trust_domain, TD])
    assert set(cache.bundles) == {TD}


def test_what_is_written_follows_the_bundle(cache) -> None:
    first = cache.x509_der(cache.own_bundle)
    assert cache.x509_der(cache.own_bundle) is first
    ca = FakeCa()
    cache.apply(bundles=[told(ca)])
    assert cache.x509_der(cache.own_bundle) == ca.bundle.x509_der()
    assert cache.jwks(cache.own_bundle) == ca.bundle.jwks().encode()


def test_taint() -> None:
    old, new = FakeCa(), FakeCa()
    cache = EstateCache(TD)
    cache.replace([], [bundle(new.message((old,), tainted=True))])
    assert cache.is_tainted(old.root)
    assert not cache.is_tainted(new.root)
    assert not cache.is_tainted_kid(new.kid)


async def test_a_bell_rings_for_what_concerns_it(cache) -> None:
    with (
        cache.listening(UID) as mine,
        cache.listening(frozenset({Selector("unix:uid:2")})) as other,
        cache.listening() as all_of_it,
    ):
        cache.apply(upserted=[one("e2", "/b")])
        assert await mine.wait(0)
        assert not await other.wait(0)
        assert await all_of_it.wait(0)
        # An entry that was theirs and is no longer concerns them as well.
        cache.apply(upserted=[one("e2", "/b", ("unix:uid:2",))])
        assert await mine.wait(0)
        assert await other.wait(0)
        cache.apply(deleted=["e2"])
        assert await other.wait(0)
        assert not await mine.wait(0)
        cache.apply(bundles=[told(FakeCa())])
        assert await mine.wait(0)
        cache.ring_all()
        assert await other.wait(0)
    assert cache._bells == set()


@pytest.mark.bears("W04")
async def test_the_same_bundle_again_is_no_news(cache) -> None:
    ca = FakeCa()
    cache.apply(bundles=[told(ca)])
    with cache.listening() as bell:
        cache.apply(bundles=[told(ca)])
        assert not await bell.wait(0)


@pytest.mark.bears("W09")
async def test_any_number_of_rings_is_one() -> None:
    bell = Bell()
    for _ in range(100):
        bell.ring()
    assert await bell.wait(0)
    assert not await bell.wait(0)
    waiting = asyncio.create_task(bell.wait(None))
    await asyncio.sleep(0)
    bell.ring()
    assert await waiting


def test_an_entry_that_is_told_again_stays_the_same_object(cache) -> None:
    before = cache.entry("e1")
    cache.replace([one(), one("e2")], [told(FakeCa())])
    assert cache.entry("e1") is before
    cache.replace([one(revision=1)], [told(FakeCa())])
    assert cache.entry("e1") is not before


def test_withdrawal_leaves_bundles(cache) -> None:
    cache.withdraw()
    assert cache.match(UID, NOW) == ()
    assert cache.own_bundle is not None
    assert cache.is_synced
