"""The identity half as agents and operators meet it: a real server in this process, real sockets, TLS and SQLite."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from broker._proto.broker.server.v1 import entries_pb2, sessions_pb2, watch_pb2
from broker._proto.grpc.health.v1 import health_pb2
from broker._proto.service import Stub
from broker._proto.spire.api.server.agent.v1 import agent_pb2
from broker._proto.spire.api.server.bundle.v1 import bundle_pb2
from broker._proto.spire.api.server.entry.v1 import entry_pb2
from broker._proto.spire.api.server.svid.v1 import svid_pb2
from broker._proto.spire.api.types import entry_pb2 as entry_types
from broker._proto.spire.api.types.status_pb2 import PermissionDeniedDetails
from broker._proto.spire.api.types.x509svid_pb2 import X509SVID
from broker.clock import SystemClock
from broker.errors import Misconfigured
from broker.server.api.grpc import agent, bundle, entries, entry, health, sessions, svid, watch
from broker.server.settings import AttestorSettings
from broker.server.task_settings import PolicySettings
from broker.spiffe import BundleSet, SpiffeId, verify_jwt_svid, verify_x509_svid
from tests.integration.identity_rig import (
    DEADLINE,
    Estate,
    Node,
    admin_channel,
    attest_over,
    attested,
    bundle_of,
    create_entry,
    csr,
    drain,
    estate,
    id_message,
    join_token,
    own_bundle,
    refused,
    running,
    spire_reason,
)

__all__ = ["estate"]  # the fixture


async def test_a_join_token_admits_one_node_once(estate):
    async with running(estate) as one:
        token = await join_token(one)
        node = Node(await own_bundle(one))
        agent_id = await node.attest(one.port, token)
        assert agent_id.path.startswith("/spire/agent/join_token/")
        # The secret is in no ID.
        assert token not in str(agent_id)
        assert verify_x509_svid(node.chain, node.trusted, now=SystemClock().now()).id == agent_id

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await node.attest(one.port, token)
        # As SPIRE says it.
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.bears("I11")
async def test_of_fifty_nodes_with_one_token_one_is_admitted(estate):
    async with running(estate) as one:
        token, node = await join_token(one), Node(await own_bundle(one))
        async with node.dial(one.port) as channel:
            outcomes = await asyncio.gather(
                *(attest_over(channel, token, csr(node.key)) for _ in range(50)), return_exceptions=True
            )
        admitted = [outcome for outcome in outcomes if isinstance(outcome, X509SVID)]
        assert len(admitted) == 1
        refusals = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
        assert {refusal.code() for refusal in refusals} == {grpc.StatusCode.INVALID_ARGUMENT}
        assert len(refusals) == 49


async def test_a_new_entry_is_on_the_open_stream_at_once(estate):
    async with running(estate) as one, attested(one) as (_, agent_id, channel):
        stream = Stub(channel, watch.BINDING).Watch(watch_pb2.WatchRequest())
        first = await asyncio.wait_for(stream.read(), DEADLINE)
        assert first.WhichOneof("kind") == "snapshot"
        assert not first.snapshot.entries
        assert [one.trust_domain for one in first.snapshot.bundles] == ["example.org"]
        assert not first.snapshot.more

        delays = []
        for number in range(20):
            start = time.perf_counter()
            created = await create_entry(one, agent_id, f"/app/{number}")
            update = await asyncio.wait_for(stream.read(), DEADLINE)
            delays.append(time.perf_counter() - start)
            assert [entry.entry.id for entry in update.delta.upserted] == [created.entry.id]
            assert update.seq > first.seq
        assert sorted(delays)[len(delays) // 2] < 5
        stream.cancel()


async def test_a_stream_is_resumed_where_it_broke(estate):
    async with running(estate) as one, attested(one) as (_, agent_id, channel):
        stub = Stub(channel, watch.BINDING)
        kept, gone = await create_entry(one, agent_id, "/kept"), await create_entry(one, agent_id, "/gone")
        stream = stub.Watch(watch_pb2.WatchRequest())
        snapshot = await asyncio.wait_for(stream.read(), DEADLINE)
        assert {entry.entry.id for entry in snapshot.snapshot.entries} == {kept.entry.id, gone.entry.id}
        stream.cancel()

        added = await create_entry(one, agent_id, "/added")
        async with admin_channel(one) as admin:
            await Stub(admin, entry.BINDING).BatchDeleteEntry(entry_pb2.BatchDeleteEntryRequest(ids=[gone.entry.id]))
        stream = stub.Watch(watch_pb2.WatchRequest(cursor=snapshot.seq, store=snapshot.store))
        delta = await asyncio.wait_for(stream.read(), DEADLINE)
        assert [entry.entry.id for entry in delta.delta.upserted] == [added.entry.id]
        assert list(delta.delta.deleted_ids) == [gone.entry.id]
        assert delta.delta.bundles
        stream.cancel()

        # Another store's cursor means nothing.
        stream = stub.Watch(watch_pb2.WatchRequest(cursor=snapshot.seq, store="another"))
        assert (await asyncio.wait_for(stream.read(), DEADLINE)).WhichOneof("kind") == "snapshot"
        stream.cancel()


@pytest.mark.bears("I04")
async def test_svids_are_signed_for_own_entries_only(estate):
    async with running(estate) as one, attested(one) as (node, agent_id, channel):
        mine = await create_entry(one, agent_id, "/app", dns_names=["app.example.org"])
        other = await create_entry(one, SpiffeId("spiffe://example.org/spire/agent/join_token/other"), "/other")
        key = ec.generate_private_key(ec.SECP256R1())
        # What the request says of names is not looked at.
        request = csr(key, "spiffe://example.org/spire/server")
        answer = await Stub(channel, svid.BINDING).BatchNewX509SVID(
            svid_pb2.BatchNewX509SVIDRequest(
                params=[
                    svid_pb2.NewX509SVIDParams(entry_id=mine.entry.id, csr=request),
                    svid_pb2.NewX509SVIDParams(entry_id=other.entry.id, csr=request),
                    svid_pb2.NewX509SVIDParams(entry_id=mine.entry.id, csr=b"nonsense"),
                ]
            ),
            timeout=DEADLINE,
        )
        assert [result.status.code for result in answer.results] == [0, 5, 3]
        signed = verify_x509_svid(answer.results[0].svid.cert_chain, node.trusted, now=SystemClock().now())
        assert str(signed.id) == "spiffe://example.org/app"
        assert signed.not_after - signed.not_before <= timedelta(hours=1, seconds=30)
        names = signed.leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == ["app.example.org"]


@pytest.mark.bears("JW-04", "JW-05", "JW-06", "JW-07", "JW-08")
async def test_jwt_svids_are_signed_for_allowed_audiences_only(estate):
    async with (
        running(estate, default_allowed_audiences=("here",)) as one,
        attested(one) as (node, agent_id, channel),
    ):
        mine = await create_entry(one, agent_id, "/app")
        stub = Stub(channel, svid.BINDING)
        answer = await stub.NewJWTSVID(svid_pb2.NewJWTSVIDRequest(entry_id=mine.entry.id, audience=["here"]))
        token = verify_jwt_svid(answer.svid.token, node.trusted, audience="here", now=SystemClock().now())
        assert str(token.id) == "spiffe://example.org/app"
        assert token.claims["jti"]
        request = svid_pb2.NewJWTSVIDRequest(entry_id=mine.entry.id, audience=["elsewhere"])
        await refused(stub.NewJWTSVID(request), grpc.StatusCode.PERMISSION_DENIED)
        request = svid_pb2.NewJWTSVIDRequest(entry_id=mine.entry.id)
        await refused(stub.NewJWTSVID(request), grpc.StatusCode.INVALID_ARGUMENT)


async def test_a_restarted_server_and_its_agents_know_each_other(estate):
    async with running(estate) as one:
        node = Node(await own_bundle(one))
        agent_id = await node.attest(one.port, await join_token(one))
        created = await create_entry(one, agent_id, "/app")
        old = next(iter(node.trusted.values()))
    # The agent has the old bundle and its old SVID; the server has a new authority and its old TLS SVID.
    async with running(estate) as one, node.dial(one.port) as channel:
        stream = Stub(channel, watch.BINDING).Watch(watch_pb2.WatchRequest())
        snapshot = await asyncio.wait_for(stream.read(), DEADLINE)
        assert [entry.entry.id for entry in snapshot.snapshot.entries] == [created.entry.id]
        (published,) = bundle_of(snapshot.snapshot.bundles[0]).values()
        assert set(old.x509_authorities) < set(published.x509_authorities)
        assert (published.sequence or 0) > (old.sequence or 0)
        key = ec.generate_private_key(ec.SECP256R1())
        params = svid_pb2.NewX509SVIDParams(entry_id=created.entry.id, csr=csr(key))
        answer = await Stub(channel, svid.BINDING).BatchNewX509SVID(
            svid_pb2.BatchNewX509SVIDRequest(params=[params]), timeout=DEADLINE
        )
        chain = answer.results[0].svid.cert_chain
        now = SystemClock().now()
        assert verify_x509_svid(chain, BundleSet.of(published), now=now).authority not in old.x509_authorities
        stream.cancel()


async def test_a_renewed_svid_ends_the_one_before_it_at_its_first_use(estate):
    async with running(estate) as one, attested(one) as (node, _, channel):
        renewed = Node(node.trusted)
        answer = await Stub(channel, agent.BINDING).RenewAgent(
            agent_pb2.RenewAgentRequest(params=agent_pb2.AgentX509SVIDParams(csr=csr(renewed.key))), timeout=DEADLINE
        )
        renewed.chain = tuple(answer.svid.cert_chain)
        entries_of = entry_pb2.GetAuthorizedEntriesRequest()
        await Stub(channel, entry.BINDING).GetAuthorizedEntries(entries_of, timeout=DEADLINE)
        async with renewed.dial(one.port) as fresh:
            await Stub(fresh, entry.BINDING).GetAuthorizedEntries(entries_of, timeout=DEADLINE)
        error = await refused(
            Stub(channel, entry.BINDING).GetAuthorizedEntries(entries_of, timeout=DEADLINE),
            grpc.StatusCode.PERMISSION_DENIED,
        )
        assert spire_reason(error) == PermissionDeniedDetails.AGENT_NOT_ACTIVE


async def test_a_banned_agent_is_cut_off_and_stays_out(estate):
    async with running(estate) as one, attested(one) as (node, agent_id, channel):
        stream = Stub(channel, watch.BINDING).Watch(watch_pb2.WatchRequest())
        await asyncio.wait_for(stream.read(), DEADLINE)
        async with admin_channel(one) as admin:
            await Stub(admin, agent.BINDING).BanAgent(agent_pb2.BanAgentRequest(id=id_message(agent_id)))
            shown = await Stub(admin, agent.BINDING).GetAgent(agent_pb2.GetAgentRequest(id=id_message(agent_id)))
            assert shown.banned
            assert not shown.x509svid_serial_number
        # Its stream has ended: the connection was closed under it.
        with pytest.raises(grpc.aio.AioRpcError):
            await asyncio.wait_for(drain(stream), DEADLINE)
        async with node.dial(one.port) as again:
            error = await refused(
                Stub(again, watch.BINDING).Watch(watch_pb2.WatchRequest(), timeout=DEADLINE).read(),
                grpc.StatusCode.PERMISSION_DENIED,
            )
            assert spire_reason(error) == PermissionDeniedDetails.AGENT_BANNED


async def test_roles_are_kept(estate):
    async with running(estate) as one:
        trusted = await own_bundle(one)
        stranger = Node(trusted)
        async with stranger.dial(one.port) as channel:
            # The bundle is for everybody, the rest is not.
            await Stub(channel, bundle.BINDING).GetBundle(bundle_pb2.GetBundleRequest(), timeout=DEADLINE)
            for call in (
                Stub(channel, agent.BINDING).ListAgents(agent_pb2.ListAgentsRequest()),
                Stub(channel, agent.BINDING).CreateJoinToken(agent_pb2.CreateJoinTokenRequest()),
                Stub(channel, svid.BINDING).BatchNewX509SVID(svid_pb2.BatchNewX509SVIDRequest()),
                Stub(channel, sessions.BINDING).ReportSessions(sessions_pb2.ReportSessionsRequest()),
                Stub(channel, entries.BINDING).ListEntries(entries_pb2.ListEntriesRequest()),
            ):
                await refused(call, grpc.StatusCode.PERMISSION_DENIED)
        async with admin_channel(one) as admin:
            await refused(
                Stub(admin, svid.BINDING).BatchNewX509SVID(svid_pb2.BatchNewX509SVIDRequest()),
                grpc.StatusCode.PERMISSION_DENIED,
            )
            answer = await Stub(admin, health.BINDING).Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_entries_have_the_semantics_of_spire(estate):
    async with running(estate) as one, admin_channel(one) as admin:
        parent = SpiffeId("spiffe://example.org/spire/agent/join_token/x")
        created = await create_entry(one, parent, "/app", hint="a")
        stub = Stub(admin, entry.BINDING)
        again = entry_types.Entry()
        again.CopyFrom(created.entry)
        again.id = ""
        (result,) = (
            await stub.BatchCreateEntry(entry_pb2.BatchCreateEntryRequest(entries=[again]), timeout=DEADLINE)
        ).results
        assert (result.status.code, result.entry.id) == (6, created.entry.id)

        edited = entry_types.Entry(id=created.entry.id, hint="b", x509_svid_ttl=7)
        (result,) = (
            await stub.BatchUpdateEntry(
                entry_pb2.BatchUpdateEntryRequest(entries=[edited], input_mask=entry_types.EntryMask(hint=True)),
                timeout=DEADLINE,
            )
        ).results
        assert (result.entry.hint, result.entry.x509_svid_ttl, result.entry.revision_number) == ("b", 0, 1)

        wanted = entry_pb2.ListEntriesRequest.Filter(by_spiffe_id=id_message(SpiffeId("spiffe://example.org/none")))
        answer = await stub.ListEntries(entry_pb2.ListEntriesRequest(filter=wanted), timeout=DEADLINE)
        assert not answer.entries
        for number in range(5):
            await create_entry(one, parent, f"/page/{number}")
        found, token = set(), ""
        while True:
            request = entry_pb2.ListEntriesRequest(page_size=2, page_token=token)
            answer = await stub.ListEntries(request, timeout=DEADLINE)
            found |= {entry.spiffe_id.path for entry in answer.entries}
            token = answer.next_page_token
            if not token:
                break
        assert len(found) == 6
        (result,) = (await stub.BatchDeleteEntry(entry_pb2.BatchDeleteEntryRequest(ids=["none"]))).results
        assert result.status.code == 5


async def test_a_join_token_may_bring_an_extra_identity(estate):
    async with running(estate) as one:
        alias = SpiffeId("spiffe://example.org/node/a")
        node = Node(await own_bundle(one))
        await node.attest(one.port, await join_token(one, agent_id=id_message(alias)))
        created = await create_entry(one, alias, "/app")
        async with node.dial(one.port) as channel:
            answer = await Stub(channel, entry.BINDING).GetAuthorizedEntries(entry_pb2.GetAuthorizedEntriesRequest())
        assert created.entry.id in {entry.id for entry in answer.entries}


PROGRAM = """
import asyncio, sys
from pathlib import Path
from broker.errors import Misconfigured
from broker.server import app
from broker.server.settings import load
import os
try:
    asyncio.run(app.run(load(Path(sys.argv[1]), os.environ)))
