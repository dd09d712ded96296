"""A container runtime on a Unix socket that can answer wrongly in chosen ways, and a machine whose control groups it made."""

import json
import os
import shutil
import socketserver
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from broker.attestation.containers import Node
from broker.attestation.process import Process

IMAGE = "a" * 64
JSON_SIZE_OF_ONE_PIECE = 2048  # Go's server sends longer answers in chunks

Pieces = Iterator[bytes]


def inspected(container: str, *, pid: int = 0, running: bool = True, **config: object) -> dict:
    """What Docker says of a container, as far as it matters."""
    return {
        "Id": container,
        "State": {"Status": "running" if running else "exited", "Running": running, "Paused": False, "Pid": pid},
        "Image": f"sha256:{IMAGE}",
        "Name": "/x",
        "HostConfig": {"CgroupnsMode": "host", "MemorySwappiness": None, "CpuShares": -1},
        "Config": {"Image": "probe:1", "Labels": {}, "Env": [], **config},
    }


def answer(body: bytes, status: str = "200 OK") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def chunked(body: bytes, size: int = 700) -> bytes:
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    framed = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + framed + b"0\r\n\r\n"


class FakeRuntime:
    """Serves ``containers`` and ``images``; ``faults`` maps the start of a path to the pieces to send instead."""

    def __init__(self) -> None:
        self.containers: dict[str, object] = {}
        self.images: dict[str, object] = {IMAGE: {"Id": f"sha256:{IMAGE}", "Config": {"Labels": None, "Env": None}}}
        self.requests: list[str] = []
        self.faults: dict[str, Callable[[], Pieces]] = {}
        self.released = threading.Event()
        self._directory = Path(tempfile.mkdtemp(dir="/tmp"))
        self.path = self._directory / "s"
        runtime = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                runtime._handle(self)

        class Server(socketserver.ThreadingUnixStreamServer):
            daemon_threads = True
            request_queue_size = 64

        self._server = Server(str(self.path), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        shutil.rmtree(self._directory)

    @property
    def url(self) -> str:
        return f"unix://{self.path}"

    def fault(self, pieces: bytes, path: str = "/containers/") -> None:
        """Send exactly this, then close."""
        self.faults[path] = lambda: iter([pieces])

    def hang(self, path: str = "/containers/") -> None:
        """Say nothing until the end."""

        def silence() -> Pieces:
            self.released.wait()
            yield b""

        self.faults[path] = silence

    def drip(self, pieces: Iterator[bytes], every: float, path: str = "/containers/") -> None:
        """Send a piece now and then, for ever."""

        def slowly() -> Pieces:
            for piece in pieces:
                yield piece
                if self.released.wait(every):
                    return

        self.faults[path] = slowly

    def _handle(self, handler: socketserver.StreamRequestHandler) -> None:
        path = handler.rfile.readline().split()[1].decode()
        while handler.rfile.readline().strip():
            pass
        self.requests.append(path)
        pieces = next((make() for start, make in self.faults.items() if path.startswith(start)), None)
        try:
            for piece in pieces if pieces is not None else iter([self._truth(path)]):
                handler.wfile.write(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the asker has had enough

    def _truth(self, path: str) -> bytes:
        parts = path.split("/")
        if parts[1].startswith("v"):
            del parts[1]
        known: object = None
        if len(parts) == 4 and parts[3] == "json":
            known = (self.containers if parts[1] == "containers" else self.images).get(parts[2].removeprefix("sha256:"))
        if known is None:
            return answer(b'{"message":"No such thing"}', "404 Not Found")
        body = json.dumps(known).encode()
        return chunked(body) if len(body) > JSON_SIZE_OF_ONE_PIECE else answer(body)


@dataclass
class FakeMachine:
    """Control groups of version 2 as real directories under ``top``, owned by whoever runs the test."""

    top: Path
    members: dict[int, str] = field(default_factory=dict)

    def make(self, path: str) -> Path:
        """Make a control group and all above it."""
        at = self.top
        at.chmod(0o755)
        for name in path.split("/")[1:]:
            at = at / name
            at.mkdir(mode=0o755, exist_ok=True)
            at.chmod(0o755)
        return at

    def node(self, *, root: int | None = None) -> Node:
        """This machine as attestors see it; its root is the user who runs the test."""
        return Node(self.mountinfo, self.cgroup_of, os.geteuid() if root is None else root)

    def mountinfo(self) -> bytes:
        device = self.top.stat().st_dev
        numbers = f"{os.major(device)}:{os.minor(device)}"
        return (
            f"22 1 {numbers} / / rw shared:1 - ext4 /dev/vda rw\n"
            f"31 22 {numbers} / {self.top} rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
        ).encode()

    def cgroup_of(self, pid: int) -> bytes:
        if pid not in self.members:
            raise ProcessLookupError(pid)
        return f"0::{self.members[pid]}\n".encode()

    def put(self, process: Process, path: str) -> Process:
        """Give the process as the kernel would describe it there."""
        self.make(path)
        self.members[process.pid] = path
        return replace(process, facts=replace(process.facts, cgroup=f"0::{path}\n".encode()))
