"""SPIRE's Bundle service: statuses, words and masks, item by item."""

from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from broker._proto.spire.api.server.bundle.v1 import bundle_pb2
from broker._proto.spire.api.types import bundle_pb2 as types_pb2
from broker.errors import Invalid, NotFound
from broker.server.api.access import LocalPeer
from broker.server.api.grpc.bundle import Bundle
from broker.server.api.grpc.convert import bundle_message
from broker.server.api.rate_limits import Limits
from broker.server.authority.upstream import SelfSigned
from broker.server.identity.downstream import Downstream
from broker.spiffe import TrustDomain
from tests.unit.server.identity.test_bundles import published, spki
from tests.unit.server.identity.world import DOMAIN, world

OPERATOR = LocalPeer(0, 1)
OTHER = TrustDomain("other.test")
INVALID, NOT_FOUND, EXISTS, PRECONDITION = 3, 5, 6, 9


@pytest.fixture
async def here(tmp_path):
    async with world(tmp_path) as one:
        yield one


@pytest.fixture
def service(here):
    downstream = Downstream(
        here.store,
        here.authorities,
        here.rotation,
        SelfSigned(DOMAIN, here.clock),
        here.clock,
        trust_domain=DOMAIN,
        ca_ttl=timedelta(hours=1),
    )
    return Bundle(here.bundles, downstream, limits=Limits.of(here.clock, attestation=True, signing=True))


def sent(name="other.test", **fields):
    message = bundle_message(published())
    message.trust_domain = name
    for field, value in fields.items():
        setattr(message, field, value)
    return message


def statuses(answer):
    return [(result.status.code, result.status.message) for result in answer.results]


async def create(service, *messages, **more):
    request = bundle_pb2.BatchCreateFederatedBundleRequest(bundle=messages, **more)
    return await service.BatchCreateFederatedBundle(request, None, OPERATOR)


async def test_create(service):
    answer = await create(service, sent(), sent(), sent("not a name"), sent("example.org"), sent("c.test"))
    assert statuses(answer) == [
        (0, "OK"),
        (EXISTS, "bundle already exists"),
        (
            INVALID,
            "trust domain argument is not valid: trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores",
        ),
        (INVALID, "creating a federated bundle for the server's own trust domain is not allowed"),
        (0, "OK"),
    ]
    assert [result.bundle.trust_domain for result in answer.results] == ["other.test", "", "", "", "c.test"]
    assert answer.results[0].bundle == (await get(service))
    assert (await service.CountBundles(bundle_pb2.CountBundlesRequest(), None, OPERATOR)).count == 3


async def get(service, name="other.test", **more):
    return await service.GetFederatedBundle(
        bundle_pb2.GetFederatedBundleRequest(trust_domain=name, **more), None, OPERATOR
    )


async def test_everything_comes_back(service):
    message = sent(sequence_number=2**64 - 1, refresh_hint=2**40)
    message.jwt_authorities[0].expires_at = 4102444800
    message.jwt_authorities[0].tainted = True
    message.x509_authorities[0].tainted = True
    await create(service, message)
    assert await get(service) == message
    # SPIRE takes a SPIFFE ID of the trust domain as well.
    assert await get(service, "spiffe://other.test") == message


async def test_what_cannot_be_converted(service):
    unfit = sent()
    unfit.jwt_authorities[0].public_key = spki(ed25519.Ed25519PrivateKey.generate())
    nameless = sent()
    nameless.jwt_authorities[0].key_id = ""
    answer = await create(
        service, sent(refresh_hint=-1), unfit, nameless,
        types_pb2.Bundle(trust_domain="x.test", x509_authorities=[types_pb2.X509Certificate(asn1=b"no")]),
        types_pb2.Bundle(trust_domain="x.test", jwt_authorities=[types_pb2.JWTKey(key_id="k", public_key=b"no")]),
    )  # fmt: skip
    assert {code for code, _ in statuses(answer)} == {INVALID}
    assert all(message.startswith("failed to convert bundle: ") for _, message in statuses(answer))
    assert statuses(answer)[2][1] == "failed to convert bundle: unable to parse JWT authority: missing key ID"


