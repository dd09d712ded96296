"""A Docker Engine of our own, with its data, sockets and process in one directory: what integration tests ask for as ``engine``."""

import json
import os
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from attestors.workload.docker import DockerAttestor, DockerSettings
from broker.attestation.contract import AttestorFailed
from broker.attestation.process import Process
from broker.dev.programs import install_program, program_environment

NEEDED = ("dockerd", "docker", "busybox")
SECONDS = 30.0
IMAGE = "probe:1"
ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "/opt/pod/bin/pod"
"""A Python interpreter in the image; its libraries are the host's, mounted where they are there."""


def until(done: Callable[[], object], what: str) -> object:
    deadline = time.monotonic() + SECONDS
    while not (found := done()):
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return found


def runs_its_command(pid: int) -> bool:
    """Say whether it is busybox by now: at first each process of a container is the runtime's own program."""
    try:
        return os.readlink(f"/proc/{pid}/exe") == "/bin/busybox"
    except FileNotFoundError:
        return False


class Engine:
    """The engine, with one image whose label and variable try to pass for somebody else's."""

    def __init__(self, directory: Path) -> None:
        self.socket = directory / "d.sock"

    def __call__(self, *command: str, **options: object) -> str:
        done = self.tried(*command, **options)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode().strip()

    def tried(self, *command: str, **options: object) -> subprocess.CompletedProcess[bytes]:
        # The two may differ in age; the older speaks for both.
        environment = {**os.environ, "DOCKER_API_VERSION": "1.41"}
        return subprocess.run(
            ["docker", "-H", f"unix://{self.socket}", *command],
            capture_output=True, check=False, timeout=2 * SECONDS, env=environment, **options,
        )  # fmt: skip

    def run(self, *options: str, image: str = IMAGE) -> str:
        return self("run", "-d", "--network", "none", *options, image, "/bin/sleep", "1000")

    def program(self, *options: str, image: str = IMAGE) -> str:
        """Start a container in which ``in_container`` programs can be run; give its id."""
        return self.run(*_mounts(), *_environment(), *options, image=image)

    def inspect(self, container: str) -> dict:
        (found,) = json.loads(self("inspect", container))
        return found

    def pid(self, container: str) -> int:
        pid: int = self.inspect(container)["State"]["Pid"]
        until(lambda: runs_its_command(pid), "the container's command does not start")
        return pid

    def digest(self, image: str = IMAGE) -> str:
        return json.loads(self("image", "inspect", image))[0]["Id"]

    def exported(self, container: str) -> bytes:
        """The file system of a container, as a tar that carries no labels."""
        done = self.tried("export", container)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    def attestor(self, **settings: object) -> DockerAttestor:
        return DockerAttestor(DockerSettings(docker_socket_path=f"unix://{self.socket}", **settings))

    async def selectors(self, pid: int, **settings: object) -> set[str]:
        with held(pid) as process:
            found = {str(one) for one in await self.attestor(**settings).attest(process)}
            process.still_same()
            return found

    async def refusal(self, pid: int) -> str:
        with held(pid) as process, pytest.raises(AttestorFailed) as refused:
            await self.attestor().attest(process)
        return refused.value.reason


@contextmanager
def held(pid: int) -> Iterator[Process]:
    pidfd = os.pidfd_open(pid)
    owner = os.stat(f"/proc/{pid}")
    process = Process.open(pid=pid, uid=owner.st_uid, gid=owner.st_gid, pidfd=pidfd)
    os.close(pidfd)
    try:
        yield process
    finally:
        process.close()


