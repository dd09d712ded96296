"""Actions that are done once: who may claim what with which token, what is told of it, and what is written."""

import asyncio
from collections.abc import Awaitable
from dataclasses import replace
from typing import Any

import pytest

from broker.errors import BrokerError, NotFound
from broker.server.tasks import actions as cases
from broker.server.tasks.actions import ClaimedAction, ClaimRequest, SettleRequest
from broker.server.tasks.policy.bundle import read as read_policy
from broker.server.tasks.records import sha256
from broker.server.tasks.requests import Actor
from broker.spiffe import jose
from broker.tasks import Cause, State, Task
from broker.tasks.action import SETTLE_WITHIN, ActionRecord, ActionState, Claimed
from tests.unit.server.tasks.estate import (
    AGENT,
    INSPECTOR,
    NEIGHBOUR,
    TICKETS,
    WIKI,
    X5T_2,
    X5T_3,
    Estate,
    detail,
    entry,
)
from tests.unit.server.tasks.estate import authority as authority_of

HASH, OTHER_HASH = ("sha-256:" + letter * 42 + "A" for letter in "ab")
DONE, UNDONE = ActionState.COMPLETED, ActionState.RELEASED


def service(estate: Estate, **fields: Any) -> Actor:
    """The service that tokens for the tickets are for, at the HTTPS door."""
    return estate.caller(**{"spiffe_id": INSPECTOR, "x5t": X5T_2} | fields)


def request(token: str, **fields: Any) -> ClaimRequest:
    return ClaimRequest(**{"token": token, "action": "ticket.write", "step": "s1", "identifier": "4711"} | fields)


async def token_of(estate: Estate, task: Task, **fields: Any) -> str:
    return (await estate.issue(task, **fields)).access_token


async def claim(estate: Estate, token: str, who: Actor | None = None, **fields: Any) -> ClaimedAction:
    return await estate.actions.claim(who or service(estate), request(token, **fields))


async def settle(
    estate: Estate,
    action: ClaimedAction,
    state: ActionState = DONE,
    outcome: str | None = None,
    who: Actor | None = None,
) -> ActionRecord:
    asked = SettleRequest(action.record.id, state, outcome)
    return await estate.actions.settle(who or service(estate), asked)


async def refused(asked: Awaitable[Any]) -> str:
    try:
        await asked
    except BrokerError as error:
        return error.reason
    raise AssertionError("it was not refused")


def for_one_use(estate: Estate, token: str) -> str:
    """The same token, for one action."""
    payload = jose.parse_compact(token).payload
    task = payload["task"]
    assert isinstance(task, dict)
    signer = estate.keys.task_signer()
    header = {"alg": signer.algorithm, "kid": signer.id, "typ": "at+jwt"}
    return jose.sign_compact(header, dict(payload) | {"task": task | {"use": "once"}}, signer.sign)


@pytest.fixture
async def task(estate: Estate) -> Task:
    return await estate.start()


