"""Other trust domains: relationships, bundles, and the entries that name them."""

import pytest

from broker.errors import Conflict
from broker.server.store.ports import Store
from broker.spiffe import TrustDomain
from broker.spiffe.federation import Profile
from tests.contract.acts import BoomError, failing
from tests.unit.server.store.samples import entry, federated_bundle, relationship

OTHER = TrustDomain("other.test")


class TestFederation:
    async def test_relationships_come_back_as_they_were(self, store: Store) -> None:
        web = relationship("a.test", profile=Profile.HTTPS_WEB, endpoint_id=None)
        await store.write(lambda w: (w.add_relationship(relationship()), w.add_relationship(web)))
        assert await store.read(lambda r: r.relationships()) == (web, relationship())
        assert await store.read(lambda r: r.relationship(OTHER)) == relationship()
        assert await store.read(lambda r: r.relationship(TrustDomain("third.test"))) is None

    async def test_a_trust_domain_has_one_relationship(self, store: Store) -> None:
        await store.write(lambda w: w.add_relationship(relationship()))
        changed = relationship(url="https://elsewhere.test/")
        with pytest.raises(Conflict) as refused:
            await store.write(lambda w: w.add_relationship(changed))
        assert refused.value.reason == "relationship_exists"
        assert await store.write(lambda w: w.replace_relationship(changed))
        assert await store.read(lambda r: r.relationships()) == (changed,)
        assert not await store.write(lambda w: w.replace_relationship(relationship("third.test")))
        assert await store.write(lambda w: w.remove_relationship(OTHER))
        assert not await store.write(lambda w: w.remove_relationship(OTHER))
        assert await store.read(lambda r: r.relationships()) == ()

    async def test_bundles_come_back_as_they_were(self, store: Store) -> None:
        first, second = federated_bundle(), federated_bundle("a.test", x509=(), sequence=0)
        await store.write(lambda w: (w.put_federated_bundle(first), w.put_federated_bundle(second)))
        assert await store.read(lambda r: r.federated_bundles()) == (second, first)
        newer = federated_bundle(sequence=7)
        await store.write(lambda w: w.put_federated_bundle(newer))
        assert await store.read(lambda r: r.federated_bundle(OTHER)) == newer
        assert await store.write(lambda w: w.remove_federated_bundle(OTHER))
        assert not await store.write(lambda w: w.remove_federated_bundle(OTHER))
        assert await store.read(lambda r: r.federated_bundle(OTHER)) is None

    async def test_entries_by_the_trust_domain_that_they_federate_with(self, store: Store) -> None:
        names = {
            "one": {"other.test"},
            "two": {"other.test", "a.test"},
            "none": set(),
            "near": {"xother.test", "other_test"},
        }
        for name, domains in names.items():
            one = entry(name, federates_with=frozenset(map(TrustDomain, domains)))
            await store.write(lambda w, one=one: w.add_entry(one))
        found = await store.read(lambda r: r.entries_federating(OTHER))
        assert [one.id for one in found] == ["ent_one", "ent_two"]

    async def test_an_act_that_fails_leaves_nothing(self, store: Store) -> None:
        with pytest.raises(BoomError):
            await store.write(
                failing(
                    lambda w: w.add_relationship(relationship()), lambda w: w.put_federated_bundle(federated_bundle())
                )
            )
        assert await store.read(lambda r: (r.relationships(), r.federated_bundles())) == ((), ())
