"""The pollers, with endpoints that answer what the test says: pace, freshness, and what happens while a fetch is under way."""

import asyncio
from contextlib import asynccontextmanager, suppress

import pytest

from broker.errors import BrokerError, NotFound, Unavailable
from broker.server.identity import polling as module
from broker.server.identity.federated import Federated
from broker.server.identity.polling import Polling
from broker.server.identity.relationships import Federation
from broker.server.store.bundle_rows import PublishedBundle
from broker.spiffe import Bundle, TrustDomain
from broker.spiffe.federation import MIN_REFRESH, Profile
from tests.fakes.running_agent import until
from tests.unit.server.identity.test_bundles import events, published
from tests.unit.server.store.samples import relationship
from tests.unit.transport.pki import Authority

OTHER = TrustDomain("other.test")
ONE, TWO = Authority("other.test"), Authority("other.test")


class Endpoints:
    """Answers in the place of the network."""

    def __init__(self) -> None:
        self.answer: Bundle | BrokerError = ONE.bundle.with_sequence(5)
        self.asked = 0
        self.trusts = []
        self.hold = asyncio.Event()
        self.hold.set()

    async def fetch(self, relationship, trust):
        self.asked += 1
        self.trusts.append(trust)
        answer = self.answer
        await self.hold.wait()
        if isinstance(answer, BrokerError):
            raise answer
        return answer


class Fixture:
    def __init__(self, here) -> None:
        self.here, self.endpoints, self.pauses = here, Endpoints(), []
        self.polling = Polling(here.store, here.federated, here.clock, self.endpoints.fetch, chance=self.chance)

    def chance(self, low, high):
        assert (low, high) == (1 - module.JITTER, 1 + module.JITTER)
        return 1.0

    @asynccontextmanager
    async def running(self):
        task = asyncio.create_task(self.polling.run())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def federate(self, bundle=None, **changes):
        (made,) = await self.here.relationships.create([Federation(relationship(**changes), bundle)], "op")
        assert isinstance(made, Federation)


@pytest.fixture
def fixture(here):
    return Fixture(here)


async def test_a_new_relationship_is_asked_at_once(fixture):
    async with fixture.running():
        await fixture.federate()
        await until(lambda: OTHER in fixture.here.federated.bundles)
    assert fixture.here.bundles.federated(OTHER) == PublishedBundle.of(ONE.bundle.with_sequence(5))


async def test_the_bundle_to_begin_with_is_what_the_endpoint_is_judged_by(fixture):
    begin = published()
    await fixture.federate(begin)
    await fixture.polling.refresh(OTHER)
    await fixture.polling.refresh(OTHER)
    first, second = fixture.endpoints.trusts
    assert first.x509_authorities == begin.checked().x509_authorities
    assert second.x509_authorities == ONE.bundle.x509_authorities


@pytest.mark.bears("SP04")
async def test_an_older_bundle_is_not_taken(fixture):
    await fixture.federate(profile=Profile.HTTPS_WEB, endpoint_id=None)
    await fixture.polling.refresh(OTHER)
    fixture.endpoints.answer = TWO.bundle.with_sequence(4)
    with pytest.raises(BrokerError) as refused:
        await fixture.polling.refresh(OTHER)
    assert refused.value.reason == "bundle_older"
    assert refused.value.message.startswith("failed to refresh bundle: ")
    assert fixture.here.bundles.federated(OTHER).sequence == 5
    assert fixture.here.federated.trusted[OTHER].x509_authorities == ONE.bundle.x509_authorities


async def test_other_content_under_one_number_is_taken_and_noted(fixture):
    await fixture.federate(profile=Profile.HTTPS_WEB, endpoint_id=None)
    await fixture.polling.refresh(OTHER)
    fixture.endpoints.answer = TWO.bundle.with_sequence(5)
    await fixture.polling.refresh(OTHER)
    assert fixture.here.federated.trusted[OTHER].x509_authorities == TWO.bundle.x509_authorities
    assert "sequence_unchanged" in [one for one in await events(fixture.here) if "bundle_changed" in one][-1]


@pytest.mark.bears("TB-05")
async def test_an_empty_bundle_is_taken(fixture):
    await fixture.federate(profile=Profile.HTTPS_WEB, endpoint_id=None)
    await fixture.polling.refresh(OTHER)
    fixture.endpoints.answer = Bundle(OTHER, sequence=6)
    await fixture.polling.refresh(OTHER)
    assert fixture.here.federated.trusted[OTHER].x509_authorities == ()


