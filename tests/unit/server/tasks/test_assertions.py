"""Transaction tokens and grants: whose task or token they stand on, how far they reach, and when they end."""

from typing import Any

import pytest

from broker.errors import BrokerError
from broker.server.tasks.assertion_requests import GrantRequest, HeldToken, IssuedAssertion, OwnTask, TransactionRequest
from broker.server.tasks.requests import Actor, Operation
from broker.tasks.grants import GrantFormat
from broker.tasks.stop import StopKind
from broker.tasks.transactions import TransactionClaims, verify_transaction
from tests.unit.server.tasks.estate import AGENT, ISSUER, REMOTE, TICKETS, WIKI, Estate, authority, detail
from tests.unit.server.tasks.life import change, neighbour
from tests.unit.server.tasks.test_moments import stop
from tests.unit.server.tasks.watching import task_of

READ, BOTH = detail(actions=["ticket.read"]), detail()
ON_WIKI = detail(locations=[WIKI.text], actions=["ticket.read"])


def transaction(subject: OwnTask | HeldToken, **fields: Any) -> TransactionRequest:
    if isinstance(subject, OwnTask):
        fields = {"resource": TICKETS} | fields
    return TransactionRequest(**{"audience": "example.org", "subject": subject, "scope": "ticket.read"} | fields)


def grant(subject: OwnTask | HeldToken) -> GrantRequest:
    return GrantRequest(GrantFormat.ID_JAG, REMOTE, subject)


async def issued(estate: Estate, request: TransactionRequest | GrantRequest) -> IssuedAssertion:
    held = isinstance(request.subject, HeldToken)
    return await estate.assertions.issue(estate.caller() if held else estate.actor(), request)


async def refused(estate: Estate, actor: Actor, request: TransactionRequest | GrantRequest) -> str:
    with pytest.raises(BrokerError) as caught:
        await estate.assertions.issue(actor, request)
    return caught.value.reason


def read(estate: Estate, token: IssuedAssertion) -> TransactionClaims:
    keys, now = estate.keys.task_keys(), estate.clock.now()
    return verify_transaction(token.token, keys, issuer=ISSUER, trust_domain=AGENT.trust_domain, now=now).claims


@pytest.mark.parametrize("user", ["", "alice", "bob"])
async def test_anothers_task_and_none_are_the_same_whatever_user_is_shown(estate: Estate, user: str) -> None:
    task = await estate.start()
    shown = estate.user_token(user) if user else ""
    for known in (task.id, "tsk_unknown"):
        for asked in (transaction(OwnTask(known, shown)), grant(OwnTask(known, shown))):
            assert await refused(estate, neighbour(estate), asked) == "task_unknown"


async def test_a_key_that_two_workloads_share_makes_neither_the_other(estate: Estate) -> None:
    key = "K" * 42 + "w"
    task = await estate.start()
    token = HeldToken((await estate.issue(task, estate.actor(jkt=key), jkt=key)).access_token)
    other = estate.caller(spiffe_id=neighbour(estate).spiffe_id, x5t=neighbour(estate).x5t, jkt=key)
    assert await refused(estate, other, transaction(token)) == "subject_not_held"
    assert await estate.assertions.issue(estate.caller(jkt=key), transaction(token))


async def test_an_own_task_begins_no_transaction_where_the_audience_takes_no_part(estate: Estate) -> None:
    task = await estate.start(authority=authority(BOTH, ON_WIKI))
    assert await issued(estate, transaction(OwnTask(task.id)))
    assert await refused(estate, estate.actor(), transaction(OwnTask(task.id), resource=WIKI)) == "invalid_target"


async def test_a_token_that_is_brought_is_the_ceiling_whatever_its_task_has(estate: Estate) -> None:
    task = await estate.start()
    token = HeldToken((await estate.issue(task, authority=authority(READ))).access_token)
    wider = transaction(token, scope="ticket.write", authority=authority(BOTH))
    assert await refused(estate, estate.caller(), wider) == "invalid_authorization_details"
    assert (await issued(estate, transaction(token, authority=authority(READ)))).scope == "ticket.read"


@pytest.mark.parametrize("kind", [transaction, grant])
async def test_what_comes_of_a_token_ends_with_it(estate: Estate, kind: Any) -> None:
    task = await estate.start(authority=authority(BOTH, ON_WIKI))
    token = await estate.issue(task, resource=TICKETS if kind is transaction else WIKI)
    left = 7
    estate.clock.advance((token.expires_at - estate.clock.now()).total_seconds() - left)
    assert (await issued(estate, kind(HeldToken(token.access_token)))).expires_at == token.expires_at


@pytest.mark.parametrize(("kind", "name"), [(StopKind.AGENT, str(AGENT)), (StopKind.AUDIENCE, TICKETS.text)])
async def test_in_the_second_of_a_stop_nothing_is_issued(estate: Estate, kind: StopKind, name: str) -> None:
    task = await estate.start()
    await stop(estate, kind, name)
    assert await refused(estate, estate.actor(), transaction(OwnTask(task.id))) == "stopped_just_now"


async def test_a_transaction_is_of_the_epoch_that_its_task_is_in(estate: Estate) -> None:
    task = await estate.start()
    first = read(estate, await issued(estate, transaction(OwnTask(task.id))))
    await change(estate, estate.actor(), task, Operation.SUSPEND)
    await change(estate, estate.actor(), task, Operation.RESUME)
    second = read(estate, await issued(estate, transaction(OwnTask(task.id))))
    assert first.epoch < second.epoch == (await task_of(estate, task.id)).epoch
