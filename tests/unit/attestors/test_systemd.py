"""Which unit the systemd attestor names: by control groups, their owners, and systemd's own word."""

import os
import shutil
import socketserver
import struct
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydantic import ValidationError

from attestors.workload import systemd as module
from attestors.workload.systemd import Machine, SystemdAttestor, SystemdSettings, find_unit
from broker.attestation.contract import AttestorFailed
from broker.attestation.testing import (
    WorkloadAttestorContract,
    check_refuses,
    ended_process,
    started_process,
)
from tests.fakes.runtime import FakeMachine

ID, OTHER = "0123456789abcdef" * 4, "fedcba9876543210" * 4
ORDERS = "/system.slice/orders.service"
OBJECT = "/org/freedesktop/systemd1/unit/orders_2eservice"
FRAGMENT = "/etc/systemd/system/orders.service"


def unit(text: str, *slices: str) -> str | None:
    found = find_unit(text.encode(), slices or ("system.slice",))
    return found and found.id


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (ORDERS, "orders.service"),
        (f"{ORDERS}/control", "orders.service"),
        (f"{ORDERS}/workers/system.slice/other.service", "orders.service"),
        ("/system.slice/system-getty.slice/getty@tty1.service", "getty@tty1.service"),
        ("/system.slice/run-r5f0c.scope", "run-r5f0c.scope"),
        ("/system.slice/cups.socket", "cups.socket"),
        ("/system.slice/my\\x2dapp.service", "my\\x2dapp.service"),
        ("/system.slice/system-a\\x2db.slice/a\\x2db@c\\x2fd.service", "a\\x2db@c\\x2fd.service"),
        ("/system.slice/_cpu.service", "cpu.service"),
        ("/system.slice/__own.service", "_own.service"),
        ("/", None),
        ("/init.scope", None),
        ("/system.slice", None),
        ("/system.slice/orders", None),
        ("/system.slice/.service", None),
        ("/system.slice/a b.service", None),
        ("/system.slice/orders.service (deleted)", None),
        ("/system.slice/" + "a" * 248 + ".service", None),
        ("/other.slice/orders.service", None),
        ("/notsystem.slice/system.slice/orders.service", None),
        ("/user.slice/user-1000.slice/session-3.scope", None),
    ],
)
def test_the_unit_of_a_path(path: str, name: str | None) -> None:
    assert unit(f"0::{path}\n") == name


@pytest.mark.bears("A15")
@pytest.mark.parametrize(
    "path",
    [
        "/user.slice/user-1000.slice/user@1000.service/app.slice/orders.service",
        "/user.slice/user-1000.slice/user@1000.service/system.slice/orders.service",
        "/system.slice/user@1000.service/orders.service",
        "/system.slice/user-1000.slice/user@1000.service/app.slice/orders.service",
    ],
)
def test_a_users_own_units_are_nobodys(path: str) -> None:
    assert unit(f"0::{path}\n") is None


@pytest.mark.bears("A15")
@pytest.mark.parametrize(
    "path",
    [
        f"/system.slice/docker-{ID}.scope",
        f"/system.slice/docker-{ID}.scope/system.slice/orders.service",
        f"{ORDERS}/libpod-payload-{ID}",
        f"{ORDERS}/{ID}",
        f"{ORDERS}/{ID}/{OTHER}",
    ],
)
def test_a_container_is_not_a_unit(path: str) -> None:
    assert unit(f"0::{path}\n") is None


def test_versions_of_control_groups() -> None:
    assert unit(f"4:memory:{ORDERS}\n1:name=systemd:{ORDERS}\n0::/\n") == "orders.service"
    assert unit(f"1:name=systemd:{ORDERS}\n0::{ORDERS}\n") == "orders.service"
    assert unit(f"4:memory:{ORDERS}\n1:name=systemd:/\n0::/\n") is None
    home = find_unit(f"1:name=systemd:{ORDERS}/sub\n0::/\n".encode(), ("system.slice",)).home
    assert (home.hierarchy, home.path) == (1, ORDERS)


@pytest.mark.bears("A15")
@pytest.mark.parametrize(
    ("text", "code"),
    [
        (f"1:name=systemd:{ORDERS}\n0::/system.slice/other.service\n", "unit_ambiguous"),
        (f"1:name=systemd:{ORDERS}\n0::/user.slice/user-1.slice/user@1.service\n", "unit_ambiguous"),
        (f"0::/../..{ORDERS}\n", "cgroup_namespace"),
        ("0::/..\n", "cgroup_namespace"),
        ("0::nonsense\n", "cgroup_unreadable"),
    ],
)
def test_doubts_refuse(text: str, code: str) -> None:
    with pytest.raises(AttestorFailed) as refused:
        unit(text)
    assert refused.value.reason == code


