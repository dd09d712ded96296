"""A real agent in a process of its own, before a fake server in this one."""

import asyncio
import shutil
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path

import grpc

from broker._proto.grpc.health.v1 import health_pb2
from broker._proto.service import Stub
from broker._proto.spiffe import workload_pb2
from broker.agent.listener import HEALTH
from tests.fakes.fake_server import FakeServer, entry_message
from tests.fakes.processes import agent_process
from tests.fakes.running_agent import HEADER, ME, until

PATH = "/SpiffeWorkloadAPI/FetchX509SVID"


class Running:
    def __init__(self, process, server: FakeServer, directory: Path) -> None:
        self.process, self.server, self.directory = process, server, directory
        self.socket = directory / "agent" / "public" / "api.sock"

    def channel(self, path: Path | None = None):
        return grpc.aio.insecure_channel(
            f"unix:{path or self.socket}", options=(("grpc.use_local_subchannel_pool", 1),)
        )

    async def fetch(self, path: Path | None = None):
        async with self.channel(path) as channel:
            call = channel.unary_stream(PATH, response_deserializer=workload_pb2.X509SVIDResponse.FromString)
            try:
                return await call(b"", metadata=HEADER, timeout=30).read()
            except grpc.aio.AioRpcError as error:
                return error.code()


@asynccontextmanager
async def running(*, ready: bool = True, **settings):
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    directory.chmod(0o755)
    try:
        async with FakeServer(directory) as server:
            server.entries["e1"] = entry_message("e1", "/wl/me", [ME])
            async with agent_process(directory, agent_text(server, **settings)) as process:
                it = Running(process, server, directory)
                await until(lambda: it.socket.exists() or process.returncode is not None, 20)
                if ready and process.returncode is None:
                    async with it.channel() as channel:
                        watching = Stub(channel, HEALTH).Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True)
                        while (await asyncio.wait_for(watching.read(), 30)).status != 1:
                            pass
                yield it
    finally:
        shutil.rmtree(directory)


def agent_text(server: FakeServer, **settings) -> str:
    """The agent's settings as TOML: it joins this server, and keeps everything in the server's directory."""
    values = {
        "trust_domain": "example.org",
        "server_port": server.port,
        "runtime_dir": str(server.directory / "agent"),
        "trust_bundle_path": str(server.trust_file()),
        "join_token": "token-1",
        "first_identity_wait": "200ms",
    }
    return "[agent]\n" + "".join(f"{name} = {value!r}\n" for name, value in (values | settings).items())