@pytest.mark.parametrize("field", ["x509_authorities", "jwt_authorities", "refresh_hint", "sequence_number"])
async def test_masks(service, field):
    message = sent()
    await create(service, message)
    alone = types_pb2.Bundle(trust_domain="other.test")
    kept = getattr(message, field)
    getattr(alone, field).extend(kept) if field.endswith("ies") else setattr(alone, field, kept)
    mask = types_pb2.BundleMask(**{field: True})
    assert await get(service, output_mask=mask) == alone
    page = await service.ListFederatedBundles(bundle_pb2.ListFederatedBundlesRequest(output_mask=mask), None, OPERATOR)
    assert list(page.bundles) == [alone]
    # An update with that mask changes that field and no other.
    newer = bundle_message(published(sequence=9, refresh_hint=99))
    answer = await service.BatchUpdateFederatedBundle(
        bundle_pb2.BatchUpdateFederatedBundleRequest(bundle=[newer], input_mask=mask), None, OPERATOR
    )
    expected = types_pb2.Bundle()
    expected.CopyFrom(message)
    expected.ClearField(field)
    changed = getattr(newer, field)
    getattr(expected, field).extend(changed) if field.endswith("ies") else setattr(expected, field, changed)
    assert answer.results[0].bundle == expected == await get(service)


async def test_set_and_update(service):
    first = await service.BatchSetFederatedBundle(
        bundle_pb2.BatchSetFederatedBundleRequest(bundle=[sent(), sent("example.org")]), None, OPERATOR
    )
    assert statuses(first) == [
        (0, "OK"),
        (INVALID, "setting a federated bundle for the server's own trust domain is not allowed"),
    ]
    answer = await service.BatchUpdateFederatedBundle(
        bundle_pb2.BatchUpdateFederatedBundleRequest(bundle=[sent("c.test"), sent("example.org"), sent()]),
        None,
        OPERATOR,
    )
    assert statuses(answer) == [
        (NOT_FOUND, "bundle not found"),
        (INVALID, "updating a federated bundle for the server's own trust domain is not allowed"),
        (0, "OK"),
    ]


async def test_pages(service):
    await create(service, *(sent(f"{name}.test") for name in "cab"))
    request = bundle_pb2.ListFederatedBundlesRequest(page_size=2)
    first = await service.ListFederatedBundles(request, None, OPERATOR)
    assert [one.trust_domain for one in first.bundles] == ["a.test", "b.test"]
    request.page_token = first.next_page_token
    second = await service.ListFederatedBundles(request, None, OPERATOR)
    assert ([one.trust_domain for one in second.bundles], second.next_page_token) == (["c.test"], "")


async def test_get_what_is_not_there(service):
    for name, kind, message in (
        ("other.test", NotFound, "bundle not found"),
        ("No", Invalid, "trust domain argument is not valid"),
        ("example.org", Invalid, "getting a federated bundle for the server's own trust domain is not allowed"),
    ):
        with pytest.raises(kind, match=message):
            await get(service, name)


async def test_delete_by_each_mode(service, here):
    await create(service, sent())
    await here.add("/one", federates_with=frozenset({OTHER}))

    async def delete(mode, *names):
        return await service.BatchDeleteFederatedBundle(
            bundle_pb2.BatchDeleteFederatedBundleRequest(trust_domains=names, mode=mode), None, OPERATOR
        )

    refused = await delete("RESTRICT", "other.test", "No", "example.org", "c.test")
    assert [code for code, _ in statuses(refused)] == [PRECONDITION, INVALID, INVALID, NOT_FOUND]
    assert [result.trust_domain for result in refused.results] == ["other.test", "No", "example.org", "c.test"]
    assert statuses(refused)[2][1] == "removing the bundle for the server trust domain is not allowed"
    assert statuses(await delete("DISSOCIATE", "spiffe://other.test")) == [(0, "OK")]
    assert here.directory.entry("one").federates_with == frozenset()
    with pytest.raises(Invalid, match="failed to parse deletion mode"):
        await delete(7, "other.test")


async def test_append(service):
    message = sent()
    append = bundle_pb2.AppendBundleRequest(
        x509_authorities=message.x509_authorities,
        jwt_authorities=message.jwt_authorities,
        output_mask=types_pb2.BundleMask(jwt_authorities=True),
    )
    answer = await service.AppendBundle(append, None, OPERATOR)
    assert "kid" in {key.key_id for key in answer.jwt_authorities}
    assert not answer.x509_authorities
    own = await service.GetBundle(bundle_pb2.GetBundleRequest(), None, OPERATOR)
    assert message.x509_authorities[0].asn1 in {one.asn1 for one in own.x509_authorities}
    for request, words in (
        (bundle_pb2.AppendBundleRequest(), "no authorities to append"),
        (bundle_pb2.AppendBundleRequest(jwt_authorities=[{"key_id": "k"}]), "failed to convert JWT authority"),
        (bundle_pb2.AppendBundleRequest(x509_authorities=[{"asn1": b"x"}]), "failed to convert X.509 authority"),
    ):
        with pytest.raises(Invalid, match=words):
            await service.AppendBundle(request, None, OPERATOR)