class TestOnce:
    @pytest.mark.bears("RV15")
    async def test_what_was_done_is_told_and_not_done_again(self, estate: Estate, task: Task) -> None:
        first = await claim(estate, await token_of(estate, task), parameter_digest=HASH)
        assert (first.result, first.record.state) == (Claimed.NOW, ActionState.CLAIMED)
        over = await settle(estate, first, outcome='{"number": 7}')
        assert (over.state, over.outcome) == (DONE, '{"number":7}')
        again = await claim(estate, await token_of(estate, task), parameter_digest=HASH)
        assert (again.result, again.record) == (Claimed.DUPLICATE, over)

        claimed, settled, suppressed = await estate.records("action_claimed", "action_settled", "action_suppressed")
        for record in (claimed, settled, suppressed):
            assert (record.actor, record.subject) == (str(INSPECTOR), task.id)
            assert record.fields["user"] == "alice"
            assert record.fields["agent"] == str(AGENT)
            assert record.fields["service"] == str(INSPECTOR)
            assert (record.fields["audience"], record.fields["action"]) == (TICKETS.text, "ticket.write")
            assert record.fields["step_hash"] == sha256(b"s1")
            assert (record.fields["identifier_hash"], record.fields["parameter_digest"]) == (sha256(b"4711"), HASH)
            assert record.fields["action_id"] == over.id
            assert "number" not in record.body().decode()
        assert claimed.fields["outcome_hash"] is None
        assert settled.fields["outcome_hash"] == suppressed.fields["outcome_hash"] == sha256(b'{"number":7}')
        assert claimed.fields["jti_hash"] == settled.fields["jti_hash"] != suppressed.fields["jti_hash"]
        assert settled.fields["prior_state"] == "claimed"

    async def test_of_many_at_once_one_does_it(self, estate: Estate, task: Task) -> None:
        token = await token_of(estate, task)
        asked = await asyncio.gather(*(claim(estate, token) for _ in range(10)), return_exceptions=True)
        told = sorted(one.reason if isinstance(one, BrokerError) else one.result for one in asked)  # type: ignore[union-attr]
        assert told == [*["action_in_progress"] * 9, "claimed"]
        assert len(await estate.records("action_claimed")) == 1
        assert [one.fields["reason"] for one in await estate.records("action_refused")] == ["action_in_progress"] * 9

    async def test_what_was_not_done_may_be_done_and_the_first_claim_settles_nothing_any_more(
        self, estate: Estate, task: Task
    ) -> None:
        first = await claim(estate, await token_of(estate, task))
        await settle(estate, first, UNDONE)
        second = await claim(estate, await token_of(estate, task))
        assert (second.result, second.record.id != first.record.id) == (Claimed.NOW, True)
        # What comes late of the first must not say of the second that it was not done.
        for state in (DONE, UNDONE):
            assert await refused(settle(estate, first, state)) == "action_unknown"
        assert (await settle(estate, second)).state is DONE

    async def test_nobody_guesses_what_became_of_it_until_its_service_says(self, estate: Estate, task: Task) -> None:
        first = await claim(estate, await token_of(estate, task))
        estate.clock.advance(SETTLE_WITHIN.total_seconds())
        for _ in range(2):
            assert await refused(claim(estate, await token_of(estate, task))) == "action_indeterminate"
        assert (await settle(estate, first, outcome="1")).state is DONE
        assert (await claim(estate, await token_of(estate, task))).record.outcome == "1"
        (settled,) = await estate.records("action_settled")
        assert (settled.fields["prior_state"], settled.fields["state"]) == ("indeterminate", "completed")

    async def test_it_is_settled_after_the_task_has_ended(self, estate: Estate, task: Task) -> None:
        first = await claim(estate, await token_of(estate, task))
        await estate.lifecycle.complete(estate.actor(), task.id)
        assert (await settle(estate, first)).state is DONE

    async def test_the_same_settlement_again_is_no_second_one(self, estate: Estate, task: Task) -> None:
        first = await claim(estate, await token_of(estate, task))
        assert await settle(estate, first) == await settle(estate, first)
        assert await refused(settle(estate, first, UNDONE)) == "action_settled"
        assert len(await estate.records("action_settled")) == 1
        (record,) = await estate.records("action_refused")
        assert (record.subject, record.fields["reason"]) == (first.record.id, "action_settled")

    async def test_a_step_stands_for_one_thing(self, estate: Estate, task: Task) -> None:
        token = await token_of(estate, task)
        await claim(estate, token, parameter_digest=HASH)
        for other in ({"action": "ticket.read"}, {"identifier": "4712"}, {"parameter_digest": OTHER_HASH}):
            asked = {"parameter_digest": HASH} | other
            assert await refused(claim(estate, token, **asked)) == "idempotency_key_reused"
        # Of another task it is another step.
        other_task = await estate.start()
        assert (await claim(estate, await token_of(estate, other_task))).result is Claimed.NOW

    async def test_a_request_that_is_repeated_is_the_same_claim(self, estate: Estate, task: Task) -> None:
        token = for_one_use(estate, await token_of(estate, task))
        first = await claim(estate, token, idempotency_key="k")
        assert await claim(estate, token, idempotency_key="k") == first
        assert await refused(claim(estate, token, idempotency_key="k", step="s2")) == "idempotency_mismatch"
        assert await refused(claim(estate, token, idempotency_key="l")) == "token_used"
        await settle(estate, first, UNDONE)
        await claim(estate, await token_of(estate, task))
        assert await refused(claim(estate, token, idempotency_key="k")) == "idempotency_spent"

    async def test_a_task_does_no_more_than_so_many(
        self, estate: Estate, task: Task, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cases, "MAX_PER_TASK", 2)
        token = await token_of(estate, task)
        first, _ = await claim(estate, token), await claim(estate, token, step="s2")
        assert await refused(claim(estate, token, step="s3")) == "too_many_actions"
        await settle(estate, first, UNDONE)
        assert (await claim(estate, token)).result is Claimed.NOW, "that is no further one"