def test_further_slices() -> None:
    assert unit("0::/jobs.slice/a.service\n", "system.slice", "jobs.slice") == "a.service"
    for wrong in ("user.slice", "machine.slice", "a-b.slice", "system", "/system.slice", "-.slice"):
        with pytest.raises(ValidationError):
            SystemdSettings(slices=(wrong,))
    with pytest.raises(ValidationError):
        SystemdSettings(slices=())
    with pytest.raises(ValidationError):
        SystemdSettings(busctl_path="busctl")


class Estate:
    """A machine that systemd has booted, with a ``busctl`` that answers as told."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.machine = FakeMachine(directory / "cgroup")
        self.machine.top.mkdir()
        self.booted = directory / "booted"
        self.booted.mkdir()
        self.busctl = directory / "busctl"
        self.answers()

    def answers(self, name: str = "orders.service", path: str = OBJECT, fragment: str = FRAGMENT) -> None:
        (self.directory / "call").write_text(f'{{"type":"o","data":["{path}"]}}\n')
        (self.directory / "get").write_text(f'{{"type":"s","data":"{name}"}}\n{{"type":"s","data":"{fragment}"}}\n')
        self.script(f'case "$*" in *" call "*) cat {self.directory}/call;; *) cat {self.directory}/get;; esac')

    def script(self, text: str) -> None:
        self.busctl.write_text(f'#!/bin/sh\nPATH=/usr/bin:/bin\necho "$*" >>{self.directory}/asked\n{text}\n')
        self.busctl.chmod(0o755)

    def asked(self) -> list[str]:
        log = self.directory / "asked"
        return log.read_text().splitlines() if log.exists() else []

    def attestor(self, root: int | None = None, busctl: Path | None = None) -> SystemdAttestor:
        settings = SystemdSettings(busctl_path=str(busctl or self.busctl))
        return SystemdAttestor(settings, Machine(self.machine.node(root=root), self.booted))

    async def attest(self, path: str = ORDERS, **options) -> set[str]:
        with started_process() as process:
            return set(map(str, await self.attestor(**options).attest(self.machine.put(process, path))))

    async def refusal(self, path: str = ORDERS, **options) -> str:
        with pytest.raises(AttestorFailed) as refused:
            await self.attest(path, **options)
        return refused.value.reason


@pytest.fixture
def estate(tmp_path: Path) -> Estate:
    return Estate(tmp_path)


class TestContract(WorkloadAttestorContract):
    @pytest.fixture(autouse=True)
    def _estate(self, tmp_path: Path) -> None:
        self.estate = Estate(tmp_path)

    def make_attestor(self) -> SystemdAttestor:
        return self.estate.attestor()

    @contextmanager
    def process(self):
        with started_process() as process:
            yield self.estate.machine.put(process, ORDERS)


async def test_names_the_unit_and_its_file(estate) -> None:
    assert await estate.attest() == {"systemd:id:orders.service", f"systemd:fragment_path:{FRAGMENT}"}
    call, get = estate.asked()
    assert "GetUnitByPID u " in call and call.startswith("--system --json=short")
    assert get.endswith(f"{OBJECT} org.freedesktop.systemd1.Unit Id FragmentPath")


async def test_escapes_in_names(estate) -> None:
    estate.answers("a\\\\x2db.service", fragment="/etc/systemd/system/a\\\\x2db.service")
    assert await estate.attest("/system.slice/a\\x2db.service") == {
        "systemd:id:a\\x2db.service",
        "systemd:fragment_path:/etc/systemd/system/a\\x2db.service",
    }


@pytest.mark.parametrize("fragment", ["", "relative", "/a\\u0007b"])
async def test_a_unit_without_a_usable_file(estate, fragment: str) -> None:
    estate.answers(fragment=fragment)
    assert await estate.attest() == {"systemd:id:orders.service"}


async def test_nobody_is_asked_about_what_is_in_no_unit(estate) -> None:
    for path in ("/user.slice/user-1.slice/user@1.service/app.slice/a.service", f"/system.slice/docker-{ID}.scope"):
        assert await estate.attest(path) == set()
    estate.booted.rmdir()
    assert await estate.attest() == set()
    assert estate.asked() == []


@pytest.mark.bears("A15")
async def test_directories_that_are_not_roots(estate) -> None:
    assert await estate.refusal(root=os.geteuid() + 1) == "unit_not_anchored"
    with started_process() as process:
        placed = estate.machine.put(process, f"{ORDERS}/workers")
        (estate.machine.top / "system.slice/orders.service/workers").chmod(0o777)  # below the unit: delegated
        assert len(await estate.attestor().attest(placed)) == 2
        (estate.machine.top / "system.slice/orders.service").chmod(0o777)
        assert (await check_refuses(estate.attestor(), placed)).reason == "unit_not_anchored"
    assert len(estate.asked()) == 2


async def test_systemd_names_another_unit(estate) -> None:
    estate.answers("other.service")
    assert await estate.refusal() == "unit_mismatch"


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("exit 1", "systemd_unreachable"),
        ("true", "systemd_answer"),
        ("echo nonsense", "systemd_answer"),
        ("""echo '{"type":"s","data":["/org/freedesktop/systemd1/unit/a"]}'""", "systemd_answer"),
        ("""echo '{"type":"o","data":["/org/freedesktop/login1"]}'""", "systemd_answer"),
        ("""echo '{"type":"o","data":["--unit"]}'""", "systemd_answer"),
        ("""echo '{"type":"o","data":[]}'""", "systemd_answer"),
        ("kill -9 $$", "systemd_unreachable"),
    ],
)
async def test_answers_that_refuse(estate, script: str, code: str) -> None:
    estate.script(script)
    assert await estate.refusal() == code


async def test_a_busctl_that_cannot_be_used(estate) -> None:
    assert await estate.refusal(busctl=estate.directory / "absent") == "systemd_unreachable"
    estate.busctl.chmod(0o777)
    assert await estate.refusal() == "systemd_not_trusted"
    assert await estate.refusal(busctl=estate.directory) == "systemd_not_trusted"


async def test_a_hung_systemd_is_given_up(estate, monkeypatch) -> None:
    monkeypatch.setattr(module, "ATTEST_TIMEOUT", 0.3)
    estate.script("exec sleep 60")
    assert await estate.refusal() == "attestor_timeout"


@pytest.mark.bears("A21")
async def test_busctl_inherits_nothing(estate) -> None:
    secret, out = estate.directory / "secret", estate.directory / "out"
    with secret.open("w") as file:
        os.set_inheritable(file.fileno(), True)
        estate.script(f"ls -l /proc/$$/fd >{out}; tr '\\0' '\\n' </proc/$$/environ >>{out}; pwd >>{out}; exit 1")
        await estate.refusal()
    seen = out.read_text()
    assert "secret" not in seen and "=" not in seen and seen.endswith("\n/\n")


async def test_a_process_that_is_gone(estate) -> None:
    with ended_process() as process:
        placed = estate.machine.put(process, ORDERS)
        assert (await check_refuses(estate.attestor(), placed)).reason == "process_gone"


# The real busctl, on a bus of the test's own: the questions and the form of the answers are systemd's.


def _string(text: str) -> bytes:
    return struct.pack("<I", len(text)) + text.encode() + b"\0"


def _padded(data: bytes, to: int) -> bytes:
    return data + b"\0" * (-len(data) % to)


class Bus(socketserver.StreamRequestHandler):
    """Enough of D-Bus for one client: EXTERNAL, Hello, GetUnitByPID and Properties.Get."""

    replies = ()

    def handle(self) -> None:
        while not (line := self.rfile.readline().strip(b"\0\r\n")).startswith(b"BEGIN"):
            words = line.split()
            if not words:
                return
            answer = {b"AUTH": b"DATA" if len(words) < 3 else b"OK " + b"0" * 32, b"DATA": b"OK " + b"0" * 32}
            self.wfile.write(answer.get(words[0], b"AGREE_UNIX_FD") + b"\r\n")
        for signature, body in self.replies:
            head = self.rfile.read(16)
            if len(head) < 16:
                return
            _, _, _, _, length, serial, fields = struct.unpack("<BBBBIII", head)
            self.rfile.read(fields + -fields % 8 + length)
            self._reply(serial, signature, body)

    def _reply(self, serial: int, signature: str, body: bytes) -> None:
        fields = b"\5\1u\0" + struct.pack("<I", serial)
        for number, kind, value in ((6, b"s", ":1.1"), (7, b"s", "org.freedesktop.DBus")):
            fields = _padded(fields, 8) + bytes([number, 1]) + kind + b"\0" + _string(value)
        fields = _padded(fields, 8) + b"\x08\1g\0" + bytes([len(signature)]) + signature.encode() + b"\0"
        head = struct.pack("<BBBBIII", ord("l"), 2, 1, 1, len(body), serial, len(fields))
        self.wfile.write(_padded(head + fields, 8) + body)


@pytest.mark.skipif(shutil.which("busctl") is None, reason="needs busctl (systemd)")
async def test_the_real_busctl(estate) -> None:
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    address = directory / "bus"

    class Call(Bus):
        replies = (("s", _string(":1.1")), ("o", _string(OBJECT)))

    class Get(Bus):
        replies = (
            ("s", _string(":1.1")),
            ("v", b"\1s\0\0" + _string("orders.service")),
            ("v", b"\1s\0\0" + _string(FRAGMENT)),
        )

    class Server(socketserver.ThreadingUnixStreamServer):
        turn = iter((Call, Get))
        daemon_threads = True

        def finish_request(self, request, client_address) -> None:
            next(self.turn)(request, client_address, self)

    with Server(str(address), Call) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        # As the attestor calls it, only the bus is another one.
        estate.script(f'shift; exec {shutil.which("busctl")} --address=unix:path={address} "$@"')
        try:
            found = await estate.attest()
        finally:
            server.shutdown()
            thread.join()
            shutil.rmtree(directory)
    assert found == {"systemd:id:orders.service", f"systemd:fragment_path:{FRAGMENT}"}
