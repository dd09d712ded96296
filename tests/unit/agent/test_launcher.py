"""The launcher as a process of its own: what it lets run, what it passes on, and what it leaves."""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from broker.agent.launch_account import Account
from broker.agent.launch_directory import LaunchDirectory
from broker.attestation.launches import Launch, start_time_of
from broker.errors import Refused, Unavailable
from tests.fakes.launching import SECONDS, command, held, launched, names, private, run, script, until_gone

COUNT = r"""
import os, signal, sys, time
told = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: told.append(number))
def tell(number, frame):
    os.write(1, f"{told}\n".encode())  # print is not for handlers that interrupt each other
signal.signal(signal.SIGUSR1, tell)
print(os.getpid(), flush=True)
while True:
    time.sleep(0.01)
"""
SHOW = """
import json, os, sys
status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
print(json.dumps({
    "argv": sys.argv, "isolated": sys.flags.isolated, "descriptors": sorted(map(int, os.listdir("/proc/self/fd"))),
    "no_new_privs": int(status["NoNewPrivs"]), "blocked": int(status["SigBlk"], 16), "ignored": int(status["SigIgn"], 16),
    "uids": os.getresuid(), "gids": os.getresgid(), "groups": os.getgroups(), "prefix": sys.prefix,
    "capabilities": int(status["CapEff"], 16), "home": os.environ.get("HOME"), "user": os.environ.get("USER"),
    "secret": os.environ.get("PYTHONPATH"),
}))
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return private(tmp_path)


def given(directory: Path, *program: str, more: tuple[str, ...] = ()) -> tuple[str, ...]:
    return ("--as", "one", "--directory", str(directory), *more, "--", *program)


def after(statement: str, arguments: list[str]) -> list[str]:
    """Run a statement in the process before it becomes the command: not in a fork of this one, whose threads are gRPC's."""
    return [
        sys.executable,
        "-c",
        f"import os, resource, sys; {statement}; os.execv(sys.argv[1], sys.argv[1:])",
        *arguments,
    ]


def python(tmp_path: Path, text: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, script(tmp_path, text), *arguments)


@pytest.mark.parametrize(("text", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("kill -15 $$", 143)])
def test_the_exit_code_is_the_programs(directory: Path, tmp_path: Path, text: str, code: int) -> None:
    assert run(*given(directory, "/bin/sh", script(tmp_path, text))).returncode == code
    assert names(directory) == []


def test_what_the_program_is_given(directory: Path, tmp_path: Path) -> None:
    ended = run(
        *given(directory, *python(tmp_path, SHOW, "-o", "json")), env={**os.environ, "PYTHONPATH": "/x:" + ROOT}
    )
    told = json.loads(ended.stdout)
    assert told["argv"] == ["/proc/self/fd/3", "-o", "json"]
    assert told["isolated"] == 1 and told["prefix"] == sys.prefix
    assert set(told["descriptors"]) <= {0, 1, 2, 3, 4}  # its script, and the list of them itself
    assert told["no_new_privs"] == 1
    mine = Path("/proc/self/status").read_text()
    assert f"SigBlk:\t{told['blocked']:016x}" in mine
    # Python's own choice in the program, not handed on by the launcher.
    assert told["ignored"] & ~INTERNAL == 1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1
    assert told["uids"] == list(os.getresuid())


INTERNAL = -1 << 31  # the C library's own signals: a shell may have them ignored
ROOT = str(Path(__file__).resolve().parents[3])


def test_a_shell_has_no_signal_ignored(directory: Path, tmp_path: Path) -> None:
    ended = run(*given(directory, "/bin/sh", script(tmp_path, "grep SigIgn /proc/self/status")))
    assert int(ended.stdout.split()[1], 16) & (1 << signal.SIGPIPE - 1) == 0


def test_the_registration_lives_as_long_as_the_process(directory: Path, tmp_path: Path) -> None:
    with launched(*given(directory, *python(tmp_path, COUNT))) as found:
        (name,) = names(directory)
        assert name == f"{found.pid}-{start_time_of(found.pid)}.json"
        assert (directory.stat().st_mode & 0o7777, (directory / name).stat().st_mode & 0o7777) == (0o700, 0o600)
        launch = Launch.parse((directory / name).read_bytes())
        assert (launch.name, launch.pid, launch.uid) == ("one", found.pid, os.geteuid())
        with held(found.pid) as process:
            assert process.facts.exe == launch.file_id
        os.kill(found.pid, signal.SIGKILL)
        assert found.end()[0] == 137
        assert names(directory) == []


def test_signals_are_passed_on(directory: Path, tmp_path: Path) -> None:
    with launched(*given(directory, *python(tmp_path, COUNT))) as found:
        found.launcher.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + SECONDS
        said = ""
        while said != "[15]":
            assert time.monotonic() < deadline, said
            found.launcher.send_signal(signal.SIGUSR1)
            said = found.line()


