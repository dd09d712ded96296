"""``broker.server.v1.Tasks``: what node agents and operators say on the wire, and what they get."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from broker._proto.broker.server.v1 import sessions_pb2, tasks_pb2
from broker.errors import Conflict, Invalid, NotFound, PolicyDenied, Refused
from broker.server.api.access import LocalPeer
from broker.server.api.grpc import vouched
from broker.server.api.grpc.tasks import Tasks
from broker.spiffe import BundleSet, verify_x509_svid
from broker.transport.tls import Anonymous, SvidPeer
from tests.unit.server.tasks.estate import AGENT, NODE, OTHER_NODE, TICKETS, X5T, Estate, detail
from tests.unit.transport.pki import Authority

OPERATOR = LocalPeer(0, 1)


@pytest.fixture
def service(estate: Estate) -> Tasks:
    return Tasks(
        store=estate.store, clock=estate.clock, exchange=estate.exchange, assertions=estate.assertions, lifecycle=estate.lifecycle,
        changes=estate.changes, feed=estate.feed,
        refusals=estate.refusals,
        supervisor=estate.supervisor,
    )  # fmt: skip


def agent(spiffe_id: Any = NODE) -> SvidPeer:
    authority = Authority("example.org")
    chain = list(authority.issue(str(spiffe_id)).chain_der)
    return SvidPeer(verify_x509_svid(chain, BundleSet.of(authority.bundle), now=datetime.now(UTC)))


def workload(estate: Estate, **fields: Any) -> sessions_pb2.WorkloadSession:
    not_after = int(estate.clock.now().timestamp()) + 3600
    good = {"id": "ws_1", "spiffe_id": str(AGENT), "entry_id": "entry-1", "x5t": X5T, "not_after": not_after}
    return sessions_pb2.WorkloadSession(**(good | fields))


def start_request(estate: Estate, **fields: Any) -> tasks_pb2.StartTaskRequest:
    good: dict[str, Any] = {
        "workload": workload(estate),
        "user_token": estate.user_token(),
        "purpose": "triage",
        "authorization_details": json.dumps([detail()]),
    }
    return tasks_pb2.StartTaskRequest(**(good | fields))


async def test_a_task_from_start_to_end(estate: Estate, service: Tasks) -> None:
    caller = agent()
    request = start_request(estate, ttl=60, idempotency_key="k", supervision="attached", limits="{}")
    task = await service.StartTask(request, None, caller)  # type: ignore[arg-type]
    assert (task.user, task.agent, task.state, task.depth, task.root) == ("alice", str(AGENT), "active", 0, task.id)
    assert task.expires_at - task.created_at == 60
    assert json.loads(task.authorization_details) == [detail()]
    issue = tasks_pb2.IssueTokenRequest(
        workload=workload(estate), task_id=task.id, resource=TICKETS.text, scope="ticket.read"
    )
    issued = await service.IssueToken(issue, None, caller)  # type: ignore[arg-type]
    assert (issued.token_type, issued.scope, issued.task_id) == ("Bearer", "ticket.read", task.id)
    claims = estate.verify(issued.access_token).claims
    assert (claims.cnf.x5t, claims.cnf.session, claims.exp) == (X5T, "ws_1", issued.expires_at)
    shown = await service.GetTask(tasks_pb2.GetTaskRequest(id=task.id), None, OPERATOR)  # type: ignore[arg-type]
    assert (shown.tokens_issued, shown.ended_seq) == (1, 0)
    complete = tasks_pb2.CompleteTaskRequest(workload=workload(estate), task_id=task.id, expected_version=1)
    over = await service.CompleteTask(complete, None, caller)  # type: ignore[arg-type]
    assert (over.state, over.cause, over.version) == ("completed", "completed", 2)
    assert over.ended_seq == estate.feed.frame_of(task.id) > 0
    again = await service.CompleteTask(
        tasks_pb2.CompleteTaskRequest(workload=workload(estate), task_id=task.id), None, caller,  # type: ignore[arg-type]
    )  # fmt: skip
    assert again == over


async def test_operators_list_and_revoke(estate: Estate, service: Tasks) -> None:
    tasks = [await estate.start() for _ in range(3)]

    async def listed(**fields: Any) -> tasks_pb2.ListTasksResponse:
        return await service.ListTasks(tasks_pb2.ListTasksRequest(**fields), None, OPERATOR)  # type: ignore[arg-type]

    first = await listed(page_size=2)
    second = await listed(page_size=2, page_token=first.next_page_token)
    assert {task.id for task in (*first.tasks, *second.tasks)} == {task.id for task in tasks}
    assert second.next_page_token == ""
    revoke = tasks_pb2.RevokeTaskRequest(task_id=tasks[0].id, reason="wrong user")
    over = await service.RevokeTask(revoke, None, OPERATOR)  # type: ignore[arg-type]
    assert (over.state, over.cause) == ("revoked", "operator")
    (record,) = await estate.records("task_ended")
    assert (record.actor, record.fields["reasons"]) == ("operator:uid:0", ("wrong user",))
    assert len((await listed(state="live")).tasks) == 2
    assert [task.id for task in (await listed(state="revoked")).tasks] == [tasks[0].id]
    assert len((await listed(user="alice", agent=str(AGENT))).tasks) == 3
    assert len((await listed(user="bob")).tasks) == 0
    for bad in ({"state": "nothing"}, {"page_size": -1}, {"page_token": "x"}, {"agent": "x"}):
        with pytest.raises(Invalid):
            await listed(**bad)
    stale = tasks_pb2.RevokeTaskRequest(task_id=tasks[1].id, expected_version=9)
    with pytest.raises(Conflict):
        await service.RevokeTask(stale, None, OPERATOR)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"id": ""}, Invalid),
        ({"id": "a b"}, Invalid),
        ({"x5t": "x"}, Invalid),
        ({"entry_id": ""}, Invalid),
        ({"not_after": 0}, Invalid),
        ({"not_after": 1}, Refused),
        ({"spiffe_id": "x"}, Invalid),
        ({"spiffe_id": "spiffe://example.org/other"}, Refused),
        ({"entry_id": "entry-2"}, Refused),
    ],
)
async def test_half_a_workload_is_none(
    estate: Estate, service: Tasks, fields: dict[str, Any], kind: type[Exception]
) -> None:
    request = start_request(estate, workload=workload(estate, **fields))
    with pytest.raises(kind):
        await service.StartTask(request, None, agent())  # type: ignore[arg-type]


async def test_only_its_own_node_agent_speaks_for_a_workload(estate: Estate, service: Tasks) -> None:
    for caller in (agent(OTHER_NODE), agent(AGENT), OPERATOR, Anonymous()):
        with pytest.raises(Refused):
            await service.StartTask(start_request(estate), None, caller)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "kind", "code"),
    [
        ({"authorization_details": ""}, Invalid, "invalid_authorization_details"),
        ({"user_token": ""}, Invalid, "user_token_missing"),
        ({"supervision": "leash"}, Invalid, "invalid_supervision"),
        ({"supervision": "none"}, PolicyDenied, "unsupervised_not_allowed"),
        ({"limits": '{"max_calls": 1}'}, PolicyDenied, "unmetered_limit"),
        ({"ttl": -1}, Invalid, "invalid_ttl"),
    ],
)
async def test_faults_of_a_start_are_refused_and_recorded(
    estate: Estate, service: Tasks, fields: dict[str, Any], kind: type[Exception], code: str
) -> None:
    with pytest.raises(kind) as caught:
        await service.StartTask(start_request(estate, **fields), None, agent())  # type: ignore[arg-type]
    assert caught.value.reason == code  # type: ignore[attr-defined]
    (record,) = await estate.records("task_refused")
    assert (record.fields["reason"], record.fields["node"]) == (code, str(NODE))


async def test_a_task_that_is_not_there(estate: Estate, service: Tasks) -> None:
    for task_id in ("", "tsk_unknown", "eyJhbGciOiJFUzI1NiJ9.e30.x"):
        issue = tasks_pb2.IssueTokenRequest(workload=workload(estate), task_id=task_id, resource=TICKETS.text)
        with pytest.raises((NotFound, Invalid)):
            await service.IssueToken(issue, None, agent())  # type: ignore[arg-type]
        with pytest.raises(NotFound):
            await service.GetTask(tasks_pb2.GetTaskRequest(id=task_id), None, OPERATOR)  # type: ignore[arg-type]
        with pytest.raises(NotFound):
            await service.RevokeTask(tasks_pb2.RevokeTaskRequest(task_id=task_id), None, OPERATOR)  # type: ignore[arg-type]


async def test_what_an_agent_says_again_is_read_once_and_is_never_another_agents_word(estate: Estate) -> None:
    said, here, elsewhere = workload(estate), agent(), agent(OTHER_NODE)
    actor = vouched.vouched(said, here)
    assert vouched.vouched(workload(estate), here) is actor
    assert (actor.agent, vouched.vouched(said, elsewhere).agent) == (NODE, OTHER_NODE)
    assert vouched.vouched(workload(estate, id="ws_2"), here).session == "ws_2"
    with pytest.raises(Refused):
        vouched.vouched(said, OPERATOR)
    long = workload(estate, entry_id="e" * vouched.WORKLOAD_BYTES)
    assert vouched.vouched(long, here) is not vouched.vouched(long, here)
