"""How often the runtime is asked: once for a process, however it calls. An agent in this process, a fake runtime, no root."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from attestors.workload.docker import DockerAttestor, DockerSettings
from broker._proto.spiffe import workload_pb2
from broker.attestation.catalogue import OUR_DISTRIBUTION, Catalogue, Offer, installed
from broker.attestation.process import Process
from broker.spiffe import Selector
from tests.fakes.fake_server import entry_message
from tests.fakes.processes import held_connection
from tests.fakes.running_agent import HEADER, RunningAgent, estate, until
from tests.fakes.runtime import FakeMachine, FakeRuntime, answer, inspected

ID = "0123456789abcdef" * 4
QUESTION = f"/containers/{ID}/json"
DOCKER, PODMAN = f"/system.slice/docker-{ID}.scope", f"/machine.slice/libpod-{ID}.scope/container"
CALLERS = 20


def in_container(machine: FakeMachine, place: str) -> Catalogue:
    """Offers the docker attestor on a machine where every caller is in one container."""

    class InContainer(DockerAttestor):
        def __init__(self, settings: DockerSettings) -> None:
            super().__init__(settings, machine.node())

        async def attest(self, process: Process) -> frozenset[Selector]:
            return await super().attest(machine.put(process, place))

    return Catalogue(
        offers=lambda group: [
            *(one for one in installed(group) if one.name != "docker"),
            Offer("docker", OUR_DISTRIBUTION, lambda: InContainer),
        ]
    )


@pytest.fixture
def runtime() -> Iterator[FakeRuntime]:
    with FakeRuntime() as fake:
        fake.containers[ID] = inspected(ID, pid=os.getpid(), Labels={"app": "orders"})
        yield fake


@asynccontextmanager
async def agent_with(runtime: FakeRuntime, directory: Path, place: str = DOCKER) -> AsyncIterator[RunningAgent]:
    machine = FakeMachine(directory / "cgroup")
    machine.top.mkdir()
    machine.members[os.getpid()] = place  # the container's first process, as the runtime says
    async with estate(
        entries=[entry_message("e1", "/orders", ["docker:label:app:orders"])],
        catalogue=in_container(machine, place),
        attest_again_every="1h",  # not by the clock, here
        attestors={
            "workload": {"unix": {}, "docker": {"docker_socket_path": runtime.url, "podman_socket_path": runtime.url}}
        },
    ) as agent:
        yield agent


def waiting(agent: RunningAgent) -> int:
    """How many connections wait to be attested."""
    return sum(one.caller.attesting.locked() for one in agent.agent.doors.public._listener._open)


async def call(agent: RunningAgent, number: int) -> None:
    """One connection with a stream, a call of another method, and a stream again."""
    async with agent.workload() as stub:
        for stream in [stub.FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=HEADER) for _ in range(2)]:
            assert [one.spiffe_id for one in (await stream.read()).svids] == ["spiffe://example.org/orders"]
        request = workload_pb2.JWTSVIDRequest(audience=[f"a{number}"])
        assert (await stub.FetchJWTSVID(request, metadata=HEADER)).svids


@pytest.mark.parametrize("place", [DOCKER, PODMAN], ids=["docker", "podman"])
async def test_one_question_for_all_calls_of_a_process(runtime, tmp_path, place: str) -> None:
    go_on = threading.Event()
    runtime.faults[QUESTION] = lambda: _after(go_on, runtime)
    async with agent_with(runtime, tmp_path, place) as agent:
        calls = [asyncio.create_task(call(agent, number)) for number in range(CALLERS)]
        # All of them are connected and wait before the runtime has answered the first one.
        await until(lambda: waiting(agent) == CALLERS and runtime.requests)
        go_on.set()
        await asyncio.gather(*calls)
        for number in range(3):
            await call(agent, number)  # on connections of their own
        assert runtime.requests.count(QUESTION) == 1
        # Another process is another question.
        async with (
            held_connection(agent.socket, agent.directory / "r", "stay") as held,
            grpc.aio.insecure_channel(f"unix:{held.relay}") as channel,
        ):
            await channel.unary_stream("/SpiffeWorkloadAPI/FetchX509SVID")(b"", metadata=HEADER).read()
        assert runtime.requests.count(QUESTION) == 2


async def test_who_asked_first_may_leave(runtime, tmp_path) -> None:
    go_on = threading.Event()
    runtime.faults[QUESTION] = lambda: _after(go_on, runtime)
    async with agent_with(runtime, tmp_path) as agent:
        first = asyncio.create_task(call(agent, 0))
        await until(lambda: runtime.requests)
        second = asyncio.create_task(call(agent, 1))
        await until(lambda: waiting(agent) == 2)
        first.cancel()
        await until(lambda: waiting(agent) == 1 and runtime.requests.count(QUESTION) == 2)
        go_on.set()
        await second
        assert not agent.agent.workloads._asking


async def test_a_refusal_is_heard_by_all_who_waited_and_asked_anew_by_who_comes_later(runtime, tmp_path) -> None:
    go_on = threading.Event()

    def fails() -> Iterator[bytes]:
        go_on.wait()
        yield answer(b"{}", "500 Internal Server Error")

    runtime.faults[QUESTION] = fails
    async with agent_with(runtime, tmp_path) as agent:
        calls = [asyncio.create_task(call(agent, number)) for number in range(CALLERS)]
        await until(lambda: waiting(agent) == CALLERS)
        go_on.set()
        errors = await asyncio.gather(*calls, return_exceptions=True)
        assert {error.code() for error in errors} == {grpc.StatusCode.UNAVAILABLE}
        runtime.faults.clear()
        await call(agent, 0)


def _after(go_on: threading.Event, runtime: FakeRuntime) -> Iterator[bytes]:
    go_on.wait()
    yield runtime._truth(QUESTION)
