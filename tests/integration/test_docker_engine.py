"""The docker attestor against a real Docker Engine, real containers and real control groups."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from attestors.workload.docker import DockerAttestor, DockerSettings
from broker.attestation.cgroups import parse_cgroup_mounts
from broker.attestation.contract import AttestorFailed
from broker.attestation.process import Process

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]

NEEDED = ("dockerd", "docker", "busybox")
SECONDS = 30.0


def _why_not() -> str:
    if os.geteuid() != 0:
        return "needs root: starts a Docker Engine of its own"
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        return f"needs {', '.join(missing)}: apt-get install docker.io busybox-static"
    if subprocess.run(["ldd", shutil.which("busybox")], capture_output=True, check=False).returncode == 0:
        return "needs a static busybox: apt-get install busybox-static"
    return ""


def until(done: Callable[[], object], what: str) -> object:
    deadline = time.monotonic() + SECONDS
    while not (found := done()):
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return found


class Engine:
    """A Docker Engine of our own, with one image whose label and variable try to pass for somebody else's."""

    def __init__(self, directory: Path) -> None:
        self.socket = directory / "d.sock"

    def __call__(self, *command: str, **options: object) -> str:
        # The two may differ in age; the older speaks for both.
        environment = {**os.environ, "DOCKER_API_VERSION": "1.41"}
        done = subprocess.run(
            ["docker", "-H", f"unix://{self.socket}", *command],
            capture_output=True, check=False, timeout=SECONDS, env=environment, **options,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode().strip()

    def run(self, *options: str) -> str:
        return self("run", "-d", "--network", "none", *options, "probe:1", "/bin/sleep", "1000")

    def pid(self, container: str) -> int:
        return json.loads(self("inspect", container))[0]["State"]["Pid"]

    def digest(self) -> str:
        return json.loads(self("image", "inspect", "probe:1"))[0]["Id"]

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


def _root_of_image(directory: Path) -> None:
    (directory / "bin").mkdir(parents=True)
    shutil.copy(shutil.which("busybox"), directory / "bin/busybox")
    for name in ("sh", "sleep"):
        (directory / "bin" / name).symlink_to("busybox")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    if reason := _why_not():
        pytest.skip(reason)
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    engine = Engine(directory)
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
    try:
        deadline = time.monotonic() + SECONDS
        while not engine.socket.exists() or b"API listen" not in log.read_bytes():
            if daemon.poll() is not None or time.monotonic() > deadline:
                last = log.read_text(errors="replace").strip().rpartition("\n")[2]
                pytest.skip(f"the Docker Engine does not start here: {last[:300]}")
            time.sleep(0.05)
        _root_of_image(directory / "root")
        tar = subprocess.run(["tar", "-C", str(directory / "root"), "-c", "."], capture_output=True, check=True).stdout
        engine("import", "--change", "LABEL app=payments", "--change", "ENV ROLE=payments", "-", "probe:1", input=tar)
        yield engine
        running = engine("ps", "-aq").split()
        if running:
            engine("rm", "-f", *running)
    finally:
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(SECONDS)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
        shutil.rmtree(directory, ignore_errors=True)


async def test_each_container_has_its_own_selectors(engine) -> None:
    orders = engine.run("--label", "app=orders", "--env", "TIER=prod")
    billing = engine.run("--label", "app=billing", "--label", "a:b=c")
    plain = engine.run()
    common = {"docker:image_id:probe:1", f"docker:image_config_digest:{engine.digest()}"}
    assert await engine.selectors(engine.pid(orders)) == {"docker:label:app:orders", "docker:env:TIER=prod"} | common
    assert await engine.selectors(engine.pid(billing)) == {"docker:label:app:billing"} | common
    assert await engine.selectors(engine.pid(plain)) == common
    assert await engine.selectors(os.getpid()) == set()


@pytest.mark.bears("A18")
async def test_an_image_cannot_name_itself(engine) -> None:
    spoofing = engine.pid(engine.run())
    spoofed = {"docker:label:app:payments", "docker:env:ROLE=payments"}
    assert not spoofed & await engine.selectors(spoofing)
    # What SPIRE would give:
    assert spoofed <= await engine.selectors(spoofing, require_runtime_label=False, require_runtime_env=False)


async def test_a_command_run_in_the_container_by_another_user(engine) -> None:
    container = engine.run("--label", "app=orders")
    first = engine.pid(container)
    engine("exec", "-d", "-u", "1234:1234", container, "/bin/sleep", "999")

    def second() -> int:
        pids = [int(pid) for pid in (tops()[0] / "docker" / container / "cgroup.procs").read_text().split()]
        return next((pid for pid in pids if pid != first and os.stat(f"/proc/{pid}").st_uid == 1234), 0)

    pid = until(second, "docker exec starts nothing")
    assert await engine.selectors(pid) == await engine.selectors(first)


async def test_a_container_stopped_and_started(engine) -> None:
    container = engine.run("--label", "app=orders")
    with held(engine.pid(container)) as process:
        before = {str(one) for one in await engine.attestor().attest(process)}
        engine("stop", "-t", "0", container)
        with pytest.raises(AttestorFailed):
            await engine.attestor().attest(process)
    engine("start", container)
    assert await engine.selectors(engine.pid(container)) == before


# --- forgeries, with the control groups of this machine


def tops() -> list[Path]:
    """The hierarchies that this machine has mounted."""
    mounts = parse_cgroup_mounts(Path("/proc/self/mountinfo").read_bytes())
    found = [Path(mount.point) for mount in mounts if mount.root == "/"]
    assert found
    return found


@pytest.fixture
def forge() -> Iterator[Callable[..., int]]:
    """Puts a process of this host into control groups of its choosing."""
    with ExitStack() as after:

        def put(*paths: str, top: int = -1, owner: int = 0) -> int:
            child = subprocess.Popen(["/bin/sleep", "1000"])
            made: list[Path] = []

            def end() -> None:
                child.kill()
                child.wait()
                for directory in reversed(made):
                    until(lambda one=directory: _removed(one), f"{directory} stays")

            after.callback(end)
            for number, path in enumerate(paths):
                directory = tops()[top - number]
                for name in path.split("/")[1:]:
                    directory = directory / name
                    if not directory.exists():
                        directory.mkdir(mode=0o755)
                        made.append(directory)
                        _inherit_cpuset(directory)
                        if owner:
                            os.chown(directory, owner, owner)
                (directory / "cgroup.procs").write_text(str(child.pid))
            return child.pid

        yield put


def _inherit_cpuset(directory: Path) -> None:
    # A version 1 cpuset takes nobody until it has processors and memory.
    for name in ("cpuset.cpus", "cpuset.mems"):
        if (directory / name).exists() and not (directory / name).read_text().strip():
            (directory / name).write_text((directory.parent / name).read_text())


def _removed(directory: Path) -> bool:
    with suppress(OSError):
        directory.rmdir()
    return not directory.exists()


OTHER = "fedcba9876543210" * 4


@pytest.mark.bears("A15")
async def test_forged_places_are_refused(engine, forge) -> None:
    victim = engine.run("--label", "app=payments-v2")
    ours = "/broker-test"
    for number in range(len(tops())):
        top = -1 - number
        forged = {
            # A user's delegated part of the tree.
            f"{ours}/user@4002.service/docker/{victim}": ("container_not_anchored", 4002),
            # The right name in a place where this engine puts nothing.
            f"{ours}.slice/docker-{victim}.scope": ("container_mismatch", 0),
            f"{ours}.slice/user-4002.slice/docker-{victim}.scope": ("container_not_anchored", 4002),
            # Inside the container, in a part that belongs to a user.
            f"/docker/{victim}/sub": ("container_not_anchored", 4002),
            # Nested ids.
            f"/docker/{victim}/docker/{OTHER}": ("container_ambiguous", 0),
            f"/docker/{OTHER}/{victim}": ("container_ambiguous", 0),
            # A container that the engine never made.
            f"/docker/{OTHER}": ("container_unknown", 0),
        }
        for path, (reason, owner) in forged.items():
            assert await engine.refusal(forge(path, top=top, owner=owner)) == reason, (tops()[top], path)


@pytest.mark.bears("A15")
async def test_hierarchies_that_name_two_containers_are_refused(engine, forge) -> None:
    if len(tops()) < 2:
        pytest.skip("this machine has one hierarchy")
    one, two = engine.run("--label", "app=one"), engine.run("--label", "app=two")
    assert await engine.refusal(forge(f"/docker/{one}", f"/docker/{two}")) == "container_ambiguous"


async def test_a_control_group_made_inside_by_root_is_the_containers(engine, forge) -> None:
    container = engine.run("--label", "app=orders")
    assert "docker:label:app:orders" in await engine.selectors(forge(f"/docker/{container}/init.scope"))
