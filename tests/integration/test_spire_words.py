"""What SPIRE says of one item of a batch, word for word: its tools show it, and people's scripts look for it."""

import grpc
import grpc.aio
import pytest

from broker._proto.google.rpc import status_pb2
from broker._proto.service import Stub
from broker._proto.spire.api.server.agent.v1 import agent_pb2
from broker._proto.spire.api.server.bundle.v1 import bundle_pb2
from broker._proto.spire.api.server.entry.v1 import entry_pb2
from broker._proto.spire.api.server.svid.v1 import svid_pb2
from broker._proto.spire.api.server.trustdomain.v1 import trustdomain_pb2
from broker._proto.spire.api.types import bundle_pb2 as bundle_types
from broker._proto.spire.api.types import entry_pb2 as types
from broker._proto.spire.api.types import federationrelationship_pb2 as relationship_types
from broker._proto.spire.api.types.status_pb2 import PermissionDeniedDetails
from broker.server.api.grpc import agent, bundle, entry, svid, trustdomain
from broker.server.identity.entries import MAX_BATCH
from tests.integration.identity_rig import DEADLINE, admin_channel, estate, id_message, running
from tests.integration.spire_callers import ENTRY, callers
from tests.integration.test_spire_wire import new, selectors, wishing

__all__ = ["estate"]  # the fixture

STORED = "failed to {verb} entry: datastore-validation: invalid registration entry: "
UNREAD = "failed to convert entry: "
CREATED = [
    (new("/a", id="taken"), 0, "OK"),
    (new("/b", id="taken"), 6, "failed to create entry: an entry with this id exists"),
    (new("/a"), 6, "similar entry already exists"),
    (new("/c", id="not/valid"), 3, STORED + "entry ID contains invalid characters"),
    (new("/c", id="x" * 256), 3, STORED + "entry ID too long"),
    (new("/c", x509_svid_ttl=-1), 3, STORED + "X509SvidTtl is not set"),
    (new("/c", jwt_svid_ttl=-1), 3, STORED + "JwtSvidTtl is not set"),
    (
        new("/c", store_svid=True, selectors=selectors("a:b", "c:d")),
        3,
        STORED + "selector types must be the same when store SVID is enabled",
    ),
    (new("/c", hint="x" * 1025), 3, UNREAD + "hint is too long, max length is 1024 characters"),
    (new("/c", dns_names=["*.*.org"]), 3, UNREAD + "invalid DNS name: too many wildcards"),
    (new("/c", federates_with=[""]), 3, UNREAD + "invalid federated trust domain: trust domain is missing"),
    # A SPIFFE ID stands for its trust domain.
    (
        new("/c", federates_with=["spiffe://un.org/x"]),
        13,
        'failed to create entry: unable to find federated bundle "spiffe://un.org"',
    ),
    (new("/a/"), 3, UNREAD + "invalid spiffe ID: path cannot have a trailing slash"),
]
UPDATED = [
    (types.Entry(id="taken", x509_svid_ttl=-1), "x509_svid_ttl", 3, STORED + "X509SvidTtl is not set"),
    (types.Entry(id="taken", jwt_svid_ttl=-1), "jwt_svid_ttl", 3, STORED + "JwtSvidTtl is not set"),
    (
        types.Entry(id="taken", dns_names=["*"]),
        "dns_names",
        3,
        UNREAD + "invalid DNS name: wildcard must be first label",
    ),
    (types.Entry(id="taken", hint="x" * 1025), "hint", 3, UNREAD + "hint is too long, max length is 1024 characters"),
    (types.Entry(id="none", hint="x"), "hint", 5, "failed to update entry"),
]


async def test_entries(estate):
    async with running(estate) as one, admin_channel(one) as admin:
        stub = Stub(admin, entry.BINDING)
        request = entry_pb2.BatchCreateEntryRequest(entries=[message for message, _, _ in CREATED])
        created = (await stub.BatchCreateEntry(request, timeout=DEADLINE)).results
        assert [(one.status.code, one.status.message) for one in created] == [
            (code, text.format(verb="create")) for _, code, text in CREATED
        ]
        for message, field, code, text in UPDATED:
            changing = entry_pb2.BatchUpdateEntryRequest(entries=[message], input_mask={field: True})
            (result,) = (await stub.BatchUpdateEntry(changing, timeout=DEADLINE)).results
            assert (result.status.code, result.status.message) == (code, text.format(verb="update"))