def test_a_terminals_interrupt_reaches_the_program_once(directory: Path, tmp_path: Path) -> None:
    master, slave = os.openpty()
    keeps_what_was_written(slave)
    process = subprocess.Popen(
        after("os.login_tty(0)", command(*given(directory, *python(tmp_path, COUNT), more=("-q",)))), stdin=slave
    )
    try:
        os.close(slave)
        said = heard(master, b"\n")
        os.write(master, b"\x03")
        while b"[2]" not in said and b"[2, 2]" not in said:
            process.send_signal(signal.SIGUSR1)
            said += heard(master, b"]")
        # Whatever the launcher makes of the interrupt it has made by now: it takes signals in the order of their numbers.
        process.send_signal(signal.SIGUSR1)
        assert b"[2]" in heard(master, b"]")
    finally:
        process.kill()
        process.wait()
        os.close(master)


def keeps_what_was_written(terminal: int) -> None:
    """An interrupt would throw away what waits in the terminal: the answer that this test waits for, if it came first."""
    settings = termios.tcgetattr(terminal)
    settings[3] |= termios.NOFLSH
    termios.tcsetattr(terminal, termios.TCSANOW, settings)


def heard(master: int, until: bytes) -> bytes:
    said = b""
    while until not in said:
        said += os.read(master, 4096)
    return said


def test_a_killed_launcher_takes_its_program_with_it(directory: Path, tmp_path: Path) -> None:
    with launched(*given(directory, *python(tmp_path, COUNT))) as found:
        found.launcher.kill()
        found.launcher.wait(SECONDS)
        until_gone(found.pid)
        assert names(directory) != []
        # What it could not remove means nothing, and the next one does.
        assert run(*given(directory, "/bin/true")).returncode == 0
        assert names(directory) == []


