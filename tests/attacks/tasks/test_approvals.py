"""Attacks on approvals: another amount, another recipient, twice, too late, by the wrong person, after the person is gone."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from broker.audit.events import Event
from tests.attacks.tasks.approval_rig import BANK, POLICY, TRANSFER, Bank, bank, payment
from tests.fakes.oidc import OidcIssuer
from tests.integration.identity_rig import DEADLINE, Estate
from tests.integration.test_token_endpoint import TRIAGE, Process

OTHER_DIGEST = "sha-256:" + "C" * 42 + "A"


@pytest.fixture
async def ground(ground_of: Estate, oidc: OidcIssuer) -> AsyncIterator[Bank]:
    async with bank(ground_of, oidc) as one:
        yield one


@pytest.fixture
async def agent(ground: Bank) -> AsyncIterator[Process]:
    async with ground.rig.agent(TRIAGE, "ws_triage") as one:
        yield one


async def waiting_for(ground: Bank, agent: Process, task: str, *args: Any, **fields: Any) -> str:
    """Ask for what a person has to approve; give the approval that is waited for."""
    assert (await ground.ask(agent, task, *args, **fields))["code"] == "approval_pending"
    return (await ground.waiting())[-1]


async def until(ground: Bank, approval: str, state: str) -> dict[str, Any]:
    async with asyncio.timeout(DEADLINE):
        while (seen := await ground.seen(approval))["state"] != state:
            await asyncio.sleep(0.05)
    return seen


@pytest.mark.bears("RV17")
async def test_a_yes_to_100_is_one_payment_of_100_to_that_shop(ground: Bank, agent: Process) -> None:
    task = (await ground.start(agent)).id
    approval = await waiting_for(ground, agent, task)
    assert (await ground.say(approval, reason="invoice seen")).status_code == 200
    # Not for more, not for somebody else, not for something else, and not by its id.
    for other in (payment("1000"), payment("100.01"), payment(recipient="evil.example"), payment(identifier="4711")):
        assert (await ground.ask(agent, task, other))["code"] == "approval_pending"
    assert (await ground.ask(agent, task, parameter_digest=OTHER_DIGEST))["code"] == "approval_pending"
    claims = await ground.ask(agent, task)
    assert claims["authorization_details"] == payment()
    assert claims["task"]["use"] == "once"
    assert claims["exp"] - claims["iat"] <= 60
    # Used: the same again is asked for anew.
    assert (await ground.ask(agent, task))["code"] == "approval_pending"
    assert (await ground.seen(approval))["state"] == "used"
    [asked] = [one for one in ground.records(Event.APPROVAL_REQUESTED) if one.subject == approval]
    [given] = ground.records(Event.APPROVAL_GIVEN)
    [issued] = ground.records(Event.TOKEN_ISSUED)
    assert (asked.fields["user"], asked.fields["scope"], asked.fields["rules"]) == ("alice", TRANSFER, ("payments",))
    assert (given.actor, given.subject, given.fields["approver"]) == ("carol", approval, "carol")
    assert issued.fields["approval"] == approval
    assert issued.fields["decision"] == "allow"
    assert issued.fields["authority_hash"] == given.fields["authority_hash"] == asked.fields["authority_hash"]
    # Who waits was refused nothing.
    assert ground.records(Event.TOKEN_REFUSED) == []


@pytest.mark.bears("RV17")
async def test_a_yes_that_came_too_late_or_was_kept_too_long_is_none(ground: Bank, agent: Process) -> None:
    task = (await ground.start(agent)).id
    approval = await waiting_for(ground, agent, task)
    assert (await ground.say(approval, use_within=1)).status_code == 200
    await until(ground, approval, "expired")
    assert (await ground.ask(agent, task))["code"] == "approval_pending"
    again = (await ground.waiting())[-1]
    assert again != approval
    assert ground.records(Event.TOKEN_ISSUED) == []
    assert [one.subject for one in ground.records(Event.APPROVAL_EXPIRED)] == [approval]
    # A yes to what is over is told so.
    assert (await ground.say(approval)).json()["error"] in {"approval_decided", "approval_expired"}


@pytest.mark.bears("RV17")
@pytest.mark.parametrize("ground_of", ["sqlite", "postgres"], indirect=True)
async def test_one_yes_asked_for_many_times_at_once_is_one_token(ground: Bank, agent: Process) -> None:
    task = (await ground.start(agent)).id
    approval = await waiting_for(ground, agent, task)
    await ground.say(approval)
    answers = await asyncio.gather(*(ground.ask(agent, task) for _ in range(20)))
    assert sum("jti" in one for one in answers) == 1
    assert {one.get("code") for one in answers} <= {None, "approval_pending", "slow_down"}


@pytest.mark.bears("RV17")
async def test_a_lost_answer_is_given_again_under_its_key_and_only_there(ground: Bank, agent: Process) -> None:
    task = (await ground.start(agent)).id
    await ground.say(await waiting_for(ground, agent, task, idempotency_key="k1"))
    first = await ground.ask(agent, task, idempotency_key="k1")
    again = await ground.ask(agent, task, idempotency_key="k1")
    assert again["jti"] == first["jti"]
    assert (await ground.ask(agent, task, idempotency_key="k2"))["code"] == "approval_pending"


async def test_at_the_token_endpoint_who_waits_polls_as_ciba_says(ground: Bank, agent: Process) -> None:
    task = (await ground.start(agent)).id
    first = await ground.ask_https(agent, task)
    assert first.status_code == 400
    assert (first.json()["error"], first.json()["error_code"]) == ("authorization_pending", "approval_pending")
    assert first.headers["retry-after"] == "5"
    hasty = await ground.ask_https(agent, task)
    assert hasty.json()["error"] == "slow_down"
    approval = first.json()["approval"]
    assert await ground.waiting() == [approval]
    await ground.say(approval, "deny", reason="not this shop")
    for _ in range(2):
        refused = await ground.ask_https(agent, task)
        assert (refused.json()["error"], refused.json()["error_code"]) == ("access_denied", "approval_denied")
    assert await ground.waiting() == []
    [denied] = ground.records(Event.APPROVAL_DENIED)
    assert (denied.actor, denied.subject) == ("carol", approval)
    assert {one.fields["reason"] for one in ground.records(Event.TOKEN_REFUSED)} == {"approval_denied"}


async def test_where_a_person_has_to_decide_no_new_task_begins_in_one_step(ground: Bank, agent: Process) -> None:
    sent = ground.rig.form(resource=BANK, authorization_details=json.dumps(payment()))
    answer = await agent.http.post("/token", data=sent)
    assert (answer.json()["error"], answer.json()["error_code"]) == ("invalid_request", "approval_required")
    assert ground.records(Event.TASK_STARTED, Event.APPROVAL_REQUESTED) == []


@pytest.mark.bears("RV18")
async def test_nobody_approves_for_themselves_nor_by_an_agents_hand(ground: Bank, agent: Process) -> None:
    task = (await ground.start(agent)).id
    approval = await waiting_for(ground, agent, task)
    # The policy names alice; what is done for alice is not hers to approve.
    own = await ground.say(approval, token=ground.person("alice"))
    assert (own.status_code, own.json()["error"]) == (403, "approver_is_requester")
    # A token that reached an agent was given to another client, whoever's it is.
    for token in (ground.rig.oidc.token("carol"), ground.person("carol", azp="broker")):
        for client in (ground.people, agent.http):
            answer = await client.post(
                f"/approvals/{approval}/approve", json={}, headers={"authorization": f"Bearer {token}"}
            )
            assert (answer.status_code, answer.json()["error"]) == (403, "approval_client")
    # Whom the policy does not name is told of no approval.
    stranger = await ground.say(approval, token=ground.person("mallory"))
    assert (stranger.status_code, stranger.json()["error"]) == (404, "approval_unknown")
    assert await ground.waiting(token=ground.person("mallory")) == []
    assert await ground.waiting(token=ground.person("alice")) == []
    assert (await ground.seen(approval, token=ground.person("alice")))["state"] == "pending"
    assert (await ground.ask(agent, task))["code"] in {"approval_pending", "slow_down"}
    codes = {one.fields["code"] for one in ground.records(Event.APPROVAL_REFUSED)}
    assert codes == {"approver_is_requester", "approval_client", "approval_unknown"}
    assert ground.records(Event.APPROVAL_GIVEN) == []


@pytest.mark.bears("RV18")
async def test_who_signed_out_or_in_long_ago_approves_nothing(ground: Bank, agent: Process) -> None:
    task = (await ground.start(agent)).id
    approval = await waiting_for(ground, agent, task)
    for auth_time in (int(time.time()) - 301, None):
        stale = await ground.say(approval, token=ground.person(auth_time=auth_time))
        assert (stale.status_code, stale.json()["error"]) == (401, "insufficient_user_authentication")
    assert stale.headers["www-authenticate"] == 'Bearer error="insufficient_user_authentication"'
    token = ground.person()
    await sign_out(ground, "carol")
    gone = await ground.say(approval, token=token)
    assert (gone.status_code, gone.json()["error"]) == (403, "user_session_ended")
    # Nor does such a token show or deny anything.
    assert (await ground.seen(approval, token=token))["error"] == "user_session_ended"
    assert (await ground.say(approval, "deny", token=token)).json()["error"] == "user_session_ended"
    assert ground.records(Event.APPROVAL_DENIED) == []
    assert ground.records(Event.APPROVAL_GIVEN) == []


@pytest.mark.bears("RV18")
async def test_a_yes_of_who_has_signed_out_since_is_asked_for_anew(ground: Bank, agent: Process) -> None:
    task = (await ground.start(agent)).id
    approval = await waiting_for(ground, agent, task)
    await ground.say(approval)
    await sign_out(ground, "carol")
    assert (await ground.ask(agent, task))["code"] == "approval_pending"
    assert [one.subject for one in ground.records(Event.APPROVAL_EXPIRED)] == [approval]
    assert ground.records(Event.TOKEN_ISSUED) == []
    # Another one decides.
    dave = ground.person("dave")
    [again] = await ground.waiting(token=dave)
    await ground.say(again, token=dave)
    assert (await ground.ask(agent, task))["task"]["use"] == "once"


@pytest.mark.bears("RV18")
async def test_a_yes_of_whom_the_policy_no_longer_names_is_none(ground: Bank, agent: Process) -> None:
    task = (await ground.start(agent)).id
    approval = await waiting_for(ground, agent, task)
    await ground.say(approval)
    await ground.rig.push(POLICY.replace('User::"carol", ', ""))
    assert (await ground.ask(agent, task))["code"] == "approval_pending"
    assert [one.subject for one in ground.records(Event.APPROVAL_EXPIRED)] == [approval]


@pytest.mark.bears("RV16")
async def test_approved_and_then_the_user_is_gone(ground: Bank, agent: Process) -> None:
    """CIBA approved, the user disabled, then redeemed (CVE-2026-16103)."""
    task = (await ground.start(agent, user_token=ground.rig.oidc.token("alice", sid="s-alice"))).id
    approval = await waiting_for(ground, agent, task)
    await ground.say(approval)
    await sign_out(ground, "alice")
    assert (await ground.ask(agent, task))["code"] in {"task_ended", "user_session_ended"}
    late = await ground.say(approval)
    assert late.status_code == 403
    assert ground.records(Event.TOKEN_ISSUED) == []


@pytest.mark.bears("RV11")
async def test_a_yes_that_is_taken_back_kills_its_token(ground: Bank, agent: Process) -> None:
    task = (await ground.start(agent)).id
    approval = await waiting_for(ground, agent, task)
    await ground.say(approval)
    claims = await ground.ask(agent, task)
    taken = await ground.say(approval, "withdraw", reason="wrong shop")
    assert (taken.status_code, taken.json()["state"]) == (200, "withdrawn")
    [revoked] = ground.records(Event.TOKEN_REVOKED)
    [withdrawn] = ground.records(Event.APPROVAL_WITHDRAWN)
    assert revoked.fields["jti_hash"] == withdrawn.fields["jti_hash"]
    assert revoked.fields["reasons"] == ("approval_withdrawn",)
    assert claims["jti"] not in str(revoked.fields)
    # The task itself goes on, and is not granted this again.
    assert (await ground.ask(agent, task))["code"] == "approval_denied"
    read = [{"type": "api", "locations": [BANK], "actions": ["account.read"]}]
    limits = payment()[0]["constraints"]
    assert "jti" in await ground.ask(agent, task, [read[0] | {"constraints": limits}])


async def test_a_pause_voids_what_was_asked_before(ground: Bank, agent: Process) -> None:
    """A high-consequence item that crossed a time in which the task was not active needs a fresh approval."""
    task = (await ground.start(agent)).id
    approval = await waiting_for(ground, agent, task)
    await ground.say(approval)
    for change in ("suspend", "resume"):
        answer = await agent.http.post(f"/tasks/{task}/{change}")
        assert answer.status_code == 200, answer.text
    assert (await ground.ask(agent, task))["code"] == "approval_pending"
    assert approval not in await ground.waiting()


async def sign_out(ground: Bank, name: str) -> None:
    """Have the identity provider say that a person signed out (OpenID Connect Back-Channel Logout 1.0)."""
    answer = await ground.people.post("/backchannel-logout", data={"logout_token": ground.logout_token(name)})
    assert answer.status_code == 200, answer.text
