"""Approvals as use cases: who sees what, what becomes of a token that stands on one, and what bounds hold. Attacks are elsewhere."""

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from broker.audit.events import Event
from broker.errors import BrokerError, Conflict, Invalid, NotFound, Refused
from broker.server.tasks import approved
from broker.server.tasks.approvals import MAX_USE_WITHIN, USE_WITHIN, Saying
from broker.server.tasks.config import TaskDefaults
from broker.server.tasks.policy import bundle
from broker.server.tasks.policy.rejudge import Rejudge
from broker.server.tasks.requests import IssuedToken
from broker.tasks import Supervision
from broker.tasks.approval import POLL_SECONDS, Approval, ApprovalState
from tests.fakes.oidc import OidcIssuer
from tests.unit.server.tasks.estate import INSPECTOR, X5T, X5T_2, Estate, authority, detail, running

APP = "console"
OPEN = '@id("agents-act") permit (principal, action in [Action::"begin", Action::"issue"], resource);\n'
WRITES = (
    OPEN + '@id("writes") @requires("approval") forbid (principal, action == Action::"issueToken", resource)'
    ' when { context.actions.contains("ticket.write") };\n'
    '@id("leads") permit (principal, action == Action::"approve", resource) when { principal in [User::"carol", User::"dave"] };'
)
PEOPLE: dict[str, Any] = {"clients": frozenset({APP}), "approval_clients": frozenset({APP})}
READ = authority(detail(actions=["ticket.read"]))


@pytest.fixture
async def estate(tmp_path: Path, oidc: OidcIssuer) -> AsyncIterator[Estate]:
    async with running(tmp_path, oidc, **PEOPLE) as one:
        one.tokens.rules.use(bundle.read(WRITES))
        yield one


def person(estate: Estate, name: str = "carol", **claims: Any) -> str:
    now = int(estate.clock.now().timestamp())
    return estate.user_token(name, **({"azp": APP, "sid": f"s-{name}", "auth_time": now} | claims))


async def code(asked: Any) -> str:
    with pytest.raises(BrokerError) as refused:
        await asked
    return refused.value.reason


async def asked_for(estate: Estate, **fields: Any) -> tuple[Any, Approval]:
    task = await estate.start()
    assert await code(estate.issue(task, **fields)) == "approval_pending"
    [approval] = (await estate.ends.approvals.list(state=ApprovalState.PENDING)).approvals
    return task, approval


async def said_yes(estate: Estate, **fields: Any) -> tuple[Any, Approval, IssuedToken]:
    task, approval = await asked_for(estate)
    await estate.ends.approvals.approve(person(estate), Saying(approval.id, **fields))
    token = await estate.issue(task)
    return task, approval, token


async def is_alive(estate: Estate, token: IssuedToken) -> bool:
    return await estate.tokens.introspect(token.access_token, INSPECTOR) is not None


async def test_a_token_on_a_yes_is_alive_as_any_other_until_the_yes_is_taken_back(estate: Estate) -> None:
    _, approval, token = await said_yes(estate)
    assert await is_alive(estate, token)
    # A look at what is running, by the same policy, leaves what a person approved.
    rejudge = Rejudge(estate.store, estate.tokens.rules, estate.clock)
    assert await rejudge.look() == (0, 0)
    assert await is_alive(estate, token)
    over = await estate.ends.approvals.stop(Saying(approval.id, "wrong"), by="operator:uid:0")
    assert (over.state, over.decided_by, over.reason) == (ApprovalState.WITHDRAWN, "operator:uid:0", "wrong")
    assert not await is_alive(estate, token)
    assert await estate.ends.approvals.stop(Saying(approval.id), by="operator:uid:0") == over
    assert len(await estate.records(Event.APPROVAL_WITHDRAWN, Event.TOKEN_REVOKED)) == 2


