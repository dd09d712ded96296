"""Approvals as operators and people meet them at the command: a real server, its admin socket, ``broker approval``, and an agent that waits."""

import asyncio
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from broker._proto.broker.server.v1 import approvals_pb2
from broker._proto.service import Stub
from broker.audit.events import Event
from broker.client import Approvals, dial_socket
from broker.server.api.grpc import approvals
from broker.server.app import Server
from broker.transport.rpc_errors import from_rpc_error
from tests.attacks.tasks.approval_rig import BANK, TRANSFER, Bank, bank, payment
from tests.fakes.oidc import OidcIssuer
from tests.integration.identity_rig import DEADLINE, Estate, admin_channel
from tests.integration.test_token_endpoint import TRIAGE, Process

pytestmark = pytest.mark.timeout(180)  # a dozen commands, each a process


@pytest.fixture
def estate(request: pytest.FixtureRequest) -> Iterator[Estate]:
    # Short: a Unix socket's path has at most 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="broker", dir="/tmp"))
    yield Estate(directory)
    shutil.rmtree(directory)


@pytest.fixture
def oidc(tmp_path: Path) -> Iterator[OidcIssuer]:
    with OidcIssuer.start(tmp_path) as issuer:
        yield issuer


@pytest.fixture
async def ground(estate: Estate, oidc: OidcIssuer) -> AsyncIterator[Bank]:
    async with bank(estate, oidc) as one:
        yield one


@pytest.fixture
async def agent(ground: Bank) -> AsyncIterator[Process]:
    async with ground.rig.agent(TRIAGE, "ws_triage") as one:
        yield one


async def shell(
    one: Server, *arguments: str, stdin: str = "", code: int = 0, cwd: Path | None = None
) -> tuple[str, str]:
    """Run the command as an operator on this machine does; give what it wrote to both."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "broker.cli.main", *arguments, "--yes", cwd=cwd,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "BROKER_SERVER_SOCKET": f"unix://{one.socket_path}"},
    )  # fmt: skip
    out, err = await asyncio.wait_for(child.communicate(stdin.encode()), DEADLINE)
    assert child.returncode == code, (out, err)
    return out.decode(), err.decode()


async def ran(one: Server, *arguments: str, stdin: str = "", code: int = 0) -> tuple[str, str]:
    return await shell(one, "approval", *arguments, stdin=stdin, code=code)


async def told(one: Server, *arguments: str, stdin: str = "") -> Any:
    out, _ = await ran(one, *arguments, "-o", "json", stdin=stdin)
    return json.loads(out)


async def refused(one: Server, *arguments: str, code: int, stdin: str = "") -> str:
    """Give the code of the error; there is a hint with each."""
    out, err = await ran(one, *arguments, "-o", "json", "-q", stdin=stdin, code=code)
    error = json.loads(err)["error"]
    assert (out, bool(error["hint"])) == ("", True)
    return str(error["code"])


@pytest.mark.bears("RV17", "RV18")
async def test_an_agent_waits_a_person_decides_and_it_is_done_once(
    ground: Bank, agent: Process, tmp_path: Path
) -> None:
    server, task = ground.rig.server, (await ground.start(agent)).id
    waits = await ground.ask_https(agent, task)
    assert (waits.status_code, waits.json()["error"]) == (400, "authorization_pending")
    [listed] = (await told(server, "list"))["items"]
    approval = listed["id"]
    assert approval == waits.json()["approval"]
    table, talk = await ran(server, "list", "--user", "alice", "--task", task)
    heading, line = table.splitlines()
    assert heading.split() == ["ID", "STATE", "USER", "AGENT", "AUDIENCE", "SCOPE", "EXPIRES"]
    assert line.split()[:6] == [approval, "pending", "alice", str(TRIAGE), BANK, TRANSFER]
    assert "next: broker approval show ID" in talk
    shown, talk = await ran(server, "show", approval)
    for text in (
        "pay the invoice",
        "payments",
        '  max_amount: {"amount":"100","currency":"EUR"}',
        "  recipient_domain: shop.example",
    ):
        assert text in shown
    assert f"next: broker approval approve {approval}" in talk

    # Who it is done for, and no token at all, say no yes; the token may come by standard input.
    own = await refused(server, "approve", approval, "--user-token-file", "-", stdin=ground.person("alice"), code=4)
    assert own == "approver_is_requester"
    word = tmp_path / "carol"
    word.write_text(ground.person())
    said = ["--user-token-file", str(word), "--reason", "invoice seen", "--use-within", "1m"]
    given = await told(server, "approve", approval, *said)
    assert (given["state"], given["decided_by"], given["reason"]) == ("approved", "carol", "invoice seen")
    assert not {"jti", "token", "approver"} & given.keys()

    issued = await ground.ask_https(agent, task)
    assert issued.status_code == 200, issued.text
    again = await ground.ask_https(agent, task)
    assert again.json()["error"] == "authorization_pending"
    assert again.json()["approval"] != approval
    states = {one["id"]: one["state"] for one in (await told(server, "list", "--state", "all"))["items"]}
    assert states == {approval: "used", again.json()["approval"]: "pending"}

    denied = await told(
        server, "deny", again.json()["approval"], "--user-token-file", str(word), "--reason", "one is enough"
    )
    assert (denied["state"], denied["decided_by"]) == ("denied", "carol")
    assert (await ground.ask_https(agent, task)).json()["error"] == "access_denied"
    assert (await told(server, "list"))["items"] == []

    [yes], [no] = ground.records(Event.APPROVAL_GIVEN), ground.records(Event.APPROVAL_DENIED)
    assert (yes.actor, yes.subject, yes.fields["approver"]) == ("carol", approval, "carol")
    assert (no.actor, no.subject) == ("carol", again.json()["approval"])
    [tried] = ground.records(Event.APPROVAL_REFUSED)
    operator = f"operator:uid:{os.geteuid()}"
    assert (tried.actor, tried.subject, tried.fields["code"]) == (operator, "alice", "approver_is_requester")


@pytest.mark.bears("RV18", "RV11")
async def test_an_operator_says_no_and_takes_back_and_never_says_yes(ground: Bank, agent: Process) -> None:
    server, task = ground.rig.server, (await ground.start(agent)).id
    operator = f"operator:uid:{os.geteuid()}"
    first = (await ground.ask_https(agent, task)).json()["approval"]
    second = (await ground.ask_https(agent, task, payment("200"))).json()["approval"]
    await ran(server, "approve", first, code=2)  # nothing without a person's token
    async with dial_socket(server.socket_path) as channel:
        with pytest.raises(Exception, match="needs the token") as caught:
            await Approvals(channel).approve(first, "")
    assert getattr(caught.value, "reason", "") == "user_token_missing"
    assert await refused(server, "withdraw", "apr_x", code=3) == "approval_unknown"
    assert await refused(server, "show", "apr_x", code=3) == "approval_unknown"

    no = await told(server, "deny", first, "--reason", "not this week")
    assert (no["state"], no["decided_by"]) == ("denied", operator)
    assert (await ground.ask_https(agent, task)).json()["error"] == "access_denied"

    assert (await ground.say(second)).status_code == 200
    issued = await ground.ask_https(agent, task, payment("200"))
    assert issued.status_code == 200, issued.text
    out, talk = await ran(server, "withdraw", second, "--reason", "wrong shop")
    assert "withdrawn" in out
    assert f"next: broker task show {task}" in talk
    [revoked] = ground.records(Event.TOKEN_REVOKED)
    assert revoked.fields["reasons"] == ("approval_withdrawn",)
    assert (await ground.ask_https(agent, task, payment("200"))).json()["error"] == "access_denied"
    # Said twice it is the same; a yes after a no there is none.
    assert (await told(server, "withdraw", second))["state"] == "withdrawn"
    late = await refused(server, "approve", second, "--user-token-file", "-", stdin=ground.person(), code=1)
    assert late == "approval_decided"
    denied, withdrawn = ground.records(Event.APPROVAL_DENIED), ground.records(Event.APPROVAL_WITHDRAWN)
    assert [(one.actor, one.subject) for one in (*denied, *withdrawn)] == [(operator, first), (operator, second)]
    codes = [(one.actor, one.fields["code"]) for one in ground.records(Event.APPROVAL_REFUSED)]
    assert codes == [(operator, "user_token_missing"), (operator, "approval_decided")]


@pytest.mark.bears("RV18")
async def test_only_operators_come_in_by_this_service(ground: Bank, agent: Process) -> None:
    """Not a node agent, and not a workload: they are where a person's token might lie about."""
    approval = (await ground.ask_https(agent, (await ground.start(agent)).id)).json()["approval"]
    calls: dict[str, Any] = {
        "ListApprovals": approvals_pb2.ListApprovalsRequest(),
        "GetApproval": approvals_pb2.GetApprovalRequest(id=approval),
        "ApproveApproval": approvals_pb2.ApproveApprovalRequest(id=approval, user_token=ground.person()),
        "DenyApproval": approvals_pb2.DenyApprovalRequest(id=approval),
        "WithdrawApproval": approvals_pb2.WithdrawApprovalRequest(id=approval),
    }
    assert set(calls) == set(approvals.BINDING.methods)
    for method, request in calls.items():
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await getattr(Stub(ground.rig.channel, approvals.BINDING), method)(request, timeout=DEADLINE)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert (await ground.seen(approval))["state"] == "pending"


