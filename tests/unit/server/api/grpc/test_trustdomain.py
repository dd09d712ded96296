"""SPIRE's TrustDomain service: statuses, words and masks, item by item."""

import pytest

from broker._proto.spire.api.server.trustdomain.v1 import trustdomain_pb2
from broker._proto.spire.api.types.federationrelationship_pb2 import FederationRelationship, FederationRelationshipMask
from broker.errors import Invalid, NotFound
from broker.server.api.access import LocalPeer
from broker.server.api.grpc.convert import bundle_message
from broker.server.api.grpc.trustdomain import TrustDomains
from tests.unit.server.identity.test_bundles import published
from tests.unit.server.identity.test_polling import Fixture
from tests.unit.server.identity.world import world

OPERATOR = LocalPeer(0, 1)
INVALID, NOT_FOUND, EXISTS = 3, 5, 6
CONVERT = "failed to convert federation relationship: "


@pytest.fixture
async def here(tmp_path):
    async with world(tmp_path) as one:
        yield one


@pytest.fixture
def fixture(here):
    return Fixture(here)


@pytest.fixture
def service(here, fixture):
    return TrustDomains(here.relationships, fixture.polling)


def spiffe(name="other.test", url=None, endpoint_id=None, bundle=None):
    made = FederationRelationship(trust_domain=name, bundle_endpoint_url=url or f"https://{name}/")
    made.https_spiffe.endpoint_spiffe_id = endpoint_id or f"spiffe://{name}/spire/server"
    if bundle is not None:
        made.trust_domain_bundle.CopyFrom(bundle_message(bundle))
    return made


def web(name="other.test", url=None):
    made = FederationRelationship(trust_domain=name, bundle_endpoint_url=url or f"https://{name}/")
    made.https_web.SetInParent()
    return made


def statuses(answer):
    return [(result.status.code, result.status.message) for result in answer.results]


async def create(service, *messages, **more):
    request = trustdomain_pb2.BatchCreateFederationRelationshipRequest(federation_relationships=messages, **more)
    return await service.BatchCreateFederationRelationship(request, None, OPERATOR)


async def get(service, name="other.test", **more):
    request = trustdomain_pb2.GetFederationRelationshipRequest(trust_domain=name, **more)
    return await service.GetFederationRelationship(request, None, OPERATOR)


@pytest.mark.bears("FE-07", "FE-09")
async def test_create(service):
    wordless = FederationRelationship(trust_domain="x.test", bundle_endpoint_url="https://x.test/")
    foreign = spiffe("x.test", bundle=published("y.test"))
    answer = await create(
        service, spiffe(bundle=published()), web("web.test"), web(), web("example.org"), web("No"), wordless,
        web("x.test", "http://x.test/"), web("x.test", "https:///"), web("x.test", "https://u@x.test/"),
        spiffe("x.test", endpoint_id="x.test"), foreign,
    )  # fmt: skip
    assert [code for code, _ in statuses(answer)] == [0, 0, EXISTS, *[INVALID] * 8]
    words = [message for _, message in statuses(answer)]
    assert words[2] == "federation relationship already exists"
    assert words[3] == "unable to create federation relationship for server trust domain"
    assert words[4].startswith(CONVERT + "failed to parse trust domain: ")
    assert words[5].startswith(CONVERT + "unsupported bundle endpoint profile type")
    assert words[6] == CONVERT + "bundle endpoint URL must use the https scheme"
    assert words[7] == CONVERT + "bundle endpoint URL must specify the host"
    assert words[8] == CONVERT + "bundle endpoint URL must not contain user info"
    assert words[9].startswith(CONVERT + "failed to parse endpoint SPIFFE ID: ")
    assert "must match the trust domain of the federation relationship" in words[10]
    assert answer.results[1].federation_relationship == web("web.test")


async def test_everything_comes_back(service):
    sent = spiffe(bundle=published())
    answer = await create(service, sent)
    assert answer.results[0].federation_relationship == sent == await get(service)


