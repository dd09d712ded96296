"""Nobody asks and nothing is sent, and yet what is no longer true ends: other programs, other labels, silent attestors."""

import asyncio
import os
import shutil
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from broker._proto.spiffe import workload_pb2
from broker.agent import rounds as module
from broker.agent.answers import Answer, asked_again
from broker.agent.rounds import FULL_LOOKS_PER_SECOND, LOOKS_PER_SECOND, SLICE, Rounds
from broker.attestation.contract import AttestorFailed, AttestorUnavailable
from broker.attestation.process import Process
from broker.clock import SystemClock
from broker.errors import NotAttested
from broker.spiffe import Selector
from tests.fakes.fake_server import entry_message
from tests.fakes.processes import held_connection
from tests.fakes.running_agent import HEADER, ME, estate, until

PATH = "/SpiffeWorkloadAPI/FetchX509SVID"
SLEEP = str(Path(shutil.which("sleep")).resolve())
BLUE, GREEN = "labels:colour:blue", "labels:colour:green"
OUTAGE = AttestorUnavailable("the runtime restarts", code="runtime_unreachable")


class Labels:
    """A runtime whose labels can be changed while a container runs."""

    name = "labels"

    def __init__(self, *labels: str) -> None:
        self.labels = labels
        self.error: Exception | None = None
        self.asked = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def attest(self, process):
        self.asked += 1
        labels = self.labels
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return frozenset(map(Selector, labels))


@asynccontextmanager
async def labelled(*labels: str, **settings):
    """An agent with entries for two labels, and the runtime that gives them."""
    entries = [entry_message("blue", "/blue", [ME, BLUE]), entry_message("green", "/green", [ME, GREEN])]
    async with estate(entries=entries, **settings) as agent:
        runtime = Labels(*labels)
        agent.agent.workloads._attestors = (*agent.agent.workloads._attestors, runtime)
        yield agent, runtime


@asynccontextmanager
async def streaming(agent):
    async with agent.workload() as stub:
        call = stub.FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=HEADER)
        yield call
        call.cancel()


def paths(answer) -> list[str]:
    return [svid.spiffe_id.rpartition("/")[2] for svid in answer.svids]


async def asked_anew(agent) -> None:
    """The next round of questions, now."""
    for session in agent.agent.sessions:
        session.ask_at = 0.0
    await agent.agent.rounds.ask()


# ---- labels


@pytest.mark.bears("A17", "V07")
async def test_an_idle_stream_hears_of_a_changed_label_by_itself() -> None:
    async with labelled(BLUE, attest_again_every="1s") as (agent, runtime), streaming(agent) as stream:
        assert paths(await stream.read()) == ["blue"]
        await until(lambda: len(agent.server.sessions) == 1)
        runtime.labels = (GREEN,)
        assert paths(await asyncio.wait_for(stream.read(), 30)) == ["green"]
        await until(lambda: agent.server.causes == ["SESSION_END_SELECTORS_CHANGED"])
        await until(lambda: [one.entry_id for one in agent.server.sessions.values()] == ["green"])


async def test_a_label_more_is_an_identity_more_and_the_first_is_kept() -> None:
    async with labelled(BLUE) as (agent, runtime), streaming(agent) as stream:
        first = await stream.read()
        runtime.labels = (BLUE, GREEN)
        await asked_anew(agent)
        both = await asyncio.wait_for(stream.read(), 30)
        assert paths(both) == ["blue", "green"]
        assert both.svids[0].x509_svid == first.svids[0].x509_svid
        assert agent.server.ended == []
        # Whatever concerns the new label wakes the stream from now on.
        agent.server.put(entry_message("more", "/more", [GREEN, ME]))
        assert "more" in paths(await asyncio.wait_for(stream.read(), 30))