async def test_a_lost_answer_is_not_given_again_once_the_yes_was_taken_back(estate: Estate) -> None:
    task, approval = await asked_for(estate)
    await estate.ends.approvals.approve(person(estate), Saying(approval.id))
    first = await estate.issue(task, idempotency_key="k")
    assert (await estate.issue(task, idempotency_key="k")).jti == first.jti
    await estate.ends.approvals.stop(Saying(approval.id), by="operator:uid:0")
    assert await code(estate.issue(task, idempotency_key="k")) == "idempotency_spent"


@pytest.mark.bears("RV17")
async def test_a_yes_to_one_process_is_none_to_another(tmp_path: Path, oidc: OidcIssuer) -> None:
    """A task that hangs on no process is any of its workload's; what was approved is for who asked."""
    free = TaskDefaults(allow_unsupervised=True)
    async with running(tmp_path, oidc, defaults=free, **PEOPLE) as estate:
        estate.tokens.rules.use(bundle.read(WRITES))
        await estate.report("ws_1", X5T)
        await estate.report("ws_2", X5T_2)
        task = await estate.start(supervision=Supervision.NONE)
        assert await code(estate.issue(task)) == "approval_pending"
        [approval] = (await estate.ends.approvals.list()).approvals
        await estate.ends.approvals.approve(person(estate), Saying(approval.id))
        other = estate.actor(session="ws_2", x5t=X5T_2)
        assert await code(estate.issue(task, other)) == "approval_pending"
        assert estate.verify(await estate.issue(task)).claims.task.use == "once"


async def test_nothing_is_approved_for_a_user_of_whom_nothing_was_heard(tmp_path: Path, oidc: OidcIssuer) -> None:
    async with running(tmp_path, oidc, leases={oidc.issuer: timedelta(seconds=60)}, **PEOPLE) as estate:
        estate.tokens.rules.use(bundle.read(WRITES))
        _, approval = await asked_for(estate)
        estate.clock.advance(61)
        late = estate.ends.approvals.approve(person(estate), Saying(approval.id))
        assert await code(late) == "user_session_unconfirmed"


async def test_a_policy_that_forbids_it_outright_kills_it(estate: Estate) -> None:
    _, _, token = await said_yes(estate)
    estate.tokens.rules.use(bundle.read(WRITES.replace('@requires("approval") ', "")))
    assert not await is_alive(estate, token)
    assert await Rejudge(estate.store, estate.tokens.rules, estate.clock).look() == (0, 1)


async def test_a_task_that_has_to_be_approved_itself_does_not_begin(estate: Estate) -> None:
    estate.tokens.rules.use(bundle.read(WRITES.replace('action == Action::"issueToken"', "action")))
    assert await code(estate.start()) == "approval_required"
    assert (await estate.ends.approvals.list()).approvals == ()


async def test_where_the_beginning_is_forbidden_since_nobody_is_asked(estate: Estate) -> None:
    task, approval = await asked_for(estate)
    estate.tokens.rules.use(bundle.read(WRITES.replace('action == Action::"issueToken"', "action")))
    assert await code(estate.issue(task)) == "approval_required"
    assert await estate.ends.approvals.get(approval.id) == approval


async def test_what_needs_nobody_is_given_at_once(estate: Estate) -> None:
    task, _ = await asked_for(estate)
    token = await estate.issue(task, authority=READ)
    assert estate.verify(token).claims.task.use is None
    [issued] = await estate.records(Event.TOKEN_ISSUED)
    assert "approval" not in issued.fields


async def test_who_waits_is_heard_every_few_seconds(estate: Estate) -> None:
    task, approval = await asked_for(estate)
    for wait, wanted in ((1, "slow_down"), (POLL_SECONDS - 1, "approval_pending"), (1, "slow_down")):
        estate.clock.advance(wait)
        assert await code(estate.issue(task)) == wanted
    heard = (await estate.ends.approvals.get(approval.id)).asked_at
    assert (heard - approval.asked_at).total_seconds() == POLL_SECONDS
    assert await estate.records(Event.TOKEN_REFUSED) == []