class TestTokens:
    async def test_one_for_one_use_is_used_once(self, estate: Estate, task: Task) -> None:
        token = for_one_use(estate, await token_of(estate, task))
        first = await claim(estate, token)
        for step in ("s1", "s2"):
            assert await refused(claim(estate, token, step=step)) == "token_used"
        await settle(estate, first, UNDONE)
        assert await refused(claim(estate, token)) == "token_used", "it is not given back"
        # Another one is told what became of it, and is used up by that.
        second = for_one_use(estate, await token_of(estate, task))
        assert (await claim(estate, second)).result is Claimed.NOW
        assert await refused(claim(estate, second, step="s2")) == "token_used"

    async def test_of_many_at_once_it_serves_one(self, estate: Estate, task: Task) -> None:
        token = for_one_use(estate, await token_of(estate, task))
        asked = await asyncio.gather(*(claim(estate, token, step=f"s{n}") for n in range(10)), return_exceptions=True)
        told = sorted(one.reason if isinstance(one, BrokerError) else one.result for one in asked)  # type: ignore[union-attr]
        assert told == ["claimed", *["token_used"] * 9]

    async def test_one_that_was_refused_is_not_used(self, estate: Estate, task: Task) -> None:
        await claim(estate, await token_of(estate, task))
        token = for_one_use(estate, await token_of(estate, task))
        assert await refused(claim(estate, token)) == "action_in_progress"
        assert (await claim(estate, token, step="s2")).result is Claimed.NOW

    async def test_one_that_is_for_certain_parameters(self, estate: Estate, task: Task) -> None:
        token = await token_of(estate, task, parameter_digest=HASH)
        for other in (OTHER_HASH, None):
            assert await refused(claim(estate, token, parameter_digest=other)) == "parameters_mismatch"
        assert (await claim(estate, token, parameter_digest=HASH)).result is Claimed.NOW

    async def test_none_that_is_dead_claims_anything(self, estate: Estate) -> None:
        async def ended(task: Task) -> None:
            await estate.lifecycle.revoke(task.id, by="operator:x")

        async def suspended(task: Task) -> None:
            await estate.store.write(
                lambda w: w.replace_task(
                    replace(task, state=State.SUSPENDED, cause=Cause.OPERATOR, version=2), expected_version=1
                )
            )

        async def given_back(task: Task) -> None:
            (row,) = await estate.store.read(lambda r: r.living_tokens(task.id, estate.clock.now(), limit=9))
            await estate.lifecycle.revoke_token(row.jti, owner=AGENT)

        async def expired(task: Task) -> None:
            estate.clock.advance(181)

        for happens in (ended, suspended, given_back, expired):
            task = await estate.start()
            token = await token_of(estate, task)
            await happens(task)
            assert await refused(claim(estate, token)) == "token_not_alive", happens.__name__
            (*_, record) = await estate.records("action_refused")
            assert (record.subject, record.fields["reason"]) == (task.id, "token_not_alive")
            assert (record.fields["agent"], record.fields["action"]) == (str(AGENT), "ticket.write")
            assert await estate.store.read(lambda r, one=task.id: r.actions_of(one)) == 0

    async def test_none_that_the_policy_would_not_issue_now(self, estate: Estate, task: Task) -> None:
        token = await token_of(estate, task)
        nothing = '@id("nothing") forbid (principal, action in Action::"issue", resource);'
        allowing = '@id("all") permit (principal, action, resource);'
        estate.tokens.rules.use(read_policy(f"{allowing}\n{nothing}"))
        assert await refused(claim(estate, token)) == "token_not_alive"

    async def test_none_of_another_making(self, estate: Estate, task: Task) -> None:
        token = await token_of(estate, task)
        assert await refused(claim(estate, token[:-4] + "AAAA")) in {"token_signature", "invalid_token"}
        assert "token" in await refused(claim(estate, "x.y.z"))
        with pytest.raises(BrokerError):
            request("")

    async def test_its_authority_reaches_so_far(self, estate: Estate) -> None:
        limited = detail(identifier="4711", constraints={"recipient_domain": ["example.org"]})
        task = await estate.start(authority=authority_of(limited))
        token = await token_of(estate, task)
        asked = {"enforced": frozenset({"recipient_domain"})}
        for other in (
            {"enforced": frozenset()},
            {"identifier": "4712"},
            {"identifier": None},
            {"action": "ticket.close"},
        ):
            assert await refused(claim(estate, token, **asked | other)) == "insufficient_authorization"
        assert (await claim(estate, token, **asked)).result is Claimed.NOW


