"""``broker demo`` as a stranger runs it: every step holds, twice; what goes wrong is named; nothing is left behind."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from broker.dev.demo import STEPS, Step, play

pytestmark = pytest.mark.timeout(240)
COMMAND = (sys.executable, "-m", "broker.cli.main", "demo")
NAMES = [name for name, _, _ in STEPS]


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Where the demo puts what it needs: empty again afterwards."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield Path(name)
        assert list(Path(name).iterdir()) == []


def environment(temporary: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(temporary)}


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in {"Z", "X"}
    except OSError:
        return True


def wait_until_gone(pids: Sequence[int]) -> None:
    deadline = time.monotonic() + 10
    while not all(is_gone(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("turn", ["first", "second"])
def test_every_step_holds(turn: str, temporary: Path) -> None:
    ended = subprocess.run(
        [*COMMAND, "-o", "json"], capture_output=True, text=True, check=False, env=environment(temporary)
    )
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert (told["kind"], told["held"]) == ("demo", True)
    assert [step["step"] for step in told["items"]] == NAMES
    assert all(step["held"] and len(step["lines"]) <= 20 for step in told["items"])
    judge({step["step"]: step["facts"] for step in told["items"]})
    assert re.search(r"eyJ[A-Za-z0-9_-]+\.eyJ", ended.stdout + ended.stderr) is None
    wait_until_gone(list(told["items"][0]["facts"]["pids"].values()))


def judge(facts: dict[str, Any]) -> None:
    pod = facts["attestation"]["pod"]
    token = facts["token"]["claims"]
    assert facts["attestation"]["stranger"]["code"] == "no_identity_issued"
    assert facts["attestation"]["jwt_svid"]["claims"]["sub"] == pod["spiffe_id"]
    assert facts["user"]["claims"]["sub"] == token["sub"] == "alice"
    assert token["client_id"] == token["act"]["sub"] == pod["spiffe_id"]
    assert token["cnf"]["x5t#S256"] == pod["x5t"]
    assert token["task"]["id"] == facts["task"]["task"]
    assert facts["accepted"]["status"] == 200
    assert facts["neighbour"]["spiffe_id"] == pod["spiffe_id"]
    assert facts["neighbour"]["refusal"]["code"] == "binding_mismatch"
    assert set(facts["widened"]["at_the_broker"].values()) == {
        "invalid_authorization_details",
        "invalid_scope",
        "invalid_target",
    }
    assert [one["status"] for one in facts["widened"]["at_the_service"].values()] == [403, 403, 401]
    assert {one["code"] for one in facts["altered"].values()} == {"token_signature"}
    end = facts["end"]
    assert (end["state"], end["refusal"]["code"], end["another_token"]) == ("completed", "task_ended", "task_ended")
    assert end["accepted"] >= 20
    assert end["refused_after_ms"] < 10_000


async def test_an_interpreter_that_is_not_there_fails_the_first_step() -> None:
    told: list[Step] = []

    async def tell(step: Step) -> None:
        told.append(step)

    steps = await play(tell, python="/nonexistent/python")
    assert list(steps) == told
    assert [(step.step, step.held) for step in steps] == [("estate", False)]
    assert "/nonexistent/python cannot be run" in str(steps[0].failure)


class Telling:
    """A demo that runs: its pids are known once the first step is told."""

    def __init__(self, temporary: Path) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "--fast"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(temporary),
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.pids: dict[str, int] = {}
        for line in self.process.stdout:
            if match := re.match(r" +(issuer|server|agent) +pid ([0-9]+),", line):
                self.pids[match[1]] = int(match[2])
            if line.startswith("      ["):
                return

    def ended(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out, err


def test_a_dead_server_fails_a_step_by_name(temporary: Path) -> None:
    telling = Telling(temporary)
    os.kill(telling.pids["server"], signal.SIGKILL)
    code, out, err = telling.ended()
    assert code == 1
    failed = re.search(r"error: the step ([a-z]+) did not hold", err)
    assert failed is not None
    assert failed[1] in NAMES[1:]
    assert "[DID NOT HOLD" in out
    wait_until_gone(list(telling.pids.values()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(number: signal.Signals, temporary: Path) -> None:
    telling = Telling(temporary)
    telling.process.send_signal(number)
    code, _, err = telling.ended()
    assert code == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    wait_until_gone(list(telling.pids.values()))
