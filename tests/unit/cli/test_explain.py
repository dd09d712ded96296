"""whoami, whois and explain, typed by somebody and answered by a real agent over its real sockets."""

import asyncio
import json
import os
import re
import sys
from typing import NamedTuple

import pytest

from broker._proto.broker.agent.v1 import admin_pb2
from broker.cli.explanations import explanation_lines
from broker.cli.main import main
from broker.cli.options import Settings
from broker.cli.output import Output
from tests.fakes.fake_server import entry_message
from tests.fakes.running_agent import ME, estate

OTHER = entry_message("other", "/wl/other", [ME, "unix:uid:4000000001"])
PID = str(os.getpid())


class Typed(NamedTuple):
    out: str
    err: str


async def typed(agent, *arguments: str, code: int = 0) -> Typed:
    """Run one command line in a process of its own; it must end with this exit code."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "broker.cli.main", *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "SPIFFE_ENDPOINT_SOCKET": f"unix:{agent.socket}"},
    )  # fmt: skip
    out, err = await process.communicate()
    assert process.returncode == code, (arguments, out, err)
    return Typed(out.decode(), err.decode())


async def test_whoami() -> None:
    async with estate() as agent:
        out, _ = await typed(agent, "whoami", "-o", "json")
        (mine,) = json.loads(out)["items"]
        assert mine["spiffe_id"] == "spiffe://example.org/wl/me"
        assert mine["not_after"].endswith("Z")
        assert "SPIFFE ID" in (await typed(agent, "whoami")).out
        assert (await typed(agent, "whoami", "-o", "name")).out == "identity/spiffe://example.org/wl/me\n"


async def test_whoami_is_told_no_reason_and_the_operator_is() -> None:
    async with estate(entries=(OTHER,), first_identity_wait="1ms") as agent:
        out, err = await typed(agent, "whoami", "-o", "json", code=4)
        assert out == ""
        error = json.loads(err.strip().splitlines()[-1])["error"]
        assert (error["code"], error["message"]) == ("no_identity_issued", "no identity issued")
        assert "4000000001" not in err.split('"error"')[1]
        denial_id = re.search(r"broker explain denial ([0-9a-f]{8})$", error["hint"])[1]

        out, _ = await typed(agent, "explain", "denial", denial_id)
        assert out.startswith(f"denial {denial_id}  20")
        assert "lacks unix:uid:4000000001 (kernel)" in out
        told = json.loads((await typed(agent, "explain", "denial", denial_id, "-o", "json")).out)
        assert (told["kind"], told["id"], told["code"]) == ("denial", denial_id, "no_identity_issued")
        assert told["entries"][0]["lacks"] == [{"selector": "unix:uid:4000000001", "strength": "kernel"}]
        _, err = await typed(agent, "explain", "denial", "00000000", "-o", "json", code=3)
        assert "denial_not_known" in err


async def test_explain_identity() -> None:
    async with estate(entries=(OTHER,)) as agent:
        lines = (await typed(agent, "explain", "identity", "--pid", PID)).out.splitlines()
        assert lines[0].startswith(f"process {PID}  /")
        assert lines[0].endswith("(pidfd held: yes)")
        assert lines[1] == "attestors"
        assert re.match(rf"  ok        unix  .*uid:{os.geteuid()}.* \(kernel\)$", lines[2])
        assert lines[3:6] == [
            "entries of this agent: 1 of 1 shown",
            "  no  other  spiffe://example.org/wl/other  lacks unix:uid:4000000001 (kernel)",
            "result: no identity issued (PermissionDenied)",
        ]
        assert lines[6].startswith("most likely: entry other is the nearest")

        told = json.loads((await typed(agent, "explain", "identity", "--pid", PID, "-o", "json")).out)
        assert told["kind"] == "identity_explanation"
        assert told["process"]["pid"] == os.getpid()
        assert told["attestors"][0]["state"] == "ok"
        assert {"selector": ME, "strength": "kernel"} in told["attestors"][0]["selectors"]

        both = f"{ME}, unix:uid:4000000001"
        out, _ = await typed(agent, "explain", "identity", "--selectors", both)
        assert "  yes  other  spiffe://example.org/wl/other  selectors match" in out.splitlines()
        assert "result: 1 identity (OK)" in out
        out, _ = await typed(agent, "explain", "identity", "--entry", "other", "-o", "json")
        assert json.loads(out)["code"] == "issued"
        out, _ = await typed(agent, "explain", "identity", "--selectors", ME, "--entry", "other")
        assert "lacks unix:uid:4000000001" in out
        await typed(agent, "explain", "identity", "--entry", "nowhere", code=3)


@pytest.mark.parametrize(
    "arguments", [[], ["--pid", "1", "--selectors", "a:b"], ["--pid", "0"], ["--selectors", " , "]]
)
def test_questions_that_are_none(arguments, capsys) -> None:
    assert main(["explain", "identity", *arguments]) == 2
    assert capsys.readouterr().err


async def test_whois() -> None:
    async with estate() as agent, agent.workload():
        await typed(agent, "whois", PID, code=3)
        await agent.x509()
        found = json.loads((await typed(agent, "whois", PID, "-o", "json")).out)["items"]
        assert found[0]["spiffe_id"] == "spiffe://example.org/wl/me"
        assert found[0]["pidfd_held"]
        assert found[0]["x509_not_after"]
        assert "e1" in (await typed(agent, "whois", PID)).out


def test_nobody_there_is_75(capsys, tmp_path) -> None:
    assert main(["whois", "1", "--socket", str(tmp_path / "no.sock")]) == 75
    assert "admin socket" in capsys.readouterr().err


def test_where_the_admin_socket_is(monkeypatch) -> None:
    monkeypatch.delenv("SPIFFE_ENDPOINT_SOCKET", raising=False)
    assert Settings().agent_admin_socket() == "/run/broker/agent/private/admin.sock"
    monkeypatch.setenv("SPIFFE_ENDPOINT_SOCKET", "unix:///tmp/spire-agent/public/api.sock")
    assert Settings().agent_admin_socket() == "/tmp/spire-agent/private/admin.sock"
    assert Settings(socket="/x/admin.sock").agent_admin_socket() == "/x/admin.sock"


def test_a_process_cannot_write_lines_of_its_own(capsys) -> None:
    process = admin_pb2.Process(pid=7, executable="/x\nresult: 1 identity (OK)\x1b[2J")
    told = admin_pb2.Explanation(process=process, message="no identity issued", status="PERMISSION_DENIED")
    Output().lines(explanation_lines(told))
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 2
    assert "\x1b" not in out