except Misconfigured as error:
    sys.exit(f"{error.reason}: {error.message}")
"""


def program(estate: Estate, **environ) -> subprocess.Popen[bytes]:
    settings = estate.directory / "server.toml"
    settings.write_text(
        f"""
        [server]
        bind_address = "127.0.0.1"
        bind_port = 0
        data_dir = "{estate.directory}/data"
        runtime_dir = "{estate.directory}/run"
        [server.operations]
        enabled = false
        """
    )
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(settings)], env={**os.environ, **environ}, stderr=subprocess.PIPE
    )


@pytest.mark.bears("A25", "W16")
async def test_the_program_ends_when_it_is_told_and_leaves_no_core(estate):
    process = program(estate)
    try:
        socket = estate.settings().socket_path
        async with asyncio.timeout(30):
            while not socket.exists():
                assert process.poll() is None
                await asyncio.sleep(0.02)
        async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
            check = Stub(channel, health.BINDING).Check
            await check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=DEADLINE)
        limits = Path(f"/proc/{process.pid}/limits").read_text("ascii")
        assert "Max core file size        0                    0" in limits
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 10) == 0
        assert time.monotonic() - start < 10
        assert not socket.exists()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("environ", "code"),
    [
        ({"BROKER_FAILPOINTS": "x=exit"}, b"failpoints_not_allowed"),
        ({"BROKER_SERVER__ROLES": '["tasks"]'}, b"roles_not_supported"),
        ({"BROKER_SERVER__KEYS__MANAGER": "paper"}, b"misconfigured: server.keys.manager"),
    ],
)
async def test_the_program_does_not_start_with_what_it_cannot_keep(estate, environ, code):
    process = program(estate, **environ)
    _, said = await asyncio.to_thread(process.communicate, timeout=30)
    assert process.returncode != 0
    assert code in said


async def test_minting_is_for_operators_and_not_for_reserved_ids(estate):
    async with running(estate) as one, admin_channel(one) as admin:
        stub, key = Stub(admin, svid.BINDING), ec.generate_private_key(ec.SECP256R1())
        minted = await stub.MintX509SVID(svid_pb2.MintX509SVIDRequest(csr=csr(key, "spiffe://example.org/job")))
        signed = verify_x509_svid(minted.svid.cert_chain, await own_bundle(one), now=SystemClock().now())
        assert str(signed.id) == "spiffe://example.org/job"
        for name in ("spiffe://example.org/spire/server", "spiffe://example.org", "spiffe://other.org/job"):
            await refused(
                stub.MintX509SVID(svid_pb2.MintX509SVIDRequest(csr=csr(key, name))), grpc.StatusCode.INVALID_ARGUMENT
            )


async def test_a_start_that_fails_leaves_no_authority_behind(estate):
    # Started again and again by its supervisor, such a server would fill the bundle.
    async with running(estate) as one, admin_channel(one) as admin:
        stub = Stub(admin, bundle.BINDING)
        before = await stub.GetBundle(bundle_pb2.GetBundleRequest(), timeout=DEADLINE)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for changes in (
            {"bind_port": taken.getsockname()[1]},
            {"attestors": AttestorSettings(node={"no_such": {}})},
            {"policy": PolicySettings(path=Path("/no/such/policy.cedar"))},
        ):
            with pytest.raises(Misconfigured):
                async with running(estate, **changes):
                    pass
    async with running(estate) as one, admin_channel(one) as admin:
        after = await Stub(admin, bundle.BINDING).GetBundle(bundle_pb2.GetBundleRequest(), timeout=DEADLINE)
        # The one that signed, and the one that signs.
        assert before.x509_authorities[0].asn1 in {key.asn1 for key in after.x509_authorities}
        assert (len(after.x509_authorities), len(after.jwt_authorities)) == (2, 2)