REQUEST = wishing()
BROKEN = REQUEST[:-4] + bytes(byte ^ 1 for byte in REQUEST[-4:-1]) + REQUEST[-1:]
MINT = wishing("spiffe://example.org/minted")
CALLS = [
    (agent, "agent", "RenewAgent", agent_pb2.RenewAgentRequest(params={}), "missing CSR"),
    (agent, "agent", "RenewAgent", agent_pb2.RenewAgentRequest(params={"csr": b"x"}), "failed to parse CSR"),
    (
        svid, "local", "MintX509SVID",
        svid_pb2.MintX509SVIDRequest(csr=MINT[:-4] + bytes(byte ^ 1 for byte in MINT[-4:-1]) + MINT[-1:]),
        "failed to verify CSR signature",
    ),
    (svid, "downstream", "NewDownstreamX509CA", svid_pb2.NewDownstreamX509CARequest(csr=b"x"), "malformed CSR"),
    (svid, "downstream", "NewDownstreamX509CA", svid_pb2.NewDownstreamX509CARequest(csr=BROKEN), "invalid CSR signature"),
    (
        svid, "local", "MintJWTSVID",
        svid_pb2.MintJWTSVIDRequest(id={"trust_domain": "example.org", "path": "/x"}, audience=[""]),
        "invalid JWT-SVID audience: cannot be empty",
    ),
]  # fmt: skip
SIGNED = [
    ({}, 3, "missing entry ID"),
    ({"entry_id": "workload"}, 3, "missing CSR"),
    ({"entry_id": "none", "csr": b"x"}, 5, "entry not found or not authorized"),
    ({"entry_id": "workload", "csr": b"x"}, 3, "malformed CSR"),
    ({"entry_id": "workload", "csr": BROKEN}, 3, "invalid CSR signature"),
    ({"entry_id": "workload", "csr": REQUEST}, 0, "OK"),
]


async def test_requests_for_certificates(estate):
    async with callers(estate) as here:
        for module, role, method, request, text in CALLS:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await getattr(here.stub(module.BINDING, role), method)(request, timeout=DEADLINE)
            assert (refused.value.code(), refused.value.details()) == (grpc.StatusCode.INVALID_ARGUMENT, text)
        listed = await here.stub(entry.BINDING, "local").ListEntries(entry_pb2.ListEntriesRequest(), timeout=DEADLINE)
        (known,) = (one.id for one in listed.entries if one.spiffe_id.path == "/workload")
        params = [
            {**fields, "entry_id": known} if fields.get("entry_id") == "workload" else fields for fields, _, _ in SIGNED
        ]
        answer = await here.stub(svid.BINDING, "agent").BatchNewX509SVID(
            svid_pb2.BatchNewX509SVIDRequest(params=params), timeout=DEADLINE
        )
        assert [(one.status.code, one.status.message) for one in answer.results] == [
            (code, text) for _, code, text in SIGNED
        ]
        assert [one.HasField("svid") for one in answer.results] == [code == 0 for _, code, _ in SIGNED]
        # No life, and less, mean the usual one.
        for ttl in (-1, 0):
            minting = svid_pb2.MintX509SVIDRequest(csr=MINT, ttl=ttl)
            assert (await here.stub(svid.BINDING, "local").MintX509SVID(minting, timeout=DEADLINE)).svid.expires_at


async def test_who_is_no_agent_is_told_so_in_the_details(estate):
    async with callers(estate) as here:
        for role, told in (("workload", [PermissionDeniedDetails.AGENT_NOT_ATTESTED]), ("anonymous", [])):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await here.stub(entry.BINDING, role).GetAuthorizedEntries(
                    entry_pb2.GetAuthorizedEntriesRequest(), timeout=DEADLINE
                )
            assert refused.value.details() == f"authorization denied for method /{ENTRY}/GetAuthorizedEntries"
            assert reasons(refused.value) == told
        banning = agent_pb2.BanAgentRequest(id=id_message(here.agent_id))
        await here.stub(agent.BINDING, "local").BanAgent(banning, timeout=DEADLINE)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await here.stub(entry.BINDING, "agent").GetAuthorizedEntries(
                entry_pb2.GetAuthorizedEntriesRequest(), timeout=DEADLINE
            )
        assert refused.value.details() == f"authorization denied for method /{ENTRY}/GetAuthorizedEntries"
        assert reasons(refused.value) == [PermissionDeniedDetails.AGENT_BANNED]


def reasons(error: grpc.aio.AioRpcError) -> list[int]:
    """SPIRE's details of a refusal."""
    found = []
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                denied = PermissionDeniedDetails()
                if detail.Unpack(denied):
                    found.append(denied.reason)
    return found