async def test_the_last_label_that_goes_ends_the_stream() -> None:
    async with labelled(BLUE) as (agent, runtime), streaming(agent) as stream:
        await stream.read()
        token = await agent.jwt("a")
        assert token.svids
        runtime.labels = ()
        await asked_anew(agent)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await asyncio.wait_for(stream.read(), 30)
        assert (ended.value.code(), ended.value.details()) == (grpc.StatusCode.PERMISSION_DENIED, "no identity issued")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await agent.jwt("a")  # also the one that is kept for the same audience
        assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
        await until(lambda: agent.server.causes == ["SESSION_END_SELECTORS_CHANGED"])


async def test_nothing_is_asked_before_its_time() -> None:
    async with labelled(BLUE) as (agent, runtime), streaming(agent) as stream:
        await stream.read()
        await agent.agent.rounds.ask()
        await agent.x509()
        assert runtime.asked == 1


async def test_a_process_that_comes_back_later_is_what_it_is_then() -> None:
    async with labelled(BLUE) as (agent, runtime):
        assert paths(await agent.x509()) == ["blue"]
        await until(lambda: agent.agent.doors.public.connections == 0)
        runtime.labels = (GREEN,)
        (session,) = agent.agent.sessions
        session.ask_at = 0.0
        assert paths(await agent.x509()) == ["green"]
        # Its connections are gone again: it is asked about less often, but it is.
        await until(lambda: session.connections == 0)
        runtime.labels = ()
        await asked_anew(agent)
        await until(lambda: len(agent.agent.sessions) == 0)
        await until(lambda: agent.server.causes == ["SESSION_END_SELECTORS_CHANGED"] * 2)


async def test_one_without_connections_rests_longer() -> None:
    async with labelled(BLUE) as (agent, runtime):
        await agent.x509()
        await until(lambda: agent.agent.doors.public.connections == 0)
        (session,) = agent.agent.sessions
        await until(lambda: session.connections == 0)
        session.ask_at = SystemClock().monotonic() - 1
        await agent.agent.rounds.ask()
        assert runtime.asked == 1


# ---- attestors that fail


@pytest.mark.bears("A16")
async def test_a_runtime_that_restarts_takes_nothing_away() -> None:
    async with labelled(BLUE) as (agent, runtime), streaming(agent) as stream:
        await stream.read()
        runtime.error = OUTAGE
        await asked_anew(agent)
        await asked_anew(agent)
        assert runtime.asked == 3
        assert paths(await agent.x509()) == ["blue"]
        runtime.error, runtime.labels = None, (GREEN,)
        await asked_anew(agent)
        assert paths(await asyncio.wait_for(stream.read(), 30)) == ["green"]


@pytest.mark.bears("A16")
async def test_a_runtime_that_stays_away_ends_what_it_vouched_for() -> None:
    async with labelled(BLUE) as (agent, runtime), streaming(agent) as stream:
        await stream.read()
        runtime.error = OUTAGE
        (session,) = agent.agent.sessions
        await asked_anew(agent)
        assert not session.is_ended
        session.vouched_at -= agent.settings.attestors_bridged_for.total_seconds()
        await asked_anew(agent)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await asyncio.wait_for(stream.read(), 30)
        assert ended.value.code() == grpc.StatusCode.PERMISSION_DENIED
        await until(lambda: agent.server.causes == ["SESSION_END_ATTESTATION_LAPSED"])
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await agent.x509()
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE  # it may ask again


@pytest.mark.bears("A15", "A16")
async def test_a_runtime_that_says_no_is_believed_at_once() -> None:
    async with labelled(BLUE) as (agent, runtime), streaming(agent) as stream:
        await stream.read()
        runtime.error = AttestorFailed("the runtime does not know the container", code="container_unknown")
        await asked_anew(agent)
        with pytest.raises(grpc.aio.AioRpcError):
            await asyncio.wait_for(stream.read(), 30)
        await until(lambda: agent.server.causes == ["SESSION_END_ATTESTATION_REFUSED"])
        await until(lambda: agent.agent.doors.public.connections == 0)