class Counting:
    """A socket before the engine's that passes everything on and remembers what was asked."""

    def __init__(self, engine: Engine) -> None:
        self.asked: list[str] = []
        self.socket = engine.socket.with_name("counting.sock")
        counting = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                counting._pass_on(self, str(engine.socket))

        class Server(socketserver.ThreadingUnixStreamServer):
            daemon_threads = True
            request_queue_size = 64

        self._server = Server(str(self.socket), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def about(self, container: str) -> int:
        """How often the engine was asked about this container."""
        return self.asked.count(f"/containers/{container}/json")

    @contextmanager
    def serving(self) -> Iterator["Counting"]:
        self._thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def _pass_on(self, handler: socketserver.StreamRequestHandler, path: str) -> None:
        lines = [handler.rfile.readline()]
        while lines[-1].strip():
            lines.append(handler.rfile.readline())
        self.asked.append(lines[0].split()[1].decode())
        with socket.socket(socket.AF_UNIX) as engine:
            engine.connect(path)
            engine.sendall(b"".join(lines))
            while data := engine.recv(1 << 16):  # the attestor asks for the connection to be closed
                handler.wfile.write(data)


@contextmanager
def docker_engine() -> Iterator[Engine]:
    """Start one and end it by its pid; skips, with the reason, where none can run."""
    if reason := _why_not():
        pytest.skip(reason)
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    engine = Engine(directory)
    with ExitStack() as after:
        after.callback(shutil.rmtree, directory, ignore_errors=True)
        after.callback(_end, _start(engine, directory))
        _make_image(engine, directory)
        after.callback(_remove_containers, engine)
        yield engine


def _why_not() -> str:
    if os.geteuid() != 0:
        return "needs root: starts a Docker Engine of its own"
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        return f"needs {', '.join(missing)}: apt-get install docker.io busybox-static"
    if subprocess.run(["ldd", shutil.which("busybox")], capture_output=True, check=False).returncode == 0:
        return "needs a static busybox: apt-get install busybox-static"
    return ""


def _start(engine: Engine, directory: Path) -> subprocess.Popen[bytes]:
    log = directory / "log"
    with log.open("wb") as out:
        daemon = subprocess.Popen(
            [
                "dockerd", "--iptables=false", "--ip6tables=false", "--bridge=none", "--exec-opt", "native.cgroupdriver=cgroupfs",
                "--data-root", str(directory / "data"), "--exec-root", str(directory / "exec"),
                "--pidfile", str(directory / "pid"), "-H", f"unix://{engine.socket}",
            ],
            stdout=out, stderr=out,
        )  # fmt: skip
    deadline = time.monotonic() + SECONDS
    while not engine.socket.exists() or b"API listen" not in log.read_bytes():
        if daemon.poll() is not None or time.monotonic() > deadline:
            _end(daemon)
            last = log.read_text(errors="replace").strip().rpartition("\n")[2]
            shutil.rmtree(directory, ignore_errors=True)
            pytest.skip(f"the Docker Engine does not start here: {last[:300]}")
        time.sleep(0.05)
    return daemon


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.send_signal(signal.SIGTERM)
    try:
        daemon.wait(SECONDS)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _remove_containers(engine: Engine) -> None:
    if running := engine("ps", "-aq").split():
        engine("rm", "-f", *running)


def _make_image(engine: Engine, directory: Path) -> None:
    root = directory / "root"
    for name in ("bin", "tmp"):
        (root / name).mkdir(parents=True)
    shutil.copy(shutil.which("busybox"), root / "bin/busybox")
    for name in ("sh", "sleep"):
        (root / "bin" / name).symlink_to("busybox")
    install_program(root / "opt", "pod")
    tar = subprocess.run(["tar", "-C", str(root), "-c", "."], capture_output=True, check=True).stdout
    engine("import", "--change", "LABEL app=payments", "--change", "ENV ROLE=payments", "-", IMAGE, input=tar)


def _mounts() -> Sequence[str]:
    """What the interpreter in the image needs of this host, each at its own place and read-only."""
    places = {"/usr", "/lib", "/lib64", sys.base_prefix, sys.prefix, str(ROOT)}
    return [part for place in sorted(places) if Path(place).exists() for part in ("-v", f"{place}:{place}:ro")]


def _environment() -> Sequence[str]:
    given = program_environment(os.environ)
    kept = {name: given[name] for name in ("PYTHONPATH", "LD_LIBRARY_PATH") if name in given}
    kept["PYTHONDONTWRITEBYTECODE"] = "1"
    return [part for name, value in kept.items() for part in ("-e", f"{name}={value}")]