async def test_a_batch_has_any_length(estate):
    async with running(estate) as one, admin_channel(one) as admin:
        stub = Stub(admin, entry.BINDING)
        many = MAX_BATCH + 1
        batch = [new(f"/{number}", id=str(number)) for number in range(many)]
        created = (
            await stub.BatchCreateEntry(entry_pb2.BatchCreateEntryRequest(entries=batch), timeout=DEADLINE)
        ).results
        assert [one.entry.id for one in created] == [str(number) for number in range(many)]
        ids = [one.entry.id for one in created]
        changes = entry_pb2.BatchUpdateEntryRequest(
            entries=[types.Entry(id=one, hint=one) for one in ids], input_mask={"hint": True}
        )
        changed = (await stub.BatchUpdateEntry(changes, timeout=DEADLINE)).results
        assert [one.entry.hint for one in changed] == ids
        deleted = (await stub.BatchDeleteEntry(entry_pb2.BatchDeleteEntryRequest(ids=ids), timeout=DEADLINE)).results
        assert [(one.id, one.status.code) for one in deleted] == [(one, 0) for one in ids]


NO_CERTIFICATE = bundle_types.X509Certificate(asn1=b"x")
BUNDLES = [
    (bundle_types.Bundle(), "trust domain argument is not valid: trust domain is missing"),
    (
        bundle_types.Bundle(trust_domain="example.org"),
        "creating a federated bundle for the server's own trust domain is not allowed",
    ),
    (
        bundle_types.Bundle(trust_domain="b.org", x509_authorities=[NO_CERTIFICATE]),
        "failed to convert bundle: unable to parse X.509 authority: an X.509 authority is not a certificate",
    ),
    (
        bundle_types.Bundle(trust_domain="b.org", jwt_authorities=[bundle_types.JWTKey(key_id="k")]),
        "failed to convert bundle: unable to parse JWT authority: a JWT authority is not a public key",
    ),
]


async def test_bundles(estate):
    async with running(estate) as one, admin_channel(one) as admin:
        request = bundle_pb2.BatchCreateFederatedBundleRequest(bundle=[message for message, _ in BUNDLES])
        created = (await Stub(admin, bundle.BINDING).BatchCreateFederatedBundle(request, timeout=DEADLINE)).results
        assert [(one.status.code, one.status.message) for one in created] == [(3, text) for _, text in BUNDLES]


RELATIONSHIPS = [
    ({"bundle_endpoint_url": ""}, "bundle endpoint URL must use the https scheme"),
    ({"bundle_endpoint_url": "http://r.org"}, "bundle endpoint URL must use the https scheme"),
    ({"bundle_endpoint_url": "https://"}, "bundle endpoint URL must specify the host"),
    ({"bundle_endpoint_url": "https://a@r.org"}, "bundle endpoint URL must not contain user info"),
    ({"bundle_endpoint_url": "https://r.org/\n"}, "failed to parse bundle endpoint URL"),
    ({"trust_domain": ""}, "failed to parse trust domain: trust domain is missing"),
    ({"https_spiffe": {}}, "failed to parse endpoint SPIFFE ID: cannot be empty"),
    ({"https_web": None}, "unsupported bundle endpoint profile type: <nil>"),
    ({"trust_domain_bundle": {}}, "failed to parse bundle: invalid trust domain: trust domain is missing"),
    (
        {"trust_domain_bundle": {"trust_domain": "r.org", "x509_authorities": [{"asn1": b"x"}]}},
        "failed to parse bundle: unable to parse X.509 authority: an X.509 authority is not a certificate",
    ),
    (
        {"trust_domain_bundle": {"trust_domain": "o.org"}},
        'trust domain bundle ("o.org") must match the trust domain of the federation relationship ("r.org")',
    ),
]


def relationship(fields: dict[str, object]) -> relationship_types.FederationRelationship:
    valid = {"trust_domain": "r.org", "bundle_endpoint_url": "https://r.org/"}
    profile = {} if "https_spiffe" in fields else {"https_web": {}}
    return relationship_types.FederationRelationship(**{**valid, **profile, **fields})


async def test_relationships(estate):
    async with running(estate) as one, admin_channel(one) as admin:
        request = trustdomain_pb2.BatchCreateFederationRelationshipRequest(
            federation_relationships=[relationship(fields) for fields, _ in RELATIONSHIPS]
        )
        stub = Stub(admin, trustdomain.BINDING)
        created = (await stub.BatchCreateFederationRelationship(request, timeout=DEADLINE)).results
        assert [(one.status.code, one.status.message) for one in created] == [
            (3, f"failed to convert federation relationship: {text}") for _, text in RELATIONSHIPS
        ]
