"""Identities of others for a delegate: who may ask, what is never given, and when it ends."""

import asyncio
import os
import shutil
import sys
import tempfile
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import load_der_private_key

from broker._proto.service import Stub
from broker._proto.spire.api.agent.debug.v1 import debug_pb2
from broker._proto.spire.api.agent.delegatedidentity.v1 import delegatedidentity_pb2 as messages
from broker._proto.spire.api.types import bundle_pb2, selector_pb2
from broker.agent.listener import DEBUG, DELEGATED
from broker.spiffe import Bundle, BundleSet, TrustDomain, verify_x509_svid
from tests.fakes.fake_server import TD, FakeCa, entry_message
from tests.fakes.running_agent import ME, estate, until

DELEGATE = "spiffe://example.org/delegate"
SLEEP = str(Path(shutil.which("sleep")).resolve())
OTHERS = [selector_pb2.Selector(type="k8s", value="sa:web")]


def entries(*more):
    operator = entry_message("admin", "/wl/admin", ["k8s:sa:web"])
    operator.entry.admin = True
    downstream = entry_message("down", "/wl/down", ["k8s:sa:web"])
    downstream.entry.downstream = True
    return [
        entry_message("d", "/delegate", [ME]),
        entry_message("w", "/wl/web", ["k8s:sa:web"], hint="web", federates_with=["other.example"]),
        operator,
        downstream,
        *more,
    ]


@asynccontextmanager
async def delegation(*more, delegates=(DELEGATE,), **changed):
    async with estate(entries=entries(*more), authorized_delegates=delegates, **changed) as agent:
        path = f"unix:{agent.settings.admin_socket_path}"
        async with grpc.aio.insecure_channel(path, options=(("grpc.use_local_subchannel_pool", 1),)) as channel:
            yield agent, Stub(channel, DELEGATED), Stub(channel, DEBUG)


def of_selectors(stub):
    return stub.SubscribeToX509SVIDs(messages.SubscribeToX509SVIDsRequest(selectors=OTHERS))


async def read(call):
    return await asyncio.wait_for(call.read(), 30)


async def refused(awaited) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as why:
        await asyncio.wait_for(awaited, 30)
    return why.value.code(), why.value.details()


async def test_by_selectors_come_the_workloads_svids_and_no_operators() -> None:
    async with delegation() as (agent, stub, _):
        agent.server.push_bundles(FakeCa(TrustDomain("other.example")).message())
        await until(lambda: TrustDomain("other.example") in agent.agent.cache.bundles)
        call = of_selectors(stub)
        message = await read(call)
        (one,) = message.x509_svids
        svid = verify_x509_svid(
            tuple(one.x509_svid.cert_chain), BundleSet.of(Bundle(TD, (agent.server.ca.root,))), now=datetime.now(UTC)
        )
        assert (str(svid.id), one.x509_svid.id.path, one.x509_svid.hint) == (f"spiffe://{TD}/wl/web", "/wl/web", "web")
        assert one.x509_svid.expires_at == int(svid.not_after.timestamp())
        key = load_der_private_key(one.x509_svid_key, None)
        assert key.public_key().public_numbers() == svid.leaf.public_key().public_numbers()
        assert list(message.federates_with) == ["spiffe://other.example"]
        await until(lambda: any(s.spiffe_id.endswith("/wl/web") for s in agent.server.sessions.values()))
        # What is withdrawn is absent from the next message; the stream stays.
        agent.server.remove("w")
        assert not (await read(call)).x509_svids
        agent.server.put(entry_message("w2", "/wl/again", ["k8s:sa:web"]))
        (again,) = (await read(call)).x509_svids
        assert again.x509_svid.id.path == "/wl/again"
        call.cancel()
        await until(lambda: len(agent.server.ended) == 2)  # the streams' sessions, not the delegate's


async def test_jwt_svids_too_and_no_operators() -> None:
    async with delegation() as (agent, stub, _):
        response = await stub.FetchJWTSVIDs(messages.FetchJWTSVIDsRequest(audience=["a"], selectors=OTHERS))
        (one,) = response.svids
        assert (one.id.trust_domain, one.id.path, one.hint) == ("example.org", "/wl/web", "web")
        assert one.issued_at < one.expires_at
        agent.server.remove("w")
        await until(lambda: agent.agent.cache.entry("w") is None)
        again = stub.FetchJWTSVIDs(messages.FetchJWTSVIDsRequest(audience=["a"], selectors=OTHERS))
        assert await refused(again) == (grpc.StatusCode.PERMISSION_DENIED, "no identity issued")
        nothing = stub.FetchJWTSVIDs(messages.FetchJWTSVIDsRequest(selectors=OTHERS))
        assert await refused(nothing) == (grpc.StatusCode.INVALID_ARGUMENT, "audience must be specified")


async def test_bundles_of_every_trust_domain() -> None:
    async with delegation() as (agent, stub, _):
        x509 = stub.SubscribeToX509Bundles(messages.SubscribeToX509BundlesRequest())
        jwt = stub.SubscribeToJWTBundles(messages.SubscribeToJWTBundlesRequest())
        assert set((await read(x509)).ca_certificates) == {"spiffe://example.org"}
        assert b'"keys"' in (await read(jwt)).bundles["spiffe://example.org"]
        agent.server.push_bundles(FakeCa(TrustDomain("other.example")).message())
        assert set((await read(x509)).ca_certificates) == {"spiffe://example.org", "spiffe://other.example"}
        assert set((await read(jwt)).bundles) == {"spiffe://example.org", "spiffe://other.example"}
        agent.server.push_bundles(bundle_pb2.Bundle(trust_domain="other.example", sequence_number=2))
        assert set((await read(x509)).ca_certificates) == {"spiffe://example.org"}  # nothing to read is left out