def test_nothing_runs_that_could_not_be_registered(directory: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    ended = subprocess.run(
        after(
            "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))",
            command(*given(directory, "/usr/bin/touch", str(marker))),
        ),
        capture_output=True, text=True, check=False, timeout=SECONDS,
    )  # fmt: skip
    assert ended.returncode == 75, ended.stderr
    assert "cannot be registered" in ended.stderr
    assert not marker.exists()
    assert names(directory) == []
    assert run(*given(directory, "/usr/bin/touch", str(marker))).returncode == 0
    assert marker.exists()


# Steps that no command line can stop between: the launcher's parts, in a process of their own.
STEPS = """
import os, signal, sys
from contextlib import ExitStack
from pathlib import Path
from broker.agent.launch_code import prepare
from broker.agent.launch_directory import LaunchDirectory
from broker.agent.launcher import Launching, launch
from broker.errors import Refused

class Dies:
    def write(self, launch):
        os.write(1, f"{launch.pid}\\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)

what, directory, *command = sys.argv[1:]
with ExitStack() as stack:
    code = prepare(command, "one", stack, hide=False)
    where = stack.enter_context(LaunchDirectory.open(Path(directory)))
    if what == "written":
        with open(command[0], "ab") as file:
            file.write(b"x")
    try:
        launch(Launching("one", code, None, dict(os.environ)), Dies() if what == "dies" else where, print)
    except Refused as error:
        print(error.reason)
"""


def steps(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", STEPS, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
        cwd=ROOT,
    )


def test_a_file_that_is_written_while_it_starts_ends_its_program(directory: Path, tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    shutil.copyfile("/bin/sleep", tool)
    tool.chmod(0o755)
    ended = steps("written", str(directory), str(tool), "3600")  # killed long before
    assert ended.stdout == "launch_code_changed\n", ended.stderr
    assert names(directory) == []
    assert steps("as it is", str(directory), str(tool), "0").stdout.startswith("launched one as process ")


def test_a_launcher_that_dies_before_it_has_registered_runs_nothing(directory: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    ended = steps("dies", str(directory), shutil.which("touch") or "", str(marker))
    assert ended.returncode == -signal.SIGKILL
    until_gone(int(ended.stdout))
    assert not marker.exists()


def test_a_file_that_is_no_program(directory: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    odd.write_bytes(b"\x00\x01")
    odd.chmod(0o755)
    ended = run(*given(directory, str(odd)))
    assert ended.returncode == 78
    assert "cannot be run" in ended.stderr
    assert names(directory) == []


def test_without_an_agent_nothing_runs(tmp_path: Path) -> None:
    ended = run("--as", "one", "--directory", str(tmp_path / "none" / "launches"), "--", "/bin/true")
    assert ended.returncode == 75
    assert "start the agent first" in ended.stderr


def test_a_directory_that_others_may_write(tmp_path: Path) -> None:
    directory = private(tmp_path)
    directory.parent.chmod(0o777)
    assert run(*given(directory, "/bin/true")).returncode == 78
    directory.parent.chmod(0o700)
    directory.mkdir(mode=0o755)
    directory.chmod(0o755)
    assert run(*given(directory, "/bin/true")).returncode == 78


def test_the_sweep_spares_the_living_and_the_unknown(directory: Path, tmp_path: Path) -> None:
    with launched(*given(directory, *python(tmp_path, COUNT))) as found:
        (living,) = names(directory)
        own = f".{os.getpid()}-{start_time_of(os.getpid())}.new"
        elsewhere = Launch.parse((directory / living).read_bytes()).model_copy(
            update={"pid": 2**30, "pid_namespace": "pid:[1]"}
        )
        (directory / elsewhere.file_name).write_bytes(elsewhere.serialise())
        (directory / elsewhere.file_name).chmod(0o600)
        stale = ["999999999-1.json", f"{found.pid}-1.json", ".999999999-1.new"]
        for name in [*stale, own, "README"]:
            (directory / name).touch(mode=0o600)
        with LaunchDirectory.open(directory) as where:
            where.sweep()
        assert names(directory) == sorted([living, own, elsewhere.file_name, "README"])


def test_launches_are_bounded(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.agent.launch_directory.MAX_LAUNCHES", 1)
    with LaunchDirectory.open(directory) as where:
        where.sweep()
        (directory / f"{os.getpid()}-{start_time_of(os.getpid())}.json").touch(mode=0o600)
        with pytest.raises(Unavailable, match="1 launched processes"):
            where.sweep()


class TestAsAnotherUser:
    """As root, with an interpreter that everybody may run."""

    pytestmark = pytest.mark.root("launches as another user")
    PYTHON = "/usr/bin/python3"
    NOBODY = ("--user", "nobody")

    @pytest.fixture(autouse=True)
    def _needs(self) -> None:
        if not Path(self.PYTHON).exists():
            pytest.skip(f"needs {self.PYTHON}: apt-get install python3")

    def test_it_is_that_user_and_nothing_more(self, directory: Path, tmp_path: Path) -> None:
        ended = run(*given(directory, self.PYTHON, script(tmp_path, SHOW), more=self.NOBODY))
        told = json.loads(ended.stdout)
        assert set(told["uids"]) == {65534} and set(told["gids"]) == {65534} and set(told["groups"]) == {65534}
        assert (told["capabilities"], told["no_new_privs"]) == (0, 1)
        assert (told["user"], told["home"]) == ("nobody", "/nonexistent")
        assert "trial" not in ended.stderr

    def test_its_own_user_cannot_look_into_it(self, directory: Path, tmp_path: Path) -> None:
        """One that was started by hand can be looked into: that is the difference."""
        look = [
            self.PYTHON, "-c",
            "import sys\nfor n in sys.argv[1:]:\n try: open(f'/proc/{n}/mem', 'rb'); print('open')\n except OSError: print('shut')",
        ]  # fmt: skip
        path = script(tmp_path, COUNT)
        by_hand = subprocess.Popen(
            [self.PYTHON, "-c", COUNT], stdout=subprocess.PIPE, user=65534, group=65534, extra_groups=[]
        )
        try:
            assert by_hand.stdout is not None and by_hand.stdout.readline()
            with launched(*given(directory, self.PYTHON, path, more=self.NOBODY)) as found:
                seen = subprocess.run(
                    [*look, str(found.pid), str(by_hand.pid)],
                    capture_output=True, text=True, check=True, user=65534, group=65534, extra_groups=[],
                )  # fmt: skip
                assert seen.stdout.split() == ["shut", "open"]
        finally:
            by_hand.kill()
            by_hand.communicate(timeout=SECONDS)

    def test_the_agents_own_user_is_no_user_for_programs(self, directory: Path) -> None:
        os.chown(directory.parent, 4711, 4711)
        ended = run(*given(directory, "/bin/true", more=("--user", "4711", "--group", "4711")))
        assert ended.returncode == 4
        assert "register itself" in ended.stderr

    def test_an_agent_that_is_not_root_owns_its_registrations(self, directory: Path, tmp_path: Path) -> None:
        os.chown(directory.parent, 4711, 4712)
        with launched(*given(directory, self.PYTHON, script(tmp_path, COUNT), more=self.NOBODY)):
            (name,) = names(directory)
            for path in (directory, directory / name):
                assert (path.stat().st_uid, path.stat().st_gid) == (4711, 4712)

    def test_code_of_the_users_own_is_refused(self, directory: Path, tmp_path: Path) -> None:
        path = script(tmp_path, COUNT)
        os.chown(path, 65534, 65534)
        ended = run(*given(directory, self.PYTHON, path, more=self.NOBODY))
        assert ended.returncode == 4
        assert "can be written by others" in ended.stderr

    def test_not_root(self, directory: Path, tmp_path: Path) -> None:
        """Asked by somebody who is not root."""
        child = os.fork()
        if child == 0:
            ctypes.CDLL(None).setuid(65534)
            try:
                Account.find("nobody", None)
            except Refused:
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
