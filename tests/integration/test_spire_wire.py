"""SPIRE's server API as a stranger's client meets it: who may call what, and what each call answers. Raw gRPC only.

The tables below are SPIRE's own policy and answers, written down once more: they do not come from the code under test.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from broker._proto.grpc.health.v1 import health_pb2
from broker._proto.service import Stub
from broker._proto.spire.api.server.agent.v1 import agent_pb2
from broker._proto.spire.api.server.bundle.v1 import bundle_pb2
from broker._proto.spire.api.server.entry.v1 import entry_pb2
from broker._proto.spire.api.server.logger.v1 import logger_pb2
from broker._proto.spire.api.server.svid.v1 import svid_pb2
from broker._proto.spire.api.server.trustdomain.v1 import trustdomain_pb2
from broker._proto.spire.api.types import bundle_pb2 as bundle_types
from broker._proto.spire.api.types import entry_pb2 as types
from broker._proto.spire.api.types import federateswith_pb2, selector_pb2, spiffeid_pb2
from broker.server.api.grpc import agent, bundle, entry, health, logger, svid, trustdomain
from broker.server.settings import RateLimitSettings
from tests.integration.identity_rig import (
    DEADLINE,
    Node,
    admin_channel,
    attest_over,
    csr,
    estate,
    id_message,
    join_token,
    own_bundle,
    running,
)
from tests.integration.spire_callers import AGENT, BUNDLE, ENTRY, SVID, callers

__all__ = ["estate"]  # the fixture

ANY = {"anonymous", "local", "admin", "agent", "downstream", "workload"}
OPERATORS = {"local", "admin"}
AGENTS = {"agent"}
LOCAL_ONLY = {
    "spire.api.server.debug.v1.Debug": ("GetInfo",),
    "spire.api.server.logger.v1.Logger": ("GetLogger", "SetLogLevel", "ResetLogLevel"),
    "grpc.health.v1.Health": ("Check", "List", "Watch"),
    "grpc.reflection.v1.ServerReflection": ("ServerReflectionInfo",),
    "grpc.reflection.v1alpha.ServerReflection": ("ServerReflectionInfo",),
}
POLICY = {
    f"{AGENT}/AttestAgent": ANY,
    f"{BUNDLE}/GetBundle": ANY,
    **{f"{AGENT}/{name}": AGENTS for name in ("RenewAgent", "PostStatus")},
    **{
        f"{AGENT}/{name}": OPERATORS
        for name in ("CountAgents", "ListAgents", "GetAgent", "DeleteAgent", "BanAgent", "CreateJoinToken")
    },
    **{f"{BUNDLE}/{name}": OPERATORS for name in ("CountBundles", "ListFederatedBundles")},
    f"{BUNDLE}/GetFederatedBundle": OPERATORS | AGENTS,
    **{
        f"{ENTRY}/{name}": OPERATORS
        for name in (
            "CountEntries", "ListEntries", "GetEntry", "BatchCreateEntry", "BatchUpdateEntry", "BatchDeleteEntry",
        )
    },
    **{f"{ENTRY}/{name}": AGENTS for name in ("GetAuthorizedEntries", "SyncAuthorizedEntries")},
    **{f"{SVID}/{name}": OPERATORS for name in ("MintX509SVID", "MintJWTSVID")},
    **{f"{SVID}/{name}": AGENTS for name in ("BatchNewX509SVID", "NewJWTSVID")},
}  # fmt: skip
UNIMPLEMENTED = (f"{SVID}/MintWITSVID", f"{SVID}/BatchNewWITSVID")


async def code_of(channel: grpc.aio.Channel, path: str) -> grpc.StatusCode:
    """Send one empty message, as any client can; the code, or OK for the first answer of a stream that goes on."""
    call = channel.stream_stream(f"/{path}")(timeout=DEADLINE)
    try:
        await call.write(b"")
        await call.done_writing()
        if await call.read() is not grpc.aio.EOF:
            return grpc.StatusCode.OK
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        pass
    finally:
        call.cancel()
    return await call.code()


async def end_of(call) -> tuple[grpc.StatusCode, str]:
    """Give how a call ended that must not give an answer."""
    with suppress(grpc.aio.AioRpcError):  # where it had ended before it was read
        assert await call.read() is grpc.aio.EOF
    return await call.code(), await call.details()


async def test_each_method_is_for_spire_s_roles_and_for_nobody_else(estate):
    async with callers(estate) as here:
        for path, roles in POLICY.items():
            for role, channel in here.by_role.items():
                code = await code_of(channel, path)
                assert (code is not grpc.StatusCode.PERMISSION_DENIED) == (role in roles), (path, role, code)
                assert code is not grpc.StatusCode.UNIMPLEMENTED, path
        for path in UNIMPLEMENTED:
            for channel in here.by_role.values():
                assert await code_of(channel, path) is grpc.StatusCode.UNIMPLEMENTED
        for service, names in LOCAL_ONLY.items():
            for name in names:
                for role, channel in here.by_role.items():
                    code = await code_of(channel, f"{service}/{name}")
                    # The TLS port does not serve them at all, whoever asks.
                    assert (code is grpc.StatusCode.UNIMPLEMENTED) == (role != "local"), (service, name, role, code)


def workload_id(path: str, trust_domain: str = "example.org") -> spiffeid_pb2.SPIFFEID:
    return spiffeid_pb2.SPIFFEID(trust_domain=trust_domain, path=path)


def selectors(*texts: str) -> list[selector_pb2.Selector]:
    return [selector_pb2.Selector(type=one.partition(":")[0], value=one.partition(":")[2]) for one in texts]


def new(path: str, trust_domain: str = "example.org", **fields: object) -> types.Entry:
    return types.Entry(
        **{
            "spiffe_id": workload_id(path, trust_domain),
            "parent_id": workload_id("/parent"),
            "selectors": selectors("unix:uid:1"),
            **fields,
        }
    )


KEY = ec.generate_private_key(ec.SECP256R1())
INVALID, NOT_FOUND, EXHAUSTED, DENIED = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.PERMISSION_DENIED,
)
HERE = "spiffe://example.org/minted"


def wishing(*uris: str, dns: Sequence[str] = ()) -> bytes:
    """A certificate request with these names."""
    names = [*map(x509.UniformResourceIdentifier, uris), *map(x509.DNSName, dns)]
    builder = x509.CertificateSigningRequestBuilder(subject_name=x509.Name([]))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
    return builder.sign(KEY, hashes.SHA256()).public_bytes(Encoding.DER)


FILTER = entry_pb2.ListEntriesRequest.Filter
CALLS = [
    # the agent service
    (agent, "local", "GetAgent", agent_pb2.GetAgentRequest(), INVALID, "invalid agent ID: request must specify SPIFFE ID"),
    (agent, "local", "GetAgent", agent_pb2.GetAgentRequest(id=workload_id("/x")), INVALID, "not in the agent namespace"),
    (agent, "local", "GetAgent", agent_pb2.GetAgentRequest(id=workload_id("/spire/agent/a/b")), NOT_FOUND, "agent not found"),
    (agent, "local", "GetAgent", agent_pb2.GetAgentRequest(id=workload_id("/spire/agent/a", "o.org")), INVALID, "not a member of trust domain"),
    (agent, "local", "DeleteAgent", agent_pb2.DeleteAgentRequest(id=workload_id("")), INVALID, "path is empty"),
    (agent, "local", "DeleteAgent", agent_pb2.DeleteAgentRequest(id=workload_id("/spire/agent/a/b")), NOT_FOUND, "agent not found"),
    (agent, "local", "BanAgent", agent_pb2.BanAgentRequest(), INVALID, "invalid agent ID"),
    (agent, "local", "BanAgent", agent_pb2.BanAgentRequest(id=workload_id("/spire/agent/a/b")), NOT_FOUND, "agent not found"),
    (agent, "local", "CreateJoinToken", agent_pb2.CreateJoinTokenRequest(), INVALID, "ttl is required, you must provide one"),
    (agent, "local", "CreateJoinToken", agent_pb2.CreateJoinTokenRequest(ttl=-1), INVALID, "ttl is required"),
    (agent, "local", "CreateJoinToken", agent_pb2.CreateJoinTokenRequest(ttl=1, agent_id=workload_id("/spire/x")), INVALID, "invalid agent ID"),
    (agent, "local", "ListAgents", agent_pb2.ListAgentsRequest(page_size=1, page_token="x"), INVALID, "could not parse token"),
    (agent, "local", "ListAgents", agent_pb2.ListAgentsRequest(filter={"by_selector_match": {}}), INVALID, "failed to parse selectors"),
    (agent, "agent", "PostStatus", agent_pb2.PostStatusRequest(agent_version="x" * 256), INVALID, "agent version is too long"),
    (agent, "agent", "ListAgents", agent_pb2.ListAgentsRequest(), DENIED, f"authorization denied for method /{AGENT}/ListAgents"),
    (agent, "agent", "RenewAgent", agent_pb2.RenewAgentRequest(), INVALID, "params cannot be nil"),
    # the entry service
    (entry, "local", "GetEntry", entry_pb2.GetEntryRequest(), INVALID, "missing ID"),
    (entry, "local", "GetEntry", entry_pb2.GetEntryRequest(id="none"), NOT_FOUND, "entry not found"),
    (entry, "local", "ListEntries", entry_pb2.ListEntriesRequest(page_size=1, page_token="x"), INVALID, "could not parse token 'x'"),
    (entry, "local", "ListEntries", entry_pb2.ListEntriesRequest(filter=FILTER(by_parent_id=workload_id("/x", "o.org"))), INVALID, "malformed parent ID filter"),
    (entry, "local", "ListEntries", entry_pb2.ListEntriesRequest(filter=FILTER(by_spiffe_id=workload_id("/spire/x"))), INVALID, "malformed SPIFFE ID filter"),
    (entry, "local", "ListEntries", entry_pb2.ListEntriesRequest(filter=FILTER(by_selectors={})), INVALID, "malformed selectors filter"),
    (entry, "local", "CountEntries", entry_pb2.CountEntriesRequest(filter={"by_federates_with": {}}), INVALID, "malformed federates with filter"),
    # the SVID service
    (svid, "local", "MintX509SVID", svid_pb2.MintX509SVIDRequest(), INVALID, "missing CSR"),
    (svid, "local", "MintX509SVID", svid_pb2.MintX509SVIDRequest(csr=b"x"), INVALID, "malformed CSR"),
    (svid, "local", "MintX509SVID", svid_pb2.MintX509SVIDRequest(csr=wishing()), INVALID, "CSR URI SAN is required"),
    (svid, "local", "MintX509SVID", svid_pb2.MintX509SVIDRequest(csr=wishing(HERE, HERE)), INVALID, "only one URI SAN is expected"),
    (svid, "local", "MintX509SVID", svid_pb2.MintX509SVIDRequest(csr=wishing("https://a")), INVALID, "CSR URI SAN is invalid: scheme is missing or invalid"),
    (svid, "local", "MintX509SVID", svid_pb2.MintX509SVIDRequest(csr=wishing("spiffe://o.org/a")), INVALID, 'CSR URI SAN is invalid: "spiffe://o.org/a" is not a member of'),
    (svid, "local", "MintX509SVID", svid_pb2.MintX509SVIDRequest(csr=wishing(HERE, dns=["a..b"])), INVALID, 'CSR DNS name is invalid: idna error\nidna: invalid label "a..b"'),
    (svid, "local", "MintX509SVID", svid_pb2.MintX509SVIDRequest(csr=wishing(HERE, dns=["*.a.org", "b.a.org"])), INVALID, 'CSR DNS name contains a wildcard that covers another non-wildcard name: name "b.a.org" overlaps'),
    (svid, "local", "MintJWTSVID", svid_pb2.MintJWTSVIDRequest(), INVALID, "invalid SPIFFE ID: request must specify SPIFFE ID"),
    (svid, "local", "MintJWTSVID", svid_pb2.MintJWTSVIDRequest(id=workload_id("/x")), INVALID, "at least one audience is required"),
    (svid, "local", "MintJWTSVID", svid_pb2.MintJWTSVIDRequest(id=workload_id("/spire/server"), audience=["a"]), INVALID, "path is in the reserved namespace"),
    (svid, "agent", "BatchNewX509SVID", svid_pb2.BatchNewX509SVIDRequest(), INVALID, "missing parameters"),
    (svid, "agent", "BatchNewX509SVID", svid_pb2.BatchNewX509SVIDRequest(params=[svid_pb2.NewX509SVIDParams()] * 501), EXHAUSTED, "rate (501) exceeds burst size (500)"),
    (bundle, "local", "ListFederatedBundles", bundle_pb2.ListFederatedBundlesRequest(page_size=1, page_token="~"), INVALID, "could not parse token '~'"),
    (trustdomain, "local", "ListFederationRelationships", trustdomain_pb2.ListFederationRelationshipsRequest(page_size=1, page_token="~"), INVALID, "could not parse token '~'"),
    (svid, "agent", "NewJWTSVID", svid_pb2.NewJWTSVIDRequest(entry_id="none", audience=["a"]), NOT_FOUND, "entry not found or not authorized"),
    # the ones that only the admin socket has
    (logger, "local", "SetLogLevel", logger_pb2.SetLogLevelRequest(), INVALID, "newLevel value cannot be LogLevel_UNSPECIFIED"),
    (logger, "local", "SetLogLevel", logger_pb2.SetLogLevelRequest(new_level=99), INVALID, "unsupported log level"),
    (health, "local", "Check", health_pb2.HealthCheckRequest(service="none"), NOT_FOUND, "unknown service"),
]  # fmt: skip


async def test_each_refusal_has_spire_s_code_and_words(estate):
    async with callers(estate) as here:
        for module, role, method, request, code, text in CALLS:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await getattr(here.stub(module.BINDING, role), method)(request, timeout=DEADLINE)
            assert refused.value.code() is code, (method, request, refused.value)
            assert text in (refused.value.details() or ""), (method, request)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda message: message.ClearField("params"), "missing params"),
        (lambda message: message.params.ClearField("data"), "missing attestation data"),
        (lambda message: message.params.ClearField("params"), "missing X509-SVID parameters"),
        (lambda message: message.params.params.ClearField("csr"), "missing CSR"),
        (lambda message: message.params.data.ClearField("type"), "missing attestation data type"),
        (lambda message: message.params.data.ClearField("payload"), "missing attestation data payload"),
    ],
)
async def test_attestation_wants_all_its_parameters(estate, change, text):
    async with running(estate) as one, Node(await own_bundle(one)).dial(one.port) as channel:
        message = agent_pb2.AttestAgentRequest(
            params={"data": {"type": "join_token", "payload": b"x"}, "params": {"csr": b"y"}}
        )
        change(message)
        call = Stub(channel, agent.BINDING).AttestAgent(timeout=DEADLINE)
        await call.write(message)
        assert await end_of(call) == (INVALID, f"malformed param: {text}")


async def test_an_attestor_that_is_not_there_is_a_failed_precondition(estate):
    async with running(estate) as one, Node(await own_bundle(one)).dial(one.port) as channel:
        call = Stub(channel, agent.BINDING).AttestAgent(timeout=DEADLINE)
        await call.write(
            agent_pb2.AttestAgentRequest(params={"data": {"type": "aws_iid", "payload": b"x"}, "params": {"csr": b"y"}})
        )
        code, text = await end_of(call)
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert 'could not find node attestor type "aws_iid"' in text


async def test_an_address_attests_once_a_second(estate):
    async with running(estate, ratelimit=RateLimitSettings()) as one:
        node = Node(await own_bundle(one))
        tokens = [await join_token(one) for _ in range(3)]
        async with node.dial(one.port) as channel:
            began = asyncio.get_running_loop().time()
            await asyncio.gather(*(attest_over(channel, token, csr(node.key)) for token in tokens))
            # Each waits its turn; none is refused.
            assert asyncio.get_running_loop().time() - began > 1.9
            # Whose own deadline is nearer than its turn is told at once.
            waits = asyncio.create_task(attest_over(channel, "x" * 20, csr(node.key)))
            await asyncio.sleep(0.2)
            call = Stub(channel, agent.BINDING).AttestAgent(timeout=0.5)
            code, text = await end_of(call)
            assert code is EXHAUSTED
            assert "rejecting request due to attest agent rate limiting" in text
            waits.cancel()


# ---- entries, item by item


def created_statuses(answer: entry_pb2.BatchCreateEntryResponse) -> list[tuple[int, str]]:
    return [(result.status.code, result.status.message) for result in answer.results]


async def test_entries_are_created_item_by_item(estate):
    async with running(estate) as one, admin_channel(one) as admin:
        stub = Stub(admin, entry.BINDING)
        batch = [
            new("/a", id="own-id", hint="h", created_at=5, revision_number=7),
            new("/a", hint="other"),
            new("/b", id="own-id"),
            new("/c", id="not/valid"),
            new("/d", parent_id=None),
            types.Entry(parent_id=workload_id("/p"), selectors=selectors("a:b")),
            new("/e", selectors=[]),
            new("/f", federates_with=["not a domain"]),
            new("/g", hint="x" * 1025),
            new("/h", x509_svid_ttl=-1),
            new("/spire/agent/x"),
            new("/i", store_svid=True, selectors=selectors("a:b", "c:d")),
            new("/j", dns_names=["*.*.org"]),
            new("/l", "o.org"),
            new("/m", selectors=[selector_pb2.Selector(type="a:b", value="c")]),
            new("/k", additional_attributes=types.Entry.AdditionalAttributes(jwt_svid_include_jti=True)),
        ]
        answer = await stub.BatchCreateEntry(entry_pb2.BatchCreateEntryRequest(entries=batch), timeout=DEADLINE)
        codes = [result.status.code for result in answer.results]
        assert codes == [0, 6, 6, *[3] * 12, 0]
        texts = [result.status.message for result in answer.results]
        assert texts[0] == "OK"
        assert texts[1] == "similar entry already exists"
        assert "invalid parent ID: request must specify SPIFFE ID" in texts[4]
        assert "invalid spiffe ID" in texts[5]
        assert "selector list is empty" in texts[6]
        home = 'trust domain "example.org"'
        assert (
            texts[10]
            == f'failed to convert entry: invalid spiffe ID: "spiffe://example.org/spire/agent/x" is not a workload in {home}; path is in the reserved namespace'
        )
        assert texts[13] == f'failed to convert entry: invalid spiffe ID: "spiffe://o.org/l" is not a member of {home}'
        assert texts[14] == "failed to convert entry: selector type contains ':'"
        first, similar, last = answer.results[0].entry, answer.results[1].entry, answer.results[-1].entry
        assert (first.id, first.revision_number) == ("own-id", 0)
        assert first.created_at > 5
        assert similar == first  # the one that is there is shown
        assert last.additional_attributes.jwt_svid_include_jti
        assert not last.additional_attributes.disable_x509_svid_prefetch
        assert not first.HasField("additional_attributes")
        masked = await stub.BatchCreateEntry(
            entry_pb2.BatchCreateEntryRequest(entries=[new("/m")], output_mask=types.EntryMask(hint=True)),
            timeout=DEADLINE,
        )
        assert masked.results[0].entry == types.Entry(id=masked.results[0].entry.id)


async def test_an_update_changes_what_its_mask_names(estate):
    async with running(estate) as one, admin_channel(one) as admin:
        stub = Stub(admin, entry.BINDING)
        full = new(
            "/a", id="one", hint="h", x509_svid_ttl=60, admin=True, dns_names=["a.org"], expires_at=4102444800,
            additional_attributes=types.Entry.AdditionalAttributes(disable_x509_svid_prefetch=True),
        )  # fmt: skip
        await stub.BatchCreateEntry(entry_pb2.BatchCreateEntryRequest(entries=[full]), timeout=DEADLINE)

        async def update(message: types.Entry, **mask: bool) -> entry_pb2.BatchUpdateEntryResponse.Result:
            request = entry_pb2.BatchUpdateEntryRequest(entries=[message])
            if mask:
                request.input_mask.CopyFrom(types.EntryMask(**mask))
            (result,) = (await stub.BatchUpdateEntry(request, timeout=DEADLINE)).results
            return result

        changed = await update(types.Entry(id="one", hint="new", admin=False), hint=True)
        assert (changed.entry.hint, changed.entry.admin, changed.entry.revision_number) == ("new", True, 1)
        attributes = types.Entry.AdditionalAttributes(jwt_svid_include_jti=True)
        changed = await update(types.Entry(id="one", additional_attributes=attributes), additional_attributes=True)
        assert changed.entry.additional_attributes == attributes  # all of them, as one field
        changed = await update(types.Entry(id="one"), additional_attributes=True, dns_names=True, expires_at=True)
        assert not changed.entry.HasField("additional_attributes")
        assert (list(changed.entry.dns_names), changed.entry.expires_at) == ([], 0)
        # Revision and creation are not a client's to change, whatever the mask says.
        changed = await update(
            types.Entry(id="one", revision_number=90, created_at=1), revision_number=True, created_at=True
        )
        assert (changed.status.code, changed.entry.revision_number) == (0, 4)
        # Without a mask every field is meant.
        changed = await update(new("/b", id="one"))
        assert changed.entry == new("/b", id="one", revision_number=5, created_at=changed.entry.created_at)
        # What cannot be read comes before what is not there.
        for message, mask, code, text in (
            (types.Entry(id="none", hint="x"), {"hint": True}, 5, "failed to update entry"),
            (types.Entry(id="none"), {"spiffe_id": True}, 3, "failed to convert entry: invalid spiffe ID"),
            (types.Entry(id="one"), {"selectors": True}, 3, "selector list is empty"),
            (types.Entry(id="one"), {}, 3, "invalid parent ID"),
            (types.Entry(id="one", hint="x" * 1025), {"hint": True}, 3, "hint"),
            (types.Entry(hint="x"), {"hint": True}, 5, "failed to update entry"),
        ):
            result = await update(message, **mask)
            assert result.status.code == code, message
            assert text in result.status.message
        deleted = await stub.BatchDeleteEntry(
            entry_pb2.BatchDeleteEntryRequest(ids=["", "one", "one"]), timeout=DEADLINE
        )
        assert [(one.status.code, one.status.message, one.id) for one in deleted.results] == [
            (3, "missing entry ID", ""),
            (0, "OK", "one"),
            (5, "entry not found", "one"),
        ]


MATCH = selector_pb2.SelectorMatch
FEDERATED = federateswith_pb2.FederatesWithMatch


async def test_lists_are_filtered_and_paged_as_in_spire(estate):
    async with running(estate) as one, admin_channel(one) as admin:
        stub = Stub(admin, entry.BINDING)
        batch = [
            new("/ab", selectors=selectors("t:a", "t:b"), hint="h"),
            new("/a", selectors=selectors("t:a"), downstream=True, parent_id=workload_id("/other")),
            new("/abc", selectors=selectors("t:a", "t:b", "t:c"), federates_with=["b.org", "c.org"]),
            new("/d", selectors=selectors("t:d"), federates_with=["b.org"]),
        ]
        request = entry_pb2.BatchCreateEntryRequest(entries=batch)
        # Nobody federates with a domain of which nothing is known.
        assert [one.status.message for one in (await stub.BatchCreateEntry(request, timeout=DEADLINE)).results] == [
            "OK",
            "OK",
            'failed to create entry: unable to find federated bundle "spiffe://b.org"',
            'failed to create entry: unable to find federated bundle "spiffe://b.org"',
        ]
        foreign = [bundle_types.Bundle(trust_domain=name) for name in ("b.org", "c.org")]
        await Stub(admin, bundle.BINDING).BatchSetFederatedBundle(
            bundle_pb2.BatchSetFederatedBundleRequest(bundle=foreign), timeout=DEADLINE
        )
        assert [one.status.code for one in (await stub.BatchCreateEntry(request, timeout=DEADLINE)).results] == [
            6,
            6,
            0,
            0,
        ]

        async def found(**filters: object) -> set[str]:
            listed = await stub.ListEntries(entry_pb2.ListEntriesRequest(filter=FILTER(**filters)), timeout=DEADLINE)
            counted = await stub.CountEntries(
                entry_pb2.CountEntriesRequest(filter=entry_pb2.CountEntriesRequest.Filter(**filters)), timeout=DEADLINE
            )
            assert counted.count == len(listed.entries)
            return {one.spiffe_id.path for one in listed.entries}

        def by(how: int, *texts: str) -> MATCH:
            return MATCH(selectors=selectors(*texts), match=how)

        assert await found(by_selectors=by(MATCH.MATCH_EXACT, "t:b", "t:a")) == {"/ab"}
        assert await found(by_selectors=by(MATCH.MATCH_SUBSET, "t:a", "t:b")) == {"/ab", "/a"}
        assert await found(by_selectors=by(MATCH.MATCH_SUPERSET, "t:a", "t:b")) >= {"/ab"}
        assert await found(by_selectors=by(MATCH.MATCH_ANY, "t:a", "t:z")) >= {"/ab", "/a"}
        assert await found(by_parent_id=workload_id("/other")) == {"/a"}
        assert await found(by_spiffe_id=workload_id("/ab")) == {"/ab"}
        assert await found(by_hint={"value": "h"}) == {"/ab"}
        assert "/a" in await found(by_hint={"value": ""})  # an empty hint does not narrow
        assert await found(by_downstream={"value": True}) == {"/a"}
        assert "/a" not in await found(by_downstream={"value": False})

        def with_(how: int, *names: str) -> FEDERATED:
            return FEDERATED(trust_domains=names, match=how)

        assert await found(by_federates_with=with_(FEDERATED.MATCH_EXACT, "b.org")) == {"/d"}
        assert await found(by_federates_with=with_(FEDERATED.MATCH_SUPERSET, "b.org")) == {"/abc", "/d"}
        assert await found(by_federates_with=with_(FEDERATED.MATCH_ANY, "c.org", "z.org")) == {"/abc"}
        assert await found(by_federates_with=with_(FEDERATED.MATCH_SUBSET, "b.org", "c.org")) == {"/abc", "/d"}

        seen, token = [], ""
        while True:
            page = await stub.ListEntries(entry_pb2.ListEntriesRequest(page_size=1, page_token=token), timeout=DEADLINE)
            seen += [one.id for one in page.entries]
            token = page.next_page_token
            if not token:
                break
        everything = await stub.ListEntries(entry_pb2.ListEntriesRequest(page_size=-1), timeout=DEADLINE)
        assert seen == [one.id for one in everything.entries]
        assert len(set(seen)) == len(seen) >= 2


async def test_agents_are_listed_banned_and_forgotten_as_in_spire(estate):
    async with callers(estate) as here:
        stub = here.stub(agent.BINDING, "local")
        await here.stub(agent.BINDING, "agent").PostStatus(
            agent_pb2.PostStatusRequest(agent_version="1.15.3"), timeout=DEADLINE
        )
        # One that says nothing keeps what it said.
        await here.stub(agent.BINDING, "agent").PostStatus(agent_pb2.PostStatusRequest(), timeout=DEADLINE)

        async def count(**filters: object) -> int:
            request = agent_pb2.ListAgentsRequest(filter=agent_pb2.ListAgentsRequest.Filter(**filters))
            listed = await stub.ListAgents(request, timeout=DEADLINE)
            counting = agent_pb2.CountAgentsRequest(filter=agent_pb2.CountAgentsRequest.Filter(**filters))
            assert (await stub.CountAgents(counting, timeout=DEADLINE)).count == len(listed.agents)
            return len(listed.agents)

        for narrow, expected in (
            ({}, 1),
            ({"by_attestation_type": "join_token"}, 1),
            ({"by_attestation_type": "x509pop"}, 0),
            ({"by_banned": {"value": False}}, 1),
            ({"by_banned": {"value": True}}, 0),
            ({"by_can_reattest": {"value": False}}, 1),
            ({"by_expires_before": "2999-01-01 00:00:00 +0000 +00"}, 1),  # as SPIRE's command line writes it
            ({"by_expires_before": "2000-01-01 00:00:00 +0000 +00"}, 0),
            ({"by_selector_match": MATCH(selectors=selectors("a:b"), match=MATCH.MATCH_ANY)}, 0),
        ):
            assert await count(**narrow) == expected, narrow

        identity = id_message(here.agent_id)
        shown = await stub.GetAgent(agent_pb2.GetAgentRequest(id=identity), timeout=DEADLINE)
        assert (shown.attestation_type, shown.agent_version, shown.can_reattest) == ("join_token", "1.15.3", False)
        masked = await stub.GetAgent(
            agent_pb2.GetAgentRequest(id=identity, output_mask={"banned": True}), timeout=DEADLINE
        )
        assert (masked.id, masked.attestation_type, masked.x509svid_serial_number) == (identity, "", "")

        await stub.BanAgent(agent_pb2.BanAgentRequest(id=identity), timeout=DEADLINE)
        assert await count(by_banned={"value": True}) == 1
        banned = await stub.GetAgent(agent_pb2.GetAgentRequest(id=identity), timeout=DEADLINE)
        assert (banned.banned, banned.x509svid_serial_number) == (True, "")
        await stub.DeleteAgent(agent_pb2.DeleteAgentRequest(id=identity), timeout=DEADLINE)
        assert await count() == 0
