"""The exchange, asked again: a repeated request gets no more than the first, and a crash loses nothing that was granted."""

from pathlib import Path

import pytest

from broker.errors import Conflict, PolicyDenied, Refused, Unavailable
from broker.server import failpoints
from broker.server.tasks.requests import IssueRequest
from tests.fakes.oidc import OidcIssuer
from tests.unit.server.tasks.estate import (
    AGENT,
    TICKETS,
    WIKI,
    X5T_2,
    Estate,
    authority,
    detail,
)


@pytest.mark.bears("TX28")
async def test_the_same_request_under_the_same_key_gets_the_same_token(estate: Estate) -> None:
    request = estate.start_request(idempotency_key="start-1")
    task = await estate.exchange.start(estate.actor(), request)
    assert await estate.exchange.start(estate.actor(), request) == task
    first = await estate.issue(task, idempotency_key="issue-1")
    estate.clock.advance(5)
    estate.keys.rotate()
    again = await estate.issue(task, idempotency_key="issue-1")
    assert estate.verify(again).claims == estate.verify(first).claims
    assert again.expires_at == first.expires_at
    assert await estate.store.read(lambda reader: reader.tokens_issued(task.id)) == 1
    assert len(await estate.records("token_issued")) == 1
    assert len(await estate.records("task_started")) == 1


@pytest.mark.bears("TX27")
async def test_another_request_under_the_same_key_is_refused(estate: Estate) -> None:
    token = estate.user_token()
    task = await estate.start(user_token=token, idempotency_key="k")
    for other in ({"purpose": "another"}, {"ttl": 5}, {"authority": authority(detail(actions=["ticket.read"]))}):
        with pytest.raises(Conflict) as caught:
            await estate.start(**{"user_token": token, "idempotency_key": "k"} | other)
        assert caught.value.reason == "idempotency_mismatch"
    first = await estate.issue(task, idempotency_key="i")
    for asked in ({"scope": "ticket.read"}, {"authority": authority(detail(actions=["ticket.read"]))}):
        with pytest.raises(Conflict):
            await estate.issue(task, idempotency_key="i", **asked)
    assert estate.verify(await estate.issue(task, idempotency_key="i")).jti == first.jti


async def test_a_key_is_its_processs_own(estate: Estate) -> None:
    mine = await estate.start(idempotency_key="k")
    other = await estate.start(estate.actor(session="ws_2", x5t=X5T_2), idempotency_key="k")
    assert other.id != mine.id


async def test_a_repeated_request_gets_nothing_that_is_over(estate: Estate) -> None:
    task = await estate.start()
    issued = await estate.issue(task, idempotency_key="i")
    await estate.lifecycle.revoke_token(issued.jti, owner=AGENT)
    with pytest.raises(Conflict) as caught:
        await estate.issue(task, idempotency_key="i")
    assert caught.value.reason == "idempotency_spent"
    await estate.issue(task, idempotency_key="i2")
    estate.clock.advance(181)
    with pytest.raises(Conflict):
        await estate.issue(task, idempotency_key="i2")
    await estate.lifecycle.complete(estate.actor(), task.id)
    with pytest.raises(Refused) as ended:
        await estate.issue(task, idempotency_key="i2")
    assert ended.value.reason == "task_ended"


async def test_one_step_makes_task_and_token_in_one_transaction(estate: Estate) -> None:
    start = estate.start_request(idempotency_key="one")
    issue = IssueRequest(TICKETS, scope="ticket.read")
    issued = await estate.exchange.start_and_issue(estate.actor(), start, issue)
    again = await estate.exchange.start_and_issue(estate.actor(), start, issue)
    assert estate.verify(again).claims == estate.verify(issued).claims
    task = await estate.store.read(lambda reader: reader.task(issued.task_id))
    assert task is not None
    assert task.authority.scope() == "ticket.read ticket.write"
    with pytest.raises(PolicyDenied):
        await estate.exchange.start_and_issue(estate.actor(), estate.start_request(), IssueRequest(WIKI))
    assert len(await estate.records("task_started")) == 1, "a refused token leaves no task behind"
    await estate.lifecycle.complete(estate.actor(), task.id)
    with pytest.raises(Refused):
        await estate.exchange.start_and_issue(estate.actor(), start, issue)


@pytest.mark.bears("TX28")
async def test_a_crash_after_the_commit_loses_no_token_identity(
    estate: Estate, tmp_path: Path, oidc: OidcIssuer
) -> None:
    task = await estate.start()
    failpoints.arm("exchange.after_commit=error", allowed=True)
    try:
        with pytest.raises(Unavailable):
            await estate.issue(task, idempotency_key="i")
    finally:
        failpoints.arm("", allowed=True)
    assert await estate.store.read(lambda reader: reader.tokens_issued(task.id)) == 1
    issued = await estate.issue(task, idempotency_key="i")
    assert await estate.store.read(lambda reader: reader.token(issued.jti)) is not None
    assert await estate.store.read(lambda reader: reader.tokens_issued(task.id)) == 1


async def test_a_failure_before_the_commit_leaves_nothing(estate: Estate) -> None:
    failpoints.arm("exchange.before_commit=error", allowed=True)
    try:
        with pytest.raises(Unavailable):
            await estate.start()
    finally:
        failpoints.arm("", allowed=True)
    assert await estate.records("task_started", "task_refused", "session_started") == []
