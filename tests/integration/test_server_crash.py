"""The server is killed between commit and answer: nothing acknowledged is lost, and the same verifier goes on."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from broker.dev.demo_task import TICKET, accepted
from broker.dev.processes import is_running
from broker.dev.stage import OTHER_AUDIENCE, Process, Stage

DEADLINE = 30.0
PATH = f"/tickets/{TICKET}"


async def until(condition, what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not await condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.05)


@contextmanager
def failing_server(stage: Stage, failpoint: str) -> Iterator[subprocess.Popen[bytes]]:
    """The same server on the same files, with one place at which it dies."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")}
    environment |= {"BROKER_FAILPOINTS": failpoint, "BROKER_SERVER__ALLOW_FAILPOINTS": "true"}
    program = (
        stage.python,
        "-m",
        "broker.cli.main",
        "server",
        "run",
        "--config",
        str(stage.estate.layout.server_config),
    )
    log = stage.estate.layout.directory / "failing-server.log"
    with log.open("wb") as output, subprocess.Popen(program, env=environment, stdout=output, stderr=output) as server:
        try:
            yield server
        finally:
            server.kill()


async def kill_server(stage: Stage) -> None:
    server = stage.estate.require_record().parts["server"]
    os.kill(server.pid, signal.SIGKILL)
    stage.estate._children["server"].wait()
    assert not is_running(server)


def tokens_of(stage: Stage, resource: str) -> int:
    database = next(stage.estate.layout.data("server").glob("*.db"))
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        return connection.execute("SELECT count(*) FROM tokens WHERE resource = ?", (resource,)).fetchone()[0]


async def issued_again(pod: Process) -> str:
    """A token of the restarted server. A verifier goes on before the agent's own channel has come back (it waits out a
    back-off): until then the pod is told that the server is unavailable, and nothing else."""
    deadline = time.monotonic() + DEADLINE
    while "error" in (answer := await pod.try_("token", resource=OTHER_AUDIENCE)):
        assert answer["error"]["code"] == "unavailable", answer
        assert time.monotonic() < deadline, "the agent never came back to the restarted server"
        await asyncio.sleep(0.05)
    return answer["token"]


@pytest.mark.timeout(180)
@pytest.mark.bears("D01", "TX28", "RV09")
async def test_a_kill_between_commit_and_answer_loses_nothing(stage: Stage) -> None:
    pod: Process = stage.kept["pod"]
    url, first = stage.service_url, stage.kept["token"]
    await accepted(stage)
    issued_before = tokens_of(stage, url)
    assert issued_before == 1

    await kill_server(stage)
    with failing_server(stage, "exchange.after_commit=exit") as server:

        async def died() -> bool:
            answer = await pod.try_("token", resource=OTHER_AUDIENCE)
            # Whatever the pod is told while servers come and go, it is never a token: the answer never left.
            assert "error" in answer
            return server.poll() is not None

        await until(died, "the failing server never reached the exchange")
        assert server.returncode == 137
    assert tokens_of(stage, OTHER_AUDIENCE) == 1, "what was committed before the crash is there"
    assert tokens_of(stage, url) == issued_before, "what was acknowledged before the crash is there"

    await stage.estate.up(lambda _: None)

    async def goes_on() -> bool:
        answer = await pod.try_("present", url=url, method="GET", path=PATH, token=first)
        return answer.get("status") == 200

    await until(goes_on, "the verifier that saw two crashes never accepted the old token again")
    fresh = await issued_again(pod)

    async def judged() -> bool:
        # The verifier's own stream comes back in its own time: meanwhile it hears nothing or lacks the key, and refuses.
        stolen = await pod.do("present", url=url, method="GET", path=PATH, token=fresh)
        found = (stolen["status"], stolen["body"]["code"])
        deaf = {(401, "token_key_unknown"), (503, "feed_stale"), (503, "feed_partitioned")}
        assert found in {(401, "token_audience"), *deaf}, found
        return found == (401, "token_audience")

    await until(judged, "signed by the new key, and never judged")

    assert (await pod.do("complete"))["state"] == "completed"

    async def dead() -> bool:
        answer = await pod.do("present", url=url, method="GET", path=PATH, token=first)
        return (answer["status"], answer["body"].get("code")) == (401, "task_ended")

    await until(dead, "the end never reached the verifier after the restart")
