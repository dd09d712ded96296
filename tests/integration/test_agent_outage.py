"""The agent while its server is away, comes back, is another, or wants it no more: real server, real agent, real sockets."""

import asyncio
import shutil
import tempfile
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from broker._proto.broker.server.v1 import revocations_pb2
from broker._proto.service import Stub
from broker._proto.spiffe import workload_pb2
from broker.agent import bootstrap, rebootstrap
from broker.agent.bootstrap import Condition
from broker.agent.listener import CONNECTION, IDENTITY, WORKLOAD
from broker.errors import InvalidSvid
from broker.server.authority import server_svid
from broker.spiffe.x509svid import split_der, verify_x509_svid
from tests.fakes.node_fleet import NODE
from tests.fakes.node_pki import root
from tests.fakes.outage import House, held_spares, joined, part, served
from tests.fakes.processes import agent_process, held_connection
from tests.fakes.running_agent import HEADER, ME, RunningAgent, until

NODE_ID = "/spire/agent/join_token/"
LONG = 40  # seconds: what is allowed to take half a minute on a slow machine


@pytest.fixture
async def house():
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    directory.chmod(0o755)
    house = House(directory)
    yield house
    await house.line.cut()
    shutil.rmtree(directory)


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(bootstrap, "CHECK_EVERY", 0.1)
    monkeypatch.setattr(rebootstrap, "LOOK_EVERY", 0.1)
    # The server's own SVID lives as long as an agent's; it reckons from not_before, which is back-dated by half a minute.
    monkeypatch.setattr(server_svid, "_half_life", lambda svid: svid.not_after - timedelta(seconds=1.5))


def leaf(svid) -> x509.Certificate:
    return x509.load_der_x509_certificate(split_der(svid.x509_svid)[0])


async def streamed(agent: RunningAgent, stub: Stub):
    call = stub.FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=HEADER)
    return call, (await asyncio.wait_for(call.read(), LONG)).svids[0]


async def of_another_process(agent: RunningAgent, number: int) -> workload_pb2.X509SVID:
    async with (
        held_connection(agent.socket, agent.directory / f"r{number}", "stay") as held,
        grpc.aio.insecure_channel(f"unix:{held.relay}", options=(("grpc.use_local_subchannel_pool", 1),)) as channel,
    ):
        call = Stub(channel, WORKLOAD).FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=HEADER)
        return (await asyncio.wait_for(call.read(), LONG)).svids[0]


async def status(attempt) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await attempt
    return refused.value.code()


@pytest.mark.bears("O01")
async def test_in_an_outage_valid_svids_are_served_to_their_end_and_the_server_is_found_again(house) -> None:
    async with AsyncExitStack() as stack:
        server = AsyncExitStack()
        await server.enter_async_context(house.server(default_jwt_svid_ttl="1h"))
        await house.settings()
        agent = await stack.enter_async_context(house.agent())
        await joined(agent, house, ttl=6)
        stub = await stack.enter_async_context(agent.workload())
        call, first = await streamed(agent, stub)
        token = (await agent.jwt("a")).svids[0].svid
        await server.aclose()
        # Who comes now shares the spare, and says so to nobody as its own.
        new = await of_another_process(agent, 1)
        assert (new.spiffe_id, await part(agent, CONNECTION)) == (first.spiffe_id, False)
        assert leaf(new).serial_number != leaf(first).serial_number
        # What would have to be signed now cannot be had, and it is not long until that is said.
        assert await status(agent.jwt("another")) == grpc.StatusCode.UNAVAILABLE
        ends = max(leaf(first).not_valid_after_utc, leaf(new).not_valid_after_utc)
        assert await status(drained(call)) == grpc.StatusCode.UNAVAILABLE
        assert datetime.now(UTC) >= leaf(first).not_valid_after_utc
        while datetime.now(UTC) < ends:
            await asyncio.sleep(0.1)
        assert await status(agent.x509()) == grpc.StatusCode.UNAVAILABLE
        assert (await agent.jwt("a")).svids[0].svid == token  # valid for an hour
        back = asyncio.get_running_loop().time()
        await stack.enter_async_context(house.server(default_jwt_svid_ttl="1h"))
        await until(lambda: agent.agent.sync.is_online, LONG)
        assert asyncio.get_running_loop().time() - back < 30
        assert leaf((await agent.x509()).svids[0]).serial_number not in {
            leaf(one).serial_number for one in (first, new)
        }


async def drained(call) -> None:
    async with asyncio.timeout(LONG):
        while await call.read() is not grpc.aio.EOF:
            pass
    raise AssertionError("the stream ended without an error")


