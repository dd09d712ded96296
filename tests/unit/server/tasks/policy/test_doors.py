"""Every door asks the policy in force, also for what was answered before."""

from collections.abc import Awaitable

import pytest

from broker.errors import BrokerError
from broker.server.tasks.assertion_requests import GrantRequest, OwnTask, TransactionRequest
from broker.server.tasks.requests import IssueRequest, Operation
from broker.tasks.grants import GrantFormat
from tests.unit.server.tasks.estate import NEIGHBOUR, REMOTE, TICKETS, WIKI, authority, detail
from tests.unit.server.tasks.life import OPERATOR, change, child
from tests.unit.server.tasks.policy.conftest import Governed


def without(action: str) -> str:
    return f'@id("all") permit(principal, action, resource); @id("no") forbid(principal, action == Action::"{action}", resource);'


async def denied(act: Awaitable[object]) -> None:
    with pytest.raises(BrokerError) as caught:
        await act
    assert caught.value.reason == "policy_denied"


async def test_a_child_starts_only_where_the_policy_lets_it(governed: Governed) -> None:
    estate = governed.estate
    parent = await estate.start()
    first = await child(estate, parent, estate.actor(), idempotency_key="k")
    await governed.bundles.push(without("startChild"), by=OPERATOR)
    await denied(child(estate, parent, estate.actor()))
    # The answer of before is no way around it.
    await denied(child(estate, parent, estate.actor(), idempotency_key="k"))
    tasks = await estate.store.read(lambda reader: reader.children_of(parent.id))
    assert (tasks, first.parent) == (1, parent.id)


async def test_a_task_is_handed_off_only_where_the_policy_lets_it(governed: Governed) -> None:
    estate = governed.estate
    task = await estate.start()
    await governed.bundles.push(without("handOff"), by=OPERATOR)
    await denied(change(estate, estate.actor(), task, Operation.HAND_OFF, to=NEIGHBOUR))


@pytest.mark.parametrize("by_operator", [False, True])
async def test_a_task_is_resumed_only_where_the_policy_lets_it(governed: Governed, by_operator: bool) -> None:
    estate = governed.estate
    task = await estate.start()
    await change(estate, estate.actor(), task, Operation.SUSPEND)
    await governed.bundles.push(without("resumeTask"), by=OPERATOR)
    await denied(change(estate, OPERATOR if by_operator else estate.actor(), task, Operation.RESUME))


async def test_the_first_token_of_before_is_not_given_again_against_the_policy(governed: Governed) -> None:
    estate = governed.estate
    start = estate.start_request(idempotency_key="k")
    issue = IssueRequest(resource=TICKETS, task_id="")
    first = await estate.exchange.start_and_issue(estate.actor(), start, issue)
    assert (await estate.exchange.start_and_issue(estate.actor(), start, issue)).task_id == first.task_id
    await governed.bundles.push(without("issueToken"), by=OPERATOR)
    await denied(estate.exchange.start_and_issue(estate.actor(), start, issue))


@pytest.mark.parametrize("action", ["issueTransactionToken", "issueGrant"])
async def test_an_assertion_is_issued_only_where_the_policy_lets_it(governed: Governed, action: str) -> None:
    estate = governed.estate
    task = await estate.start(authority=authority(detail(), detail(locations=[WIKI.text])))
    own = OwnTask(task.id)
    transaction = TransactionRequest("example.org", own, "ticket.read", resource=TICKETS)
    wanted = transaction if action == "issueTransactionToken" else GrantRequest(GrantFormat.ID_JAG, REMOTE, own)
    assert await estate.assertions.issue(estate.actor(), wanted)
    await governed.bundles.push(without(action), by=OPERATOR)
    await denied(estate.assertions.issue(estate.actor(), wanted))