def test_what_is_known_to_be_wrong_comes_before_what_is_not_known() -> None:
    def of(name: str, *texts: str, error=None) -> Answer:
        return Answer(name, frozenset(map(Selector, texts)), error)

    before = (of("a", "a:1"), of("b", "b:1"))
    refusal = AttestorFailed("no")
    assert asked_again(before, (of("a", "a:2"), of("b", error=OUTAGE)), may_bridge=True) == (of("a", "a:2"), before[1])
    for may_bridge, told, expected in (
        (False, (of("a", "a:2"), of("b", error=OUTAGE)), OUTAGE),
        (True, (of("a", error=OUTAGE), of("b", error=refusal)), refusal),
        (False, (of("a", error=OUTAGE), of("b", error=refusal)), refusal),
        (True, (of("a", "a:2"), of("b", error=NotAttested("x"))), NotAttested),
        (True, (of("a", "a:1"), of("b", "b:1"), of("c", error=OUTAGE)), OUTAGE),  # it never answered
    ):
        with pytest.raises(NotAttested) as raised:
            asked_again(before, told, may_bridge=may_bridge)
        assert raised.value is expected or type(raised.value) is expected


async def test_a_session_that_ends_while_it_is_asked_about_is_let_go_once() -> None:
    async with (
        labelled(BLUE) as (agent, runtime),
        held_connection(agent.socket, agent.directory / "r", "exit") as held,
        streaming_of(held) as stream,
    ):
        assert paths(await stream.read()) == ["blue"]
        before = len(os.listdir("/proc/self/fd"))
        (session,) = agent.agent.sessions
        runtime.gate.clear()
        asking = asyncio.create_task(asked_anew(agent))
        await until(lambda: runtime.asked == 2)
        waiting = asyncio.create_task(agent.agent.workloads.attest_again(session))
        await held.act()
        await until(lambda: session.is_ended)
        os.fstat(session.process._dir)  # still this process's: the attestors are looking through it
        runtime.gate.set()
        await asking
        await waiting
        assert runtime.asked == 2  # nobody is asked through descriptors that are another's by now
        with pytest.raises(grpc.aio.AioRpcError):
            await stream.read()
        await until(lambda: len(os.listdir("/proc/self/fd")) < before)


# ---- processes that change while nobody asks


@asynccontextmanager
async def streaming_of(held):
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))
    async with grpc.aio.insecure_channel(f"unix:{held.relay}", options=options) as channel:
        yield channel.unary_stream(PATH, response_deserializer=workload_pb2.X509SVIDResponse.FromString)(
            b"", metadata=HEADER
        )


@pytest.mark.bears("A05")
async def test_an_idle_stream_ends_when_its_process_becomes_another_program() -> None:
    async with (
        estate() as agent,
        held_connection(agent.socket, agent.directory / "r", "exec", SLEEP, "60") as held,
        streaming_of(held) as stream,
    ):
        assert (await stream.read()).svids
        await until(lambda: len(agent.server.sessions) == 1)
        await held.act()
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await asyncio.wait_for(stream.read(), 30)
        assert ended.value.code() in {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE}
        await until(lambda: agent.server.causes == ["SESSION_END_PROCESS_CHANGED"])
        await until(lambda: agent.agent.doors.public.connections == 0)
        assert len(agent.agent.sessions) == 0


@pytest.mark.root("a process that gives up its user")
@pytest.mark.bears("A11")
async def test_an_idle_connection_ends_when_its_process_changes_its_user() -> None:
    async with (
        estate() as agent,
        held_connection(agent.socket, agent.directory / "r", "setuid", "4001") as held,
        streaming_of(held) as stream,
    ):
        assert (await stream.read()).svids
        await until(lambda: len(agent.server.sessions) == 1)
        stream.cancel()  # no stream is left, and the connection stands
        await held.act()
        await until(lambda: agent.server.causes == ["SESSION_END_PROCESS_CHANGED"])
        await until(lambda: agent.agent.doors.public.connections == 0)