async def test_a_yes_has_its_time(estate: Estate) -> None:
    task, approval = await asked_for(estate)
    yes = await estate.ends.approvals.approve(person(estate), Saying(approval.id))
    assert yes.approved_until is not None
    assert (yes.approved_until - estate.clock.now()).total_seconds() == USE_WITHIN
    estate.clock.advance(USE_WITHIN)
    assert await code(estate.issue(task)) == "approval_pending"
    states = [one.state for one in (await estate.ends.approvals.list()).approvals]
    assert states == [ApprovalState.EXPIRED, ApprovalState.PENDING]


async def test_a_token_lives_no_longer_than_the_yes(estate: Estate) -> None:
    task, approval = await asked_for(estate)
    await estate.ends.approvals.approve(person(estate), Saying(approval.id, use_within=10))
    claims = estate.verify(await estate.issue(task)).claims
    assert (claims.exp - claims.iat, claims.task.use) == (10, "once")


async def test_a_token_for_one_call_names_its_parameters(estate: Estate) -> None:
    digest = "sha-256:" + "C" * 42 + "A"
    task, approval = await asked_for(estate, parameter_digest=digest)
    assert approval.wanted.parameter_digest == digest
    await estate.ends.approvals.approve(person(estate), Saying(approval.id))
    assert await code(estate.issue(task)) == "approval_pending"
    claims = estate.verify(await estate.issue(task, parameter_digest=digest)).claims
    assert (claims.task.use, claims.task.parameter_digest) == ("once", digest)
    # Also where nobody has to be asked.
    once = estate.verify(await estate.issue(task, authority=READ, parameter_digest=digest)).claims
    assert (once.task.use, once.task.parameter_digest, once.exp - once.iat) == ("once", digest, 60)


async def test_people_are_not_asked_without_end(estate: Estate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approved, "MAX_OF_TASK", 3)
    task = await estate.start()
    for number in range(3):
        assert await code(estate.issue(task, authority=authority(detail(identifier=str(number))))) == "approval_pending"
    assert await code(estate.issue(task)) == "too_many_approvals"
    # Those that are asked for still count.
    estate.clock.advance(POLL_SECONDS)
    assert await code(estate.issue(task, authority=authority(detail(identifier="0")))) == "approval_pending"


async def test_each_sees_what_is_theirs_to_decide(estate: Estate) -> None:
    _, approval = await asked_for(estate)
    cases = estate.ends.approvals
    assert (await cases.waiting(person(estate))).approvals == (approval,)
    assert (await cases.shown(person(estate), approval.id)) == approval
    # Whom it is done for sees it, and may say no.
    assert (await cases.waiting(person(estate, "alice"))).approvals == ()
    assert await cases.shown(person(estate, "alice"), approval.id) == approval
    for asked in (cases.shown(person(estate, "eve"), approval.id), cases.shown(person(estate), "apr_none")):
        with pytest.raises(NotFound):
            await asked
    for saying in (cases.deny, cases.withdraw, cases.approve):
        with pytest.raises(NotFound):
            await saying(person(estate, "eve"), Saying(approval.id))
    denied = await cases.deny(person(estate, "alice"), Saying(approval.id, "not I"))
    assert (denied.state, denied.decided_by) == (ApprovalState.DENIED, "alice")
    with pytest.raises(Conflict):
        await cases.approve(person(estate), Saying(approval.id))


async def test_a_dead_task_is_approved_nothing(estate: Estate) -> None:
    task, approval = await asked_for(estate)
    await estate.lifecycle.revoke(task.id, by="operator:uid:0")
    with pytest.raises(Refused) as refused:
        await estate.ends.approvals.approve(person(estate), Saying(approval.id))
    assert refused.value.reason == "task_ended"


async def test_what_is_said_is_checked() -> None:
    for wrong in ({"use_within": -1}, {"use_within": MAX_USE_WITHIN + 1}, {"reason": "\n"}):
        with pytest.raises(Invalid):
            Saying("apr_1", **wrong)
    with pytest.raises(NotFound):
        Saying("no id")


async def test_a_server_without_such_clients_lets_nobody_decide(tmp_path: Path, oidc: OidcIssuer) -> None:
    async with running(tmp_path, oidc) as estate:
        assert await code(estate.ends.approvals.waiting(estate.user_token("carol"))) == "approval_client"
