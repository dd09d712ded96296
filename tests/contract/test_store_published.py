"""The store's port, what concerns the bundle: authorities with their replica, adopted ones, the replicas themselves."""

from dataclasses import replace
from datetime import timedelta

from broker.server.store.rows import AdoptedAuthority, AuthorityKind, Published, Source
from tests.unit.server.store.samples import NOW, authority

HOUR = timedelta(hours=1)
JWT, X509 = AuthorityKind.JWT, AuthorityKind.X509


def adopted(name="k1", kind=JWT, **fields):
    values = {"public": b"public", "not_after": NOW + HOUR, "source": Source.DOWNSTREAM}
    return AdoptedAuthority(kind, name, **(values | fields))


async def test_nothing_is_published_at_first(store):
    assert await store.read(lambda r: r.published()) == Published()


async def test_where_an_authority_stands_comes_back(store):
    row = authority(replica="r1", upstream="ab" * 20, chain=b"\x30\x00")
    plain = authority("a2")
    await store.write(lambda w: (w.put_authority(row), w.put_authority(plain), w.bump_bundle_sequence()))
    found = await store.read(lambda r: r.published())
    assert set(found.authorities) == {row, plain}
    assert found.sequence == 1
    moved = replace(row, replica="r2", chain=b"")
    await store.write(lambda w: w.put_authority(moved))
    assert moved in await store.read(lambda r: r.authorities())


async def test_adopted_authorities_are_put_replaced_and_removed(store):
    root = adopted("k1", X509, source=Source.UPSTREAM)
    await store.write(lambda w: (w.put_adopted(adopted()), w.put_adopted(root)))
    assert (await store.read(lambda r: r.published())).adopted == (adopted(), root)
    revoked = replace(root, tainted=True, source=Source.REVOKED)
    await store.write(lambda w: w.put_adopted(revoked))
    assert await store.write(lambda w: w.remove_adopted(X509, "k1")) == revoked
    assert await store.write(lambda w: w.remove_adopted(X509, "k1")) is None
    assert (await store.read(lambda r: r.published())).adopted == (adopted(),)


async def test_replicas_are_heard_and_forgotten(store):
    await store.write(lambda w: w.see_replica("r1", NOW, NOW - HOUR))
    await store.write(lambda w: w.see_replica("r2", NOW + HOUR, NOW))
    assert (await store.read(lambda r: r.published())).replicas == {"r1": NOW, "r2": NOW + HOUR}
    await store.write(lambda w: w.see_replica("r2", NOW + 2 * HOUR, NOW + timedelta(microseconds=1)))
    assert (await store.read(lambda r: r.published())).replicas == {"r2": NOW + 2 * HOUR}