async def test_masks(service):
    await create(service, spiffe(bundle=published()))
    url = FederationRelationshipMask(bundle_endpoint_url=True)
    assert await get(service, output_mask=url) == FederationRelationship(
        trust_domain="other.test", bundle_endpoint_url="https://other.test/"
    )
    bundle = await get(service, output_mask=FederationRelationshipMask(trust_domain_bundle=True))
    assert bundle.trust_domain_bundle.trust_domain == "other.test"
    assert not bundle.bundle_endpoint_url
    listed = await service.ListFederationRelationships(
        trustdomain_pb2.ListFederationRelationshipsRequest(output_mask=FederationRelationshipMask()), None, OPERATOR
    )
    assert list(listed.federation_relationships) == [FederationRelationship(trust_domain="other.test")]


async def test_pages(service):
    await create(service, *(web(f"{name}.test") for name in "cab"))
    request = trustdomain_pb2.ListFederationRelationshipsRequest(page_size=2)
    first = await service.ListFederationRelationships(request, None, OPERATOR)
    request.page_token = first.next_page_token
    second = await service.ListFederationRelationships(request, None, OPERATOR)
    names = [one.trust_domain for page in (first, second) for one in page.federation_relationships]
    assert (names, second.next_page_token) == (["a.test", "b.test", "c.test"], "")


async def update(service, *messages, **more):
    request = trustdomain_pb2.BatchUpdateFederationRelationshipRequest(federation_relationships=messages, **more)
    return await service.BatchUpdateFederationRelationship(request, None, OPERATOR)


async def test_update(service):
    first = spiffe(bundle=published())
    await create(service, first)
    newer = spiffe(url="https://moved.test/", bundle=published(sequence=0))
    only = FederationRelationshipMask(bundle_endpoint_url=True)
    answer = await update(service, newer, web("c.test"), web("c.test", "http://c.test/"), input_mask=only)
    assert [code for code, _ in statuses(answer)] == [0, NOT_FOUND, INVALID]
    shown = await get(service)
    assert shown.bundle_endpoint_url == "https://moved.test/"
    assert shown.trust_domain_bundle == first.trust_domain_bundle
    # Without a mask everything is replaced; a bundle that is not sent is kept.
    await update(service, newer)
    assert await get(service) == newer
    await update(service, web())
    shown = await get(service)
    assert shown.WhichOneof("bundle_endpoint_profile") == "https_web"
    assert shown.trust_domain_bundle == newer.trust_domain_bundle


async def test_delete(service):
    await create(service, web())
    request = trustdomain_pb2.BatchDeleteFederationRelationshipRequest(
        trust_domains=["spiffe://other.test", "other.test", "", "No"]
    )
    answer = await service.BatchDeleteFederationRelationship(request, None, OPERATOR)
    assert [result.trust_domain for result in answer.results] == ["other.test", "other.test", "", "No"]
    assert statuses(answer)[:3] == [
        (0, "OK"),
        (NOT_FOUND, "federation relationship not found"),
        (INVALID, "missing trust domain"),
    ]
    assert statuses(answer)[3][1].startswith("failed to parse trust domain: ")


async def test_get_what_is_not_there(service):
    with pytest.raises(NotFound, match="federation relationship does not exist"):
        await get(service)
    with pytest.raises(Invalid, match="failed to parse trust domain"):
        await get(service, "No")


async def test_refresh(service, here):
    await create(service, web())
    request = trustdomain_pb2.RefreshBundleRequest(trust_domain="other.test")
    await service.RefreshBundle(request, None, OPERATOR)
    assert here.bundles.count() == 2
    with pytest.raises(NotFound, match="no relationship with trust domain"):
        await service.RefreshBundle(trustdomain_pb2.RefreshBundleRequest(trust_domain="c.test"), None, OPERATOR)
