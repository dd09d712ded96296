"""Attested is who connected, while it is what it was: the attacks on that, with real processes."""

import asyncio
import os
import shutil
import signal
from pathlib import Path

import grpc
import pytest

from broker._proto.service import Stub
from broker._proto.spiffe import workload_pb2
from broker.agent import workloads as module
from broker.agent.listener import WORKLOAD
from broker.attestation.contract import AttestorFailed
from broker.errors import NotAttested
from broker.spiffe import Selector
from tests.fakes.fake_server import entry_message
from tests.fakes.processes import held_connection, reap, spawn_as
from tests.fakes.running_agent import HEADER, ME, estate, until

needs_root = pytest.mark.root("processes of other users, chosen process ids")
PATH = "/SpiffeWorkloadAPI/FetchX509SVID"
SLEEP = str(Path(shutil.which("sleep")).resolve())


def relayed(held):
    return grpc.aio.insecure_channel(
        f"unix:{held.relay}", options=(("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))
    )


async def fetch(held, seconds: float = 30.0):
    """What the holder of the connection gets: an answer, or the status of its refusal."""
    async with relayed(held) as channel:
        call = channel.unary_stream(PATH, response_deserializer=workload_pb2.X509SVIDResponse.FromString)
        try:
            return await call(b"", metadata=HEADER, timeout=seconds).read()
        except grpc.aio.AioRpcError as error:
            return error.code()


REFUSED = {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAUTHENTICATED}


async def test_the_harness_itself_is_served_while_its_process_lives() -> None:
    """The positive control: without an attack the relay gets the identity."""
    async with estate() as agent, held_connection(agent.socket, agent.directory / "r", "stay") as held:
        assert (await fetch(held)).svids[0].spiffe_id == "spiffe://example.org/wl/me"


@pytest.mark.bears("A09", "A10")
async def test_a_connection_whose_maker_died_gives_nothing() -> None:
    async with estate() as agent, held_connection(agent.socket, agent.directory / "r", "exit") as held:
        await held.act()
        await until(lambda: held.process.returncode is not None)
        assert await fetch(held) in REFUSED
        assert len(agent.agent.sessions) == 0
        assert not agent.server.sessions


@pytest.mark.bears("A10", "V07")
async def test_a_stream_ends_when_its_process_does_and_the_server_is_told() -> None:
    async with (
        estate() as agent,
        held_connection(agent.socket, agent.directory / "r", "exit") as held,
        relayed(held) as channel,
    ):
        call = channel.unary_stream(PATH, response_deserializer=workload_pb2.X509SVIDResponse.FromString)(
            b"", metadata=HEADER
        )
        assert (await call.read()).svids
        await until(lambda: len(agent.server.sessions) == 1)
        began = asyncio.get_running_loop().time()
        await held.act()
        with pytest.raises(grpc.aio.AioRpcError):
            await asyncio.wait_for(call.read(), 2)
        await until(lambda: len(agent.server.ended) == 1, 2)
        assert asyncio.get_running_loop().time() - began < 1
        assert not agent.server.sessions
        await until(lambda: agent.agent.doors.public.connections == 0)
        assert len(agent.agent.doors.public._denials) == 0  # a process that ends is not a process that was refused


@pytest.mark.bears("A05")
@pytest.mark.parametrize("before", ["first call", "later call"])
async def test_a_sibling_does_not_get_the_identity_of_what_its_parent_became(before) -> None:
    async with estate() as agent, held_connection(agent.socket, agent.directory / "r", "exec", SLEEP, "60") as held:
        if before == "later call":
            assert (await fetch(held)).svids  # as what it was, it is entitled
        else:
            await held.act()
            await until(lambda: os.readlink(f"/proc/{held.pid}/exe") == SLEEP)
            assert await fetch(held) == grpc.StatusCode.PERMISSION_DENIED
            assert len(agent.agent.sessions) == 0


@pytest.mark.bears("A05")
async def test_a_stream_ends_when_its_process_becomes_another_program() -> None:
    async with (
        estate() as agent,
        held_connection(agent.socket, agent.directory / "r", "exec", SLEEP, "60") as held,
        relayed(held) as channel,
    ):
        call = channel.unary_stream(PATH, response_deserializer=workload_pb2.X509SVIDResponse.FromString)(
            b"", metadata=HEADER
        )
        assert (await call.read()).svids
        await held.act()
        await until(lambda: os.readlink(f"/proc/{held.pid}/exe") == SLEEP)
        agent.server.put(entry_message("e2", "/wl/two", [ME]))  # there is something new to send, to nobody
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await asyncio.wait_for(call.read(), 30)
        assert (ended.value.code(), ended.value.details()) == (grpc.StatusCode.PERMISSION_DENIED, "no identity issued")
        await until(lambda: len(agent.server.ended) == 1)


@pytest.mark.bears("A05")
async def test_what_a_process_became_is_told_nothing_of_others_either() -> None:
    async with (
        estate() as agent,
        held_connection(agent.socket, agent.directory / "r", "exec", SLEEP, "60") as held,
        relayed(held) as channel,
    ):
        token = (await agent.jwt_by(channel, "a")).svids[0].svid
        ask = workload_pb2.ValidateJWTSVIDRequest(svid=token, audience="a")
        validate = Stub(channel, WORKLOAD).ValidateJWTSVID
        assert (await validate(ask, metadata=HEADER, timeout=30)).spiffe_id == "spiffe://example.org/wl/me"
        await held.act()
        await until(lambda: os.readlink(f"/proc/{held.pid}/exe") == SLEEP)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await validate(ask, metadata=HEADER, timeout=30)
        assert refused.value.code() in REFUSED


@needs_root
@pytest.mark.bears("A11")
async def test_a_process_that_changed_its_user_is_refused() -> None:
    entries = [entry_message("root", "/root", ["unix:uid:0"]), entry_message("low", "/low", ["unix:uid:4001"])]
    async with (
        estate(entries=entries) as agent,
        held_connection(agent.socket, agent.directory / "r", "setuid", "4001") as held,
    ):
        await held.act()
        assert (await held.process.stdout.readline()).strip() == b"done"
        assert await fetch(held) == grpc.StatusCode.PERMISSION_DENIED


@needs_root
@pytest.mark.bears("A11")
async def test_a_process_that_changed_may_come_back_as_what_it_is() -> None:
    entries = [entry_message("root", "/root", ["unix:uid:0"]), entry_message("low", "/low", ["unix:uid:4001"])]
    async with (
        estate(entries=entries) as agent,
        held_connection(agent.socket, agent.directory / "r", "setuid", "4001") as held,
        relayed(held) as channel,
    ):
        call = channel.unary_stream(PATH, response_deserializer=workload_pb2.X509SVIDResponse.FromString)
        assert (await call(b"", metadata=HEADER).read()).svids[0].spiffe_id.endswith("/root")
        await held.act()
        await held.process.stdout.readline()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(b"", metadata=HEADER).read()
        assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
        # A client would refuse to give up on this connection: it is closed, and the next one is attested anew.
        await until(lambda: agent.agent.doors.public.connections == 0)
        await until(lambda: len(agent.server.ended) == 1)


@needs_root
@pytest.mark.bears("A01", "A23")
async def test_each_user_gets_its_own_identity() -> None:
    entries = [entry_message(f"e{uid}", f"/wl/{uid}", [f"unix:uid:{uid}"]) for uid in range(4001, 4009)]
    async with estate(entries=entries) as agent:

        async def one(uid: int) -> None:
            async with held_connection(agent.socket, agent.directory / f"r{uid}", "stay", uid=uid) as held:
                answer = await fetch(held)
                assert [svid.spiffe_id for svid in answer.svids] == [f"spiffe://example.org/wl/{uid}"]

        agent.directory.chmod(0o777)
        await asyncio.gather(*(one(uid) for uid in range(4001, 4009)))
        async with held_connection(agent.socket, agent.directory / "r9", "stay", uid=4999) as held:
            assert await fetch(held) == grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.bears("A08")
async def test_a_process_whose_first_thread_ended_is_refused_cleanly() -> None:
    async with estate() as agent, held_connection(agent.socket, agent.directory / "r", "thread-exit") as held:
        await held.act()
        await until(lambda: "State:\tZ" in Path(f"/proc/{held.pid}/status").read_text())
        assert await fetch(held) in REFUSED


@needs_root
@pytest.mark.bears("A02")
async def test_a_recycled_process_id_inherits_no_connection() -> None:
    async with estate() as agent, held_connection(agent.socket, agent.directory / "r", "exit") as held:
        await held.act()
        await until(lambda: held.process.returncode is not None)
        spawn_as(held.pid, [SLEEP, "60"])  # the victim, under the attacker's number
        try:
            assert await fetch(held) in REFUSED
            assert len(agent.agent.sessions) == 0
        finally:
            reap(held.pid)


@needs_root
@pytest.mark.bears("A02")
async def test_a_process_id_recycled_during_attestation_gives_nothing(monkeypatch) -> None:
    async with estate() as agent, held_connection(agent.socket, agent.directory / "r", "exit") as held:
        reached, go_on = asyncio.Event(), asyncio.Event()
        describe = module.Workloads.describe

        async def slowly(self, process):
            found = await describe(self, process)
            reached.set()
            await go_on.wait()
            return found

        monkeypatch.setattr(module.Workloads, "describe", slowly)
        fetching = asyncio.create_task(fetch(held))
        await reached.wait()
        await held.act()
        await until(lambda: held.process.returncode is not None)
        spawn_as(held.pid, [SLEEP, "60"])
        try:
            go_on.set()
            assert await fetching in REFUSED
            assert len(agent.agent.sessions) == 0
            assert not agent.server.sessions
        finally:
            reap(held.pid)


async def test_an_attestor_that_cannot_tell_refuses_its_caller(monkeypatch) -> None:
    async with estate() as agent:
        real = agent.agent.workloads._attestors

        class Failing:
            name = "failing"

            def __init__(self, error: Exception) -> None:
                self.error = error

            async def attest(self, process):
                raise self.error

        for error in (AttestorFailed("the runtime does not answer"), NotAttested("x"), ValueError("a defect")):
            agent.agent.workloads._attestors = (*real, Failing(error))
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await agent.x509()
            expected = grpc.StatusCode.PERMISSION_DENIED if type(error) is NotAttested else grpc.StatusCode.UNAVAILABLE
            assert refused.value.code() == expected
            if expected == grpc.StatusCode.UNAVAILABLE:
                assert refused.value.details() == "workload attestation failed"
        agent.agent.workloads._attestors = real
        assert (await agent.x509()).svids


async def test_attestors_that_hang_are_given_up(monkeypatch) -> None:
    monkeypatch.setattr(module, "ATTEST_TIMEOUT", 0.1)
    async with estate() as agent:

        class Hanging:
            name = "hanging"

            async def attest(self, process):
                await asyncio.Event().wait()

        agent.agent.workloads._attestors = (Hanging(),)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await agent.x509()
        assert refused.value.details() == "workload attestation failed"


async def test_many_calls_of_one_connection_attest_once() -> None:
    async with estate() as agent, agent.workload() as stub:
        asked = []
        real = agent.agent.workloads._attestors[0]

        class Counting:
            name = "counting"

            async def attest(self, process):
                asked.append(process.pid)
                return await real.attest(process) | {Selector("counting:1")}

        agent.agent.workloads._attestors = (Counting(),)
        request = workload_pb2.JWTSVIDRequest(audience=["a"])
        await asyncio.gather(*(stub.FetchJWTSVID(request, metadata=HEADER) for _ in range(20)))
        (session,) = agent.agent.sessions
        assert session.connections == 1
        await agent.x509()  # another connection of the same process
        assert asked == [os.getpid()]


@pytest.mark.bears("A22")
async def test_no_descriptor_is_left_behind() -> None:
    async with estate() as agent:
        await agent.x509()
        await until(lambda: agent.agent.doors.public.connections == 0)
        before = len(os.listdir("/proc/self/fd"))
        for act in ("exit", "stay"):
            for n in range(5):
                async with held_connection(agent.socket, agent.directory / f"r{act}{n}", act) as held:
                    if n % 2:
                        await fetch(held)
                    await held.act()
        # A connection that never speaks.
        _, writer = await asyncio.open_unix_connection(agent.socket)
        writer.close()
        await writer.wait_closed()
        await until(lambda: agent.agent.doors.public.connections == 0 and len(agent.agent.sessions) == 1)
        await until(lambda: len(os.listdir("/proc/self/fd")) <= before)


async def test_a_session_that_was_given_nothing_is_let_go() -> None:
    async with estate(entries=[entry_message("e1", "/x", ["unix:uid:4294967"])]) as agent:
        with pytest.raises(grpc.aio.AioRpcError):
            await agent.x509()
        await until(lambda: len(agent.agent.sessions) == 0)


async def test_a_stopped_process_keeps_its_session() -> None:
    async with estate() as agent, held_connection(agent.socket, agent.directory / "r", "stay") as held:
        assert (await fetch(held)).svids
        os.kill(held.pid, signal.SIGSTOP)
        await asyncio.sleep(0)
        assert len(agent.agent.sessions) == 1
        os.kill(held.pid, signal.SIGCONT)