@pytest.mark.bears("O02")
async def test_killed_in_the_outage_it_serves_again_until_the_svids_end(house) -> None:
    async with house.server():
        text = await house.settings()
        async with house.agent() as agent:
            file = await joined(agent, house, ttl=20)  # two processes have to start within it
            assert file.stat().st_mode & 0o777 == 0o600
            ends = max(spare.svid.expires_at for spare in agent.agent.svids.spares._held.values())
    socket = house.directory / "a" / "public" / "api.sock"
    async with agent_process(house.directory, text) as first:
        assert (await served(socket)).spiffe_id == "spiffe://example.org/wl/me"
        first.kill()
        await first.wait()
        async with agent_process(house.directory, text) as second:
            assert leaf(await served(socket)).not_valid_after_utc <= ends
            while datetime.now(UTC) < ends - timedelta(seconds=2):
                svid = await served(socket)
                assert datetime.now(UTC) >= ends or leaf(svid).not_valid_after_utc <= ends
                await asyncio.sleep(0.5)
            while datetime.now(UTC) <= ends:
                await asyncio.sleep(0.1)
            assert await served(socket) is None
            assert second.returncode is None
            async with house.server():  # and nothing has to be done by hand
                async with asyncio.timeout(LONG):
                    while (again := await served(socket)) is None:
                        await asyncio.sleep(0.2)
                assert leaf(again).not_valid_after_utc > ends


@pytest.mark.bears("O02")
async def test_a_restart_before_a_server_that_answers_waits_for_its_word(house) -> None:
    async with house.server():
        await house.settings()
        async with house.agent() as agent:
            await joined(agent, house)
            entry = next(iter(agent.agent.cache.entries)).id
        await house.entries.delete(entry)
        async with house.agent() as agent:
            assert await status(agent.x509()) == grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.bears("O02")
async def test_what_was_revoked_is_not_forgotten_by_a_restart_in_the_outage(house) -> None:
    async with house.server():
        await house.settings()
        async with house.agent() as agent:
            await joined(agent, house)
            old = (await agent.x509()).svids[0]
            serial = f"{leaf(old).serial_number:x}"
            await house.revocations.revoke(
                revocations_pb2.RevokeSvidsRequest(serial=revocations_pb2.SerialNumber(serial_number=serial))
            )
            await until(lambda: len(agent.agent.cache.own_bundle.revoked) > 0, LONG)
            await held_spares(agent)
    async with house.agent() as agent:
        message = await agent.x509()
        serials = {one.serial_number for der in message.crl for one in x509.load_der_x509_crl(der)}
        assert leaf(old).serial_number in serials
        assert leaf(message.svids[0]).serial_number not in serials
        with pytest.raises(InvalidSvid) as refused:
            verify_x509_svid(split_der(old.x509_svid), agent.agent.cache.bundles, now=datetime.now(UTC))
        assert refused.value.reason == "svid_revoked"
        assert not agent.agent.sync.is_online


@pytest.mark.bears("O03")
async def test_an_agent_that_expires_and_cannot_attest_again_says_so_and_serves_what_is_valid(house) -> None:
    async with house.server(agent_ttl="4s"):
        await house.settings()
        async with house.agent() as agent:
            await joined(agent, house)
            assert await part(agent, IDENTITY)
            await house.line.cut()
            await until(lambda: agent.agent.node.condition is Condition.EXPIRED, LONG)
            first = (await agent.x509()).svids[0]
            assert not await part(agent, IDENTITY)
        await house.line.mend()
        # Its token is used: it comes up all the same, for those whom it can still serve.
        async with house.agent() as agent:
            await until(lambda: agent.agent.node.condition is Condition.REFUSED, LONG)
            assert (await agent.x509()).svids[0].spiffe_id == first.spiffe_id
            assert (await part(agent, ""), await part(agent, IDENTITY)) == (True, False)
            assert not agent.task.done()


@pytest.mark.bears("O03")
async def test_an_agent_that_expires_and_can_attest_again_does_so_by_itself(house) -> None:
    authority = root()
    (house.directory / "ca.pem").write_bytes(authority.pem)
    written = authority.node().write(house.directory)
    table = NODE.format(key=written["private_key_path"], chain=written["certificate_path"])
    more = f"[server.attestors.node.x509pop]\nca_bundle_path = '{house.directory}/ca.pem'\n"
    async with house.server(more=more, agent_ttl="4s"):
        await house.settings(node=table)
        async with house.agent() as agent:
            await joined(agent, house)
            await house.line.cut()
            await until(lambda: agent.agent.node.condition is Condition.EXPIRED, LONG)
            assert (await agent.x509()).svids
            await house.line.mend()
            await until(lambda: agent.agent.node.condition is Condition.JOINED and agent.agent.sync.is_online, LONG)