async def test_a_list_comes_in_pages_of_what_is_asked_for(ground: Bank, agent: Process) -> None:
    task, other = (await ground.start(agent)).id, (await ground.start(agent)).id
    made = [(await ground.ask_https(agent, task, payment(str(n)))).json()["approval"] for n in range(1, 4)]
    made.append((await ground.ask_https(agent, other)).json()["approval"])
    async with admin_channel(ground.rig.server) as channel:
        stub, found, page = Stub(channel, approvals.BINDING), list[str](), ""
        while len(found) < 4:
            answer = await stub.ListApprovals(
                approvals_pb2.ListApprovalsRequest(page_size=1, page_token=page), timeout=DEADLINE
            )
            found += [one.id for one in answer.approvals]
            page = answer.next_page_token
        assert (found, page) == (made, "")
        cases = Approvals(channel)
        assert [one.id for one in await cases.list(task=other)] == made[3:]
        assert await cases.list(user="bob") == await cases.list(state="used") == []
        assert [one.id for one in await cases.list(state="pending", user="alice", task=task)] == made[:3]
        for wrong, code in (
            (approvals_pb2.ListApprovalsRequest(state="open"), "invalid_state"),
            (approvals_pb2.ListApprovalsRequest(page_size=-1), "invalid_page_size"),
            (approvals_pb2.ListApprovalsRequest(page_token="x"), "invalid_page_token"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.ListApprovals(wrong, timeout=DEADLINE)
            assert from_rpc_error(caught.value).reason == code
        one = await cases.get(made[0])
        assert (one.user, one.agent, one.scope, one.decided_at, one.used_at) == ("alice", str(TRIAGE), TRANSFER, 0, 0)
        assert json.loads(one.authorization_details) == payment("1")
        assert 0 <= int(time.time()) - one.created_at < DEADLINE
