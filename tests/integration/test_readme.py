"""Every line of the README that can be run is run."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from broker.dev.stage import Stage
from broker.sdk import Workload
from tests.integration.test_spiffe_client import register

README = Path(__file__).resolve().parents[2] / "README.md"
TEXT = README.read_text(encoding="utf-8")
SESSION = re.search(r"```console\n(.*?)```", TEXT, re.DOTALL)[1]
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
VARYING = [
    (r"[0-9a-f]{32}", "<id>"),
    (r"denial [0-9a-f]{8}", "denial <id>"),
    (r"\d{4}-\d\d-\d\dT[\d:]+Z", "<time>"),
    (r"unix://\S+", "<socket>"),
    (r"(https://[a-z0-9.]+):\d+", r"\1:<port>"),
    (r"running  +\d+ +", "running <pid> "),
    (r"unix:uid:\d+", "unix:uid:<uid>"),
    (r"[ -]+$", ""),
    (r"(DETAIL|ADDRESS) *", r"\1 "),
    (r" {2,}", "  "),
]


def plain(text: str) -> list[str]:
    for pattern, word in VARYING:
        text = re.sub(pattern, word, text, flags=re.MULTILINE)
    return [line.rstrip() for line in text.splitlines()]


@pytest.mark.timeout(120)
def test_the_session_is_what_a_reader_sees() -> None:
    state = tempfile.mkdtemp(prefix="readme-", dir="/tmp")
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("BROKER_", "SPIFFE_"))}
    environment |= {
        "XDG_STATE_HOME": state, "SHELL": "/bin/bash", "NO_COLOR": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    commands = [line[2:] for line in SESSION.splitlines() if line.startswith("$ ")]
    enter = commands.index("broker dev shell")
    inside = "\n".join(f"echo '$ '{_quoted(c)}\n{c}" for c in commands[enter + 1 : -1])

    def run(command: str, given: str = "") -> str:
        done = subprocess.run(
            ["bash", "-c", f"{command} 2>&1"], input=given, capture_output=True, text=True, env=environment,
            cwd=state, timeout=60, check=False,
        )  # fmt: skip
        return done.stdout

    try:
        seen = [f"$ {commands[0]}", *run(commands[0]).splitlines(), f"$ {commands[enter]}"]
        seen += run(commands[enter], inside).splitlines()
        seen += [f"$ {commands[-1]}", *run(commands[-1]).splitlines()]
    finally:
        run("broker dev down")
        shutil.rmtree(state)
    seen_lines = plain("\n".join(seen))
    missing = [line for line in plain(SESSION) if line not in seen_lines]
    assert missing == [], "\n".join(seen)


def _quoted(command: str) -> str:
    return "'" + command.replace("'", "'\\''") + "'"


@pytest.mark.timeout(120)
async def test_the_python_is_what_a_reader_types(estate: Stage, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    await register(estate, "spiffe://dev.test/agent/triage", may_start_tasks=True)
    monkeypatch.setenv("SPIFFE_ENDPOINT_SOCKET", f"unix://{estate.estate.layout.agent_socket}")
    audience = estate.service_url
    issuer = estate.estate.require_record().ports.server_url
    agent, service = (
        s.replace("https://tickets.dev.test", audience).replace("https://broker.example.org:8443", issuer)
        for s in SNIPPETS
    )
    async with Workload.connect() as me:
        connection = (await me.identity()).tls.chain_der
    # What the service does happens within the agent's block: after it, the token is dead.
    inner = "\n".join(
        " " * 8 + line for line in ("connection = (await me.identity()).tls.chain_der", *service.splitlines())
    )
    names: dict[str, object] = {"user_token": estate.estate.user_token("alice"), "connection": connection}
    body = "\n".join(
        " " * 4 + line for line in (agent.rstrip() + "\n" + inner + "\n        await verifier.aclose()").splitlines()
    )
    exec(f"async def story():\n{body}\n", names)
    async with asyncio.timeout(60):
        await names["story"]()  # type: ignore[operator]
    assert "alice spiffe://dev.test/agent/triage tsk_" in capsys.readouterr().out


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) <= 150