@pytest.mark.bears("O04")
@pytest.mark.parametrize("restarted", [False, True])
async def test_a_ban_while_cut_off_is_heard_first_and_deletes_every_key(house, restarted) -> None:
    async with house.server():
        await house.settings()
        async with AsyncExitStack() as stack:
            agent = await stack.enter_async_context(house.agent())
            file = await joined(agent, house)
            node = agent.agent.node.id.path
            if restarted:
                await stack.aclose()
            else:
                await house.line.cut()
                stub = await stack.enter_async_context(agent.workload())
                call, _ = await streamed(agent, stub)
            await house.ban(node)
            if restarted:
                agent = await stack.enter_async_context(house.agent(ready=False))
            else:
                await house.line.mend()
                assert await status(drained(call)) == grpc.StatusCode.PERMISSION_DENIED
            await until(lambda: agent.agent.node.condition is Condition.LOST, LONG)
            assert await status(agent.x509()) in {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE}
            assert not file.exists()
            assert not (agent.settings.private_dir / "identity.json").exists()
            assert agent.agent.svids.spares.kept() == ()
            assert not await part(agent, "")


@pytest.mark.bears("O04")
async def test_an_entry_deleted_while_cut_off_is_withdrawn_at_the_reconnection(house) -> None:
    async with house.server():
        await house.settings()
        async with house.agent() as agent, agent.workload() as stub:
            await joined(agent, house)
            call, _ = await streamed(agent, stub)
            await house.line.cut()
            (entry,) = agent.agent.cache.entries
            await house.entries.delete(entry.id)
            assert (await agent.x509()).svids
            await house.line.mend()
            assert await status(drained(call)) == grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.bears("O04")
async def test_offline_for_longer_than_allowed_it_serves_nobody_until_the_server_is_back(house) -> None:
    async with house.server():
        await house.settings(max_offline="3s")
        async with house.agent() as agent, agent.workload() as stub:
            await joined(agent, house)
            call, _ = await streamed(agent, stub)
            await house.line.cut()
            assert (await agent.x509()).svids
            assert await status(drained(call)) == grpc.StatusCode.UNAVAILABLE
            assert await status(agent.x509()) == grpc.StatusCode.UNAVAILABLE
        # A restart does not begin to count anew.
        async with house.agent(ready=False) as agent:
            await until(lambda: agent.agent.offline._kept is None, LONG)
            assert await status(agent.x509()) == grpc.StatusCode.UNAVAILABLE
            await house.line.mend()
            await until(lambda: agent.agent.is_ready, LONG)
            assert (await agent.x509()).svids


@pytest.mark.bears("O05")
@pytest.mark.parametrize("mode", ["never", "auto", "always"])
async def test_a_new_installation_is_refused_unless_the_first_trust_may_be_settled_anew(house, mode) -> None:
    authority = root()
    (house.directory / "ca.pem").write_bytes(authority.pem)
    written = authority.node().write(house.directory)
    table = NODE.format(key=written["private_key_path"], chain=written["certificate_path"])
    more = f"[server.attestors.node.x509pop]\nca_bundle_path = '{house.directory}/ca.pem'\n"
    async with AsyncExitStack() as stack:
        server = AsyncExitStack()
        await server.enter_async_context(house.server(more=more))
        await house.settings(node=table, rebootstrap_mode=mode, rebootstrap_delay="1s")
        agent = await stack.enter_async_context(house.agent())
        file = await joined(agent, house)
        before = (agent.agent.node.bundle, agent.agent.node.id)
        await server.aclose()
        await stack.enter_async_context(house.server("other", more=more))
        await until(lambda: agent.agent._dialer.is_stranger, LONG)
        assert (await agent.x509()).svids  # of the old one, to their end
        assert agent.agent.node.bundle == before[0]
        if mode == "never":
            await asyncio.sleep(1.5)
            assert ((agent.agent.node.bundle, agent.agent.node.id), file.exists()) == (before, True)
            return
        # What the operator has put there since counts; the old bundle alone would not do.
        await asyncio.sleep(1.2)
        assert agent.agent.node.bundle == before[0]
        await house.publish()
        await until(lambda: agent.agent.sync.is_online, LONG)
        assert agent.agent.node.bundle != before[0]
        assert await status(agent.x509()) == grpc.StatusCode.PERMISSION_DENIED  # nothing of the old estate is left
        await house.register(agent.agent.node.id.path, "/wl/new", ME)
        assert (await agent.x509()).svids[0].spiffe_id == "spiffe://example.org/wl/new"