async def test_a_named_process_is_attested_and_its_stream_ends_with_it() -> None:
    path = os.path.realpath(SLEEP)
    served = entry_message("s", "/wl/sleeper", [f"unix:path:{path}"])
    async with delegation(served, attestors={"workload": {"unix": {"discover_workload_path": True}}}) as (_, stub, _2):
        sleeper = await asyncio.create_subprocess_exec(SLEEP, "60")
        try:
            call = stub.SubscribeToX509SVIDs(messages.SubscribeToX509SVIDsRequest(pid=sleeper.pid))
            paths = {one.x509_svid.id.path for one in (await read(call)).x509_svids}
            assert paths == {"/wl/sleeper", "/delegate"}  # it runs as the same user
            answer = await stub.FetchJWTSVIDs(messages.FetchJWTSVIDsRequest(audience=["a"], pid=sleeper.pid))
            assert {one.id.path for one in answer.svids} == paths
        finally:
            sleeper.kill()
            await sleeper.wait()
        assert (await refused(call.read()))[0] == grpc.StatusCode.NOT_FOUND
        gone = stub.SubscribeToX509SVIDs(messages.SubscribeToX509SVIDsRequest(pid=sleeper.pid))
        assert await refused(gone.read()) == (grpc.StatusCode.UNAVAILABLE, "workload attestation failed")


async def test_a_named_process_that_becomes_another_loses_its_stream() -> None:
    async with delegation() as (_, stub, _2):
        program = f"import os,sys; sys.stdin.readline(); os.execv({SLEEP!r}, ['sleep', '60'])"
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdin=asyncio.subprocess.PIPE)
        try:
            call = stub.SubscribeToX509SVIDs(messages.SubscribeToX509SVIDsRequest(pid=process.pid))
            assert (await read(call)).x509_svids
            process.stdin.write(b"\n")
            await until(lambda: os.readlink(f"/proc/{process.pid}/exe") == SLEEP)
            answer = stub.FetchJWTSVIDs(messages.FetchJWTSVIDsRequest(audience=["a"], pid=process.pid))
            assert (await answer).svids  # as what it is now
        finally:
            process.kill()
            await process.wait()
        assert (await refused(call.read()))[0] == grpc.StatusCode.NOT_FOUND


def test_the_numbers_are_those_of_spires_clients() -> None:
    pid = b"\x12\x05\x12\x03k8s\x18\x07"  # as spire-api-sdk writes them: selectors = 2, pid = 3
    assert messages.FetchJWTSVIDsRequest.FromString(pid).pid == 7
    assert messages.SubscribeToX509SVIDsRequest.FromString(b"\x10\x07").pid == 7  # selectors = 1, pid = 2


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({}, "must provide either selectors or non-zero PID, but not both"),
        ({"selectors": OTHERS, "pid": 1}, "must provide either selectors or non-zero PID, but not both"),
        ({"selectors": [selector_pb2.Selector(type="", value="x")]}, "could not parse provided selectors"),
    ],
)
async def test_for_whom_is_said_once_and_readably(request_, words) -> None:
    async with delegation() as (_, stub, _2):
        call = stub.SubscribeToX509SVIDs(messages.SubscribeToX509SVIDsRequest(**request_))
        assert await refused(call.read()) == (grpc.StatusCode.INVALID_ARGUMENT, words)


async def test_only_a_named_delegate_is_served_and_only_while_it_is_one() -> None:
    async with delegation(delegates=("spiffe://example.org/somebody",)) as (_, stub, _2):
        assert await refused(of_selectors(stub).read()) == (
            grpc.StatusCode.PERMISSION_DENIED,
            "caller not configured as an authorized delegate",
        )
    async with delegation(delegates=()) as (_, stub, _2):
        assert (await refused(of_selectors(stub).read()))[0] == grpc.StatusCode.PERMISSION_DENIED
    async with delegation() as (agent, stub, _):
        call = of_selectors(stub)
        assert (await read(call)).x509_svids
        agent.server.remove("d")
        assert await refused(call.read()) == (grpc.StatusCode.PERMISSION_DENIED, "no identity issued")


async def test_outside_the_private_directory_others_may_connect_to_be_judged() -> None:
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    directory.chmod(0o755)
    try:
        path = directory / "admin" / "api.sock"
        async with delegation(admin_socket_path=path) as (_, stub, debug):
            assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o666, 0o755)
            assert (await read(of_selectors(stub))).x509_svids
            assert (await debug.GetInfo(debug_pb2.GetInfoRequest())).svid_chain
    finally:
        shutil.rmtree(directory)


async def test_debug_says_how_the_agent_is() -> None:
    async with delegation() as (agent, _, debug):
        await agent.x509()
        await agent.jwt("a")
        await until(lambda: len(agent.agent.svids.spares) == 1)
        info = await debug.GetInfo(debug_pb2.GetInfoRequest())
        (cert,) = info.svid_chain
        assert cert.id.path == agent.agent.node.id.path
        assert cert.expires_at == int(agent.agent.node.svid.not_after.timestamp())
        assert (info.svids_count, info.cached_x509_svids_count, info.cached_jwt_svids_count) == (2, 2, 1)
        assert abs(info.last_sync_success - datetime.now(UTC).timestamp()) < 60
        assert info.uptime >= 0