@pytest.mark.root("a control group of one's own")
@pytest.mark.bears("A15")
async def test_a_stream_ends_when_its_process_is_moved_to_another_control_group() -> None:
    group = next(
        (one for one in (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup")) if (one / "cgroup.procs").exists()), None
    )
    if group is None:
        pytest.skip("no control group file system is mounted")
    group /= f"broker-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"a control group cannot be made here: {error.strerror}")
    try:
        async with (
            estate() as agent,
            held_connection(agent.socket, agent.directory / "r", "stay") as held,
            streaming_of(held) as stream,
        ):
            assert (await stream.read()).svids
            (group / "cgroup.procs").write_text(str(held.pid))
            with pytest.raises(grpc.aio.AioRpcError):
                await asyncio.wait_for(stream.read(), 30)
            await until(lambda: len(agent.agent.sessions) == 0)
    finally:
        group.rmdir()


async def test_an_entry_that_goes_while_its_svid_is_signed_leaves_no_session_at_the_server() -> None:
    async with estate() as agent, streaming(agent) as stream:
        agent.server.sign_gate.clear()
        reading = asyncio.create_task(stream.read())
        await until(lambda: agent.server.batches)
        agent.agent.cache.apply(deleted=["e1"])  # the server signs all the same
        (session,) = agent.agent.sessions
        agent.agent.sessions.entries(session)  # as another stream of the same process would
        agent.server.sign_gate.set()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await reading
        assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
        await until(lambda: agent.agent.reports.is_settled)
        assert agent.server.sessions == {}


# ---- bounded


class Idle:
    """A session as the rounds see it."""

    is_ended = False

    def __init__(self, number: int) -> None:
        self.checked_at = float(number)


class Looks:
    def __init__(self) -> None:
        self.seen: list[tuple[Idle, bool]] = []

    def look(self, session, *, fully: bool) -> None:
        self.seen.append((session, fully))


@pytest.mark.parametrize("count", [0, 1, 120, 10_000])
def test_a_round_is_cut_into_slices_and_full_looks_are_rationed(count: int) -> None:
    sessions, looks = [Idle(n) for n in range(count)], Looks()
    rounds = Rounds(looks, sessions, SystemClock(), 30.0)
    slices = rounds.look_slices()
    assert slices
    assert all(len(one) <= SLICE for one in slices)
    for one in slices:
        rounds.look_at(one)
    assert [session for session, _ in looks.seen] == sessions
    full = [session for session, fully in looks.seen if fully]
    # In proportion to the time that the round takes; those looked at longest ago.
    assert full == sessions[: int(FULL_LOOKS_PER_SECOND * max(1.0, count / LOOKS_PER_SECOND))]


async def test_questions_are_rationed_and_the_longest_overdue_comes_first(monkeypatch) -> None:
    monkeypatch.setattr(module, "ASKED_PER_SECOND", 3)
    asked = []

    class Due:
        connections = 1

        def __init__(self, ask_at: float) -> None:
            self.ask_at = ask_at

    class Answers:
        def is_due(self, session, now: float) -> bool:
            return now >= session.ask_at

        async def attest_again(self, session) -> None:
            asked.append(session.ask_at)

    later = SystemClock().monotonic() + 1000
    await Rounds(Answers(), [Due(at) for at in (5.0, later, 1.0, 4.0, 3.0)], SystemClock(), 30.0).ask()
    assert sorted(asked) == [1.0, 3.0, 4.0]


def test_the_cheap_look_needs_no_reading() -> None:
    """What makes a round cheap: no file of /proc is read for it."""
    process = Process.of_pid(os.getpid())
    try:
        read = []
        original = os.read
        os.read = lambda *args: read.append(args) or original(*args)
        try:
            process.still_there()
        finally:
            os.read = original
        assert read == []
    finally:
        process.close()