async def test_the_same_bundle_is_written_once(fixture):
    await fixture.federate(profile=Profile.HTTPS_WEB, endpoint_id=None)
    for _ in range(3):
        await fixture.polling.refresh(OTHER)
    assert sum("bundle_changed" in one for one in await events(fixture.here)) == 1


async def test_two_replicas_poll_and_one_writes(fixture):
    here = fixture.here
    await fixture.federate(profile=Profile.HTTPS_WEB, endpoint_id=None)
    twin = Federated(here.authorities)
    await twin.load(here.store)
    other = Polling(here.store, twin, here.clock, fixture.endpoints.fetch, chance=fixture.chance)
    fixture.endpoints.hold.clear()
    both = asyncio.gather(fixture.polling.refresh(OTHER), other.refresh(OTHER))
    await until(lambda: fixture.endpoints.asked == 2)
    fixture.endpoints.hold.set()
    await both
    assert sum("bundle_changed" in one for one in await events(here)) == 1
    assert here.federated.bundles == twin.bundles


@pytest.mark.bears("X05")
async def test_what_is_ended_is_not_brought_back_by_a_fetch_under_way(fixture):
    await fixture.federate(profile=Profile.HTTPS_WEB, endpoint_id=None)
    fixture.endpoints.hold.clear()
    fetching = asyncio.create_task(fixture.polling.refresh(OTHER))
    await until(lambda: fixture.endpoints.asked == 1)
    await fixture.here.relationships.delete([OTHER], "op")
    fixture.endpoints.hold.set()
    with pytest.raises(BrokerError) as refused:
        await fetching
    assert refused.value.reason == "relationship_changed"
    assert fixture.here.federated.bundles == {}


async def test_who_is_not_federated_with_is_not_asked(fixture):
    with pytest.raises(NotFound) as refused:
        await fixture.polling.refresh(OTHER)
    assert refused.value.message == 'no relationship with trust domain "other.test"'
    assert fixture.endpoints.asked == 0


async def test_a_missing_bundle_of_the_endpoint_is_waited_for(fixture):
    fixture.endpoints.answer = Unavailable("can't", code="endpoint_bundle_missing")
    async with fixture.running():
        await fixture.federate()
        await until(lambda: fixture.endpoints.asked == 1)
        fixture.endpoints.answer = ONE.bundle.with_sequence(5)
        # Setting it wakes the poller, long before its pause is over.
        await fixture.here.bundles.set([published(sequence=1)], "op")
        await until(lambda: fixture.here.bundles.federated(OTHER).sequence == 5)


@pytest.mark.bears("FE-02")
async def test_the_pace_is_the_bundles_own(fixture):
    await fixture.federate(profile=Profile.HTTPS_WEB, endpoint_id=None)
    poller = module._Poller(relationship())
    assert fixture.polling._pause(poller) == 300
    fixture.endpoints.answer = ONE.bundle.with_refresh_hint(1200)
    await fixture.polling.refresh(OTHER)
    assert fixture.polling._pause(poller) == 1200
    pauses = []
    for poller.failures in range(1, 12):
        pauses.append(fixture.polling._pause(poller))
    assert pauses[:3] == [MIN_REFRESH, 2 * MIN_REFRESH, 4 * MIN_REFRESH]
    assert pauses[-1] == 1200


async def test_a_changed_relationship_is_asked_anew_and_an_ended_one_no_more(fixture):
    async with fixture.running():
        await fixture.federate(profile=Profile.HTTPS_WEB, endpoint_id=None)
        await until(lambda: fixture.endpoints.asked == 1)
        moved = relationship(url="https://moved.test/", profile=Profile.HTTPS_WEB, endpoint_id=None)
        await fixture.here.relationships.update([(OTHER, lambda current: Federation(moved))], "op")
        await until(lambda: fixture.endpoints.asked == 2)
        await fixture.here.relationships.delete([OTHER], "op")
        await until(lambda: not fixture.polling._pollers)


async def test_a_defect_ends_the_loop_and_is_not_lost(fixture):
    fixture.endpoints.answer = None
    await fixture.federate()
    with pytest.raises(AttributeError):
        async with asyncio.timeout(30):
            await fixture.polling.run()
