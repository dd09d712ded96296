"""A process is ended only when it is still the one that was started."""

import os
import subprocess
import sys
import time
from pathlib import Path

from broker.dev.processes import Started, end, identify, is_running, launch, tail

SLEEPER = (sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)")
STUBBORN = (
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)",
)


def started(arguments: tuple[str, ...], log: Path) -> tuple[subprocess.Popen[bytes], Started]:
    child = launch(arguments, log=log, environment=os.environ)
    deadline = time.monotonic() + 20
    while "up" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    identity = identify(child.pid)
    assert identity is not None
    return child, identity


def test_started_and_ended(tmp_path: Path) -> None:
    child, identity = started(SLEEPER, tmp_path / "log")
    assert is_running(identity)
    end(identity)
    assert child.wait() == -15
    assert not is_running(identity)
    end(identity)


def test_a_zombie_does_not_run(tmp_path: Path) -> None:
    child, identity = started(SLEEPER, tmp_path / "log")
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not is_running(identity)
    child.wait()


def test_one_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    child, identity = started(STUBBORN, tmp_path / "log")
    end(identity, grace=0.1)
    assert child.wait() == -9


def test_another_process_with_the_pid_is_left_alone(tmp_path: Path) -> None:
    child, identity = started(SLEEPER, tmp_path / "log")
    end(Started(identity.pid, identity.start_time - 1))
    assert is_running(identity)
    end(identity)
    child.wait()


def test_the_log_is_private_and_its_tail_is_told(tmp_path: Path) -> None:
    log = tmp_path / "log"
    child, identity = started(SLEEPER, log)
    end(identity)
    child.wait()
    assert log.stat().st_mode & 0o777 == 0o600
    log.write_text("\n".join(f"line {n}" for n in range(40)))
    assert tail(log).splitlines() == [f"  line {n}" for n in range(28, 40)]
    assert "no log" in tail(tmp_path / "none")