class TestServices:
    async def test_only_the_audience_s_own_service_claims(self, estate: Estate, task: Task) -> None:
        token = await token_of(estate, task)
        for stranger in (NEIGHBOUR, AGENT):
            who = service(estate, spiffe_id=stranger)
            assert await refused(claim(estate, token, who)) == "audience_not_own"
        records = await estate.records("action_refused")
        assert [(one.actor, one.subject) for one in records] == [(str(NEIGHBOUR), task.id), (str(AGENT), task.id)]
        assert all(one.fields["audience"] == TICKETS.text for one in records)

    async def test_an_audience_without_a_service_of_its_own(self, estate: Estate) -> None:
        task = await estate.start(authority=authority_of(detail(locations=[WIKI.text])))
        issued = await estate.issue(task, resource=WIKI)
        assert await refused(claim(estate, issued.access_token)) == "audience_not_own"

    async def test_only_the_one_that_claimed_settles(self, estate: Estate, task: Task) -> None:
        first = await claim(estate, await token_of(estate, task))
        stranger = service(estate, spiffe_id=NEIGHBOUR, x5t=X5T_3)
        assert await refused(settle(estate, first, who=stranger)) == "action_not_own"
        unknown = SettleRequest("act_unknown", DONE)
        assert await refused(estate.actions.settle(service(estate), unknown)) == "action_unknown"
        # Another process of the same service may: it has the same records.
        assert (await settle(estate, first, who=service(estate, x5t=X5T_3))).state is DONE

    async def test_by_its_node_agent(self, estate: Estate, task: Task) -> None:
        await estate.put_entry(entry("entry-9", INSPECTOR, may_start_tasks=False))
        by_agent = estate.actor(spiffe_id=INSPECTOR, session="ws_9", entry_id="entry-9", x5t=X5T_2)
        first = await claim(estate, await token_of(estate, task), by_agent)
        assert (await settle(estate, first, who=by_agent)).state is DONE
        (record,) = await estate.records("action_claimed")
        assert (record.fields["door"], record.fields["session"]) == ("agent", "ws_9")
        token = await token_of(estate, task)
        for liar, code in (
            (replace(by_agent, entry_id="entry-1"), "entry_gone"),
            (replace(by_agent, entry_id="entry-2"), "agent_not_authorized"),
            (replace(by_agent, session="ws_1"), "session_taken"),
            (replace(by_agent, not_after=estate.clock.now()), "svid_expired"),
        ):
            assert await refused(claim(estate, token, liar, step="s9")) == code
        await estate.sessions.report(by_agent.agent, [], ["ws_9"])  # type: ignore[arg-type]
        assert await refused(claim(estate, token, by_agent, step="s9")) == "session_ended"


@pytest.mark.parametrize("state", ["", "claimed", "indeterminate", "done"])
async def test_what_settles_nothing(estate: Estate, task: Task, state: str) -> None:
    first = await claim(estate, await token_of(estate, task))

    async def said() -> None:
        await estate.actions.settle(service(estate), SettleRequest.parse(first.record.id, state, ""))

    assert await refused(said()) == "invalid_settlement"


def test_what_is_no_action_s_id() -> None:
    with pytest.raises(NotFound):
        SettleRequest.parse("no id", "completed", "")
