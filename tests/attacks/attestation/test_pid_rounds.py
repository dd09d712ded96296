"""Process ids that are used again, by the thousand (A02, A03, A04).

ATTACK_SECONDS sets how long the storm lasts in which numbers come again by themselves; 600 is the full length.
"""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.attacks.attestation import wire
from tests.attacks.attestation.arena import (
    BOUND,
    BYSTANDER,
    EVIL_UID,
    UID,
    VICTIM,
    Arena,
    prepared,
)
from tests.fakes.processes import AGENT

STORM = float(os.environ.get("ATTACK_SECONDS", "10"))
ROUNDS = {"before accept": 4000, "racing": 3000, "after accept": 1500, "after preface": 1500}
HONEST = json.dumps([wire.SERVED, [VICTIM]])
NEW_NUMBERS = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


def config(it: Arena) -> Path:
    """What the first process of the namespace is told."""
    (it.directory / "agent.toml").write_text(it.text)
    credulous = {
        how: it.command(
            it.evil, "credulous.py", str(it.directory / how), how, str(UID), str(it.victim), VICTIM, "0.002"
        )
        for how in ("number", "start-time")
    }
    path = it.directory / "rounds.json"
    path.write_text(
        json.dumps(
            {
                "agent": [sys.executable, "-c", AGENT, str(it.directory / "agent.toml")],
                "agent_environ": dict(os.environ),
                "cwd": str(Path(__file__).resolve().parents[3]),
                "log": str(it.directory / "agent.log"),
                "victims": it.command(it.victim, "victims.py", str(UID), it.socket),
                "bystander": it.command(it.bystander, "bystander.py", it.socket, BYSTANDER),
                "credulous": credulous,
                "environ": it.environ,
                "socket": it.socket,
                "uid": UID,
                "uids": [UID, EVIL_UID],
                "rounds": ROUNDS,
                "seconds": STORM,
                "control_seconds": 60,
                "honest": HONEST,
            }
        )
    )
    return path


@pytest.mark.root("a pid namespace, processes of other users, chosen process ids")
@pytest.mark.bears("A02", "A03", "A04", "SP08")
@pytest.mark.timeout(400 + STORM)
async def test_no_number_that_is_used_again_gives_an_identity() -> None:
    async with prepared() as it:
        first = await asyncio.create_subprocess_exec(
            *NEW_NUMBERS, *it.command(it.evil, "pid_rounds.py", str(config(it))),
            stdout=subprocess.PIPE, env=it.environ,
        )  # fmt: skip
        said = await first.stdout.read()
        assert await first.wait() == 0, (it.directory / "agent.log").read_text()
        report = json.loads(said)
        log = (it.directory / "agent.log").read_text()

    print(json.dumps(report, indent=1))
    _the_harness_has_teeth(report)
    # The victim has what it is entitled to, before and after …
    assert report["served_before"] == report["served_after"] == [wire.SERVED, [VICTIM]]
    # … and whoever had its number never.
    refused = {json.dumps([wire.CLOSED, None]), json.dumps([wire.STATUS, 7]), json.dumps([wire.STATUS, 14])}
    assert sum(report["answers"].values()) >= 10_000
    assert set(report["answers"]) <= refused
    assert set(report["storm"]["answers"]) <= refused
    assert report["storm"]["overlaps"] > 0
    assert report["agent_ended"] is None
    assert report["descriptors"][1] <= report["descriptors"][0] + 5
    assert "Traceback" not in log
    assert not report["bystander"]["failed"]
    assert report["bystander"]["p99"] < BOUND


def _the_harness_has_teeth(report: dict) -> None:
    control = report["control"]
    fooled = {(how, kind): answers.get(HONEST, 0) for how, kinds in control.items() for kind, answers in kinds.items()}
    # Whoever trusts the number is fooled by both; who remembers the start time only by what happens before accept.
    assert fooled["number", "before accept"] == fooled["number", "after accept"] == 50
    assert fooled["start-time", "before accept"] == 50
    assert fooled["start-time", "after accept"] == 0
    assert report["control_storm"]["answers"].get(HONEST, 0) > 0
