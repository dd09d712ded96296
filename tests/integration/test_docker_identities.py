"""Identities for real containers: a real server and a real node agent with the docker attestor on a real Docker Engine.

The agent's public directory is mounted into the containers; a real client in them fetches X.509-SVIDs over it.
"""

import asyncio
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import grpc.aio
import pytest

from broker._proto.spiffe import workload_pb2
from broker.dev.estate import Estate
from broker.dev.processes import end
from broker.sdk.endpoint import SECURITY_HEADER
from tests.fakes.workload_client import PATH
from tests.integration.docker_engine import PROGRAM, Counting, Engine
from tests.integration.docker_node import CLIENT, Node, node_with_docker

pytestmark = [
    pytest.mark.root("a Docker Engine and a node agent that may read every process"),
    pytest.mark.timeout(180),
]

SOCKET = "/run/broker/api.sock"
ASK_AGAIN = 27.0  # seconds after which, at the earliest, the agent asks about a process again by itself
DENIED = {"error": "PERMISSION_DENIED", "said": "no identity issued"}


class Docked(Node):
    """A node whose agent asks the engine through a socket that counts, and containers that see the agent's socket."""

    def __init__(self, estate: Estate, engine: Engine, counting: Counting, exchange: Path) -> None:
        super().__init__(estate)
        self.engine, self.counting, self.exchange = engine, counting, exchange

    def start(self, *options: str, image: str = "probe:1") -> str:
        """Start a container with the agent's socket in it."""
        mounts = ("-v", f"{self.socket.parent}:/run/broker:ro", "-v", f"{self.exchange}:/exchange")
        return self.engine.program(*mounts, *options, image=image)

    def fetch(self, container: str, *options: str) -> dict:
        """What a new process in the container is given, without the time that it took."""
        told = json.loads(self.engine("exec", *options, container, PROGRAM, "-m", CLIENT, "fetch", SOCKET))
        assert told.pop("seconds") < 15
        return told

    def fetch_outside(self) -> dict:
        """What a new process in no container is given."""
        command = [sys.executable, "-m", CLIENT, "fetch", str(self.socket)]
        told = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
        del told["seconds"]
        return told

    @asynccontextmanager
    async def connection_of(self, container: str) -> AsyncIterator["HandedOut"]:
        """A connection that a process in the container made and handed out of it, in the hands of this process."""
        with tempfile.TemporaryDirectory(dir=self.exchange) as name, socket.socket(socket.AF_UNIX) as waiting:
            directory = Path(name)
            waiting.bind(str(directory / "receiver"))
            waiting.listen()
            waiting.settimeout(30)
            inside = f"/exchange/{directory.name}/receiver"
            self.engine("exec", "-d", container, PROGRAM, "-m", CLIENT, "hand-over", SOCKET, inside)
            accepted, _ = await asyncio.to_thread(waiting.accept)
            with accepted:
                _, (fd,), _, _ = socket.recv_fds(accepted, 1, 1)
            async with HandedOut.over(socket.socket(fileno=fd), directory / "relay") as handed_out:
                yield handed_out


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class HandedOut:
    """A connection to the agent that belongs to another process, and a gRPC channel over it, which connects once."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self.is_closed = asyncio.Event()  # by the agent

    @classmethod
    @asynccontextmanager
    async def over(cls, connection: socket.socket, relay: Path) -> AsyncIterator["HandedOut"]:
        options = (("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1))
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(relay))
            listening.listen(1)
            listening.setblocking(False)
            async with grpc.aio.insecure_channel(f"unix:{relay}", options=options) as channel:
                it = cls(channel)
                joined = asyncio.create_task(it._join(connection, listening))
                yield it
            joined.cancel()
            await asyncio.wait([joined])

    def stream(self) -> grpc.aio.UnaryStreamCall:
        call = self._channel.unary_stream(PATH, response_deserializer=workload_pb2.X509SVIDResponse.FromString)
        return call(b"", metadata=SECURITY_HEADER)

    async def _join(self, connection: socket.socket, listening: socket.socket) -> None:
        accepted, _ = await asyncio.get_running_loop().sock_accept(listening)
        listening.close()
        (from_client, to_client), (from_agent, to_agent) = [
            await asyncio.open_unix_connection(sock=one) for one in (accepted, connection)
        ]
        onward = asyncio.create_task(_pump(from_client, to_agent))
        try:
            await _pump(from_agent, to_client)
            self.is_closed.set()
        finally:
            onward.cancel()
            for one in (to_client, to_agent):
                one.close()
            await asyncio.gather(onward, to_client.wait_closed(), to_agent.wait_closed(), return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()


async def _ends(connection: HandedOut, stream: grpc.aio.UnaryStreamCall) -> None:
    """The stream and the connection end, and whoever holds the connection gets nothing more of it."""
    async with asyncio.timeout(2):
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await stream.read()
        await connection.is_closed.wait()
    assert ended.value.code() in {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE}
    with pytest.raises(grpc.aio.AioRpcError):
        await asyncio.wait_for(connection.stream().read(), 5)


@pytest.fixture(scope="module")
def node(engine) -> Iterator[Docked]:
    counting = Counting(engine)
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as exchange,
        counting.serving(),
        node_with_docker(counting.socket) as running,
    ):
        yield Docked(running.estate, engine, counting, Path(exchange))


@pytest.mark.bears("A01", "A13")
async def test_each_container_gets_its_own_identity_and_a_third_none(node) -> None:
    orders = await node.register("/one/orders", "docker:label:one:orders")
    billing = await node.register("/one/billing", "docker:label:one:billing")
    a, b = node.start("--label", "one=orders"), node.start("--label", "one=billing")
    c = node.start()
    assert node.fetch(a) == {"ids": [orders]}
    assert node.fetch(b) == {"ids": [billing]}
    assert node.fetch(c) == DENIED
    # Another value, another case, and the label as a variable: no.
    for near in (("--label", "one=order"), ("--label", "One=orders"), ("--env", "one=orders")):
        assert node.fetch(node.start(*near)) == DENIED
    assert node.fetch_outside() == DENIED


@pytest.mark.bears("A18")
async def test_an_image_that_carries_the_label_is_not_given_its_identity(node) -> None:
    payments = await node.register("/two/payments", "docker:label:app:payments")
    await node.register("/two/variable", "docker:env:ROLE=payments")
    spoofing = node.start()
    assert node.engine.inspect(spoofing)["Config"]["Labels"]["app"] == "payments"
    assert node.fetch(spoofing) == DENIED
    tar = node.engine.exported(spoofing)
    node.engine("import", "-", "plain:1", input=tar)
    assert node.fetch(node.start("--label", "app=payments", image="plain:1")) == {"ids": [payments]}


@pytest.mark.bears("A09", "A10")
async def test_a_container_replaced_by_one_of_the_same_name(node) -> None:
    old = await node.register("/three/old", "docker:label:three:old")
    new = await node.register("/three/new", "docker:label:three:new")
    node.start("--name", "three", "--label", "three=old")
    assert node.fetch("three") == {"ids": [old]}
    async with node.connection_of("three") as connection:
        stream = connection.stream()
        assert _ids(await stream.read()) == [old]
        await asyncio.to_thread(node.engine, "rm", "-f", "three")
        await _ends(connection, stream)
        node.start("--name", "three", "--label", "three=new")
        assert [node.fetch("three") for _ in range(2)] == [{"ids": [new]}] * 2


@pytest.mark.bears("A09", "A10")
async def test_a_stopped_container_loses_its_stream_and_leaves_nothing(node) -> None:
    mine = await node.register("/four", "docker:label:four:yes")
    container = node.start("--label", "four=yes")
    async with node.connection_of(container) as connection:
        stream = connection.stream()
        assert _ids(await stream.read()) == [mine]
        await asyncio.to_thread(node.engine, "stop", "-t", "0", container)
        await _ends(connection, stream)
        assert node.fetch_outside() == DENIED
    assert node.engine.tried("exec", container, PROGRAM).returncode != 0
    node.engine("start", container)
    assert node.fetch(container) == {"ids": [mine]}


async def test_docker_exec_as_another_user(node) -> None:
    anybody = await node.register("/five/anybody", "docker:label:five:yes")
    root = await node.register("/five/root", "docker:label:five:yes", "unix:uid:0")
    user = await node.register("/five/user", "docker:label:five:yes", "unix:uid:1234")
    container = node.start("--label", "five=yes")
    assert node.fetch(container) == {"ids": [anybody, root]}
    assert node.fetch(container, "-u", "1234:1234") == {"ids": [anybody, user]}
    assert node.fetch(container, "-u", "4321:4321") == {"ids": [anybody]}


async def test_the_image_by_name_and_by_content(node) -> None:
    engine = node.engine
    engine("tag", "probe:1", "registry.test/six:1")
    digest = engine.digest()
    named = await node.register("/six/named", "docker:image_id:registry.test/six:1")
    content = await node.register("/six/content", "docker:label:six:yes", f"docker:image_config_digest:{digest}")
    other = f"sha256:{'0' * 64}"
    await node.register("/six/other", "docker:label:six:yes", f"docker:image_config_digest:{other}")
    assert node.fetch(node.start("--label", "six=yes", image="registry.test/six:1")) == {"ids": [content, named]}
    assert node.fetch(node.start("--label", "six=yes")) == {"ids": [content]}
    # The tag moves to another image: the name holds, the content does not.
    moved = node.start("--label", "six=yes")
    engine("commit", "--change", "LABEL moved=1", moved, "registry.test/six:1")
    assert node.fetch(node.start("--label", "six=yes", image="registry.test/six:1")) == {"ids": [named]}


@pytest.mark.bears("A17")
async def test_labels_of_one_text_are_not_confused(node) -> None:
    mine = await node.register("/seven", "docker:label:seven:b:c")
    assert node.fetch(node.start("--label", "seven=b:c")) == {"ids": [mine]}
    assert node.fetch(node.start("--label", "seven:b=c")) == DENIED
    assert node.fetch(node.start("--label", "x=seven:b:c", "--label", "seven=b")) == DENIED


async def test_the_engine_is_asked_once_for_a_process(node) -> None:
    mine = await node.register("/eight", "docker:label:eight:yes")
    container = node.start("--label", "eight=yes")
    began = time.monotonic()
    async with node.connection_of(container) as connection:
        for stream in [connection.stream() for _ in range(10)]:
            assert _ids(await stream.read()) == [mine]
    asked, by_the_clock = node.counting.about(container), int((time.monotonic() - began) / ASK_AGAIN)
    assert 1 <= asked <= 1 + by_the_clock
    # Another process, on five connections one after the other.
    command = ("exec", "-i", container, PROGRAM, "-m", CLIENT, "fetch-each", SOCKET)
    told = [json.loads(line) for line in node.engine(*command, input=b"{}\n" * 5).splitlines()]
    assert [one["ids"] for one in told] == [[mine]] * 5
    by_the_clock = int((time.monotonic() - began) / ASK_AGAIN)  # on a slow machine
    assert 2 <= node.counting.about(container) <= 2 + 2 * by_the_clock


async def test_a_container_finds_the_socket_of_an_agent_that_was_started_again(node) -> None:
    mine = await node.register("/nine", "docker:label:nine:yes")
    container = node.start("--label", "nine=yes")
    assert node.fetch(container) == {"ids": [mine]}
    await asyncio.to_thread(end, node.estate.require_record().parts["agent"])
    node.estate._children["agent"].wait()
    await node.estate.up(lambda line: None)
    assert node.fetch(container) == {"ids": [mine]}


def _ids(message: workload_pb2.X509SVIDResponse) -> list[str]:
    return [one.spiffe_id for one in message.svids]
