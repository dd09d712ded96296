"""Attacks on the policy: ways around it, ways to make it fail, ways to make it look at the wrong thing."""

import ast
import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from broker._proto.broker.server.v1 import feed_pb2, policies_pb2
from broker._proto.service import Stub
from broker.sdk.feed import FeedState
from broker.server.api.grpc import feed, policies
from broker.server.tasks.policy import bundle as bundles
from broker.server.tasks.policy import cedar
from broker.spiffe import SpiffeId
from tests.attacks.tasks.policy_rig import NO_TASKS, NO_TOKENS, OPEN, Rig, rig
from tests.fakes.oidc import OidcIssuer
from tests.integration.identity_rig import DEADLINE, Estate, admin_channel
from tests.integration.test_token_endpoint import DETAILS, SERVICE, TICKETS, TRIAGE, Process

EVIL = SpiffeId("spiffe://example.org/triage-evil")
BELOW = SpiffeId("spiffe://example.org/triage/one")
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def estate() -> Iterator[Estate]:
    # Short: a Unix socket's path has at most 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="broker", dir="/tmp"))
    yield Estate(directory)
    shutil.rmtree(directory)


@pytest.fixture
def oidc(tmp_path: Path) -> Iterator[OidcIssuer]:
    with OidcIssuer.start(tmp_path) as issuer:
        yield issuer


@pytest.fixture
async def ground(estate: Estate, oidc: OidcIssuer) -> AsyncIterator[Rig]:
    async with rig(estate, oidc) as one:
        yield one


async def at_https(agent: Process, form: dict[str, str], key: str = "") -> str:
    """Exchange at ``/token``; give the error's code, empty for a token."""
    answer = await agent.http.post("/token", data=form, headers={"idempotency-key": key} if key else {})
    body: dict[str, Any] = answer.json()
    if answer.status_code == 200:
        assert body["access_token"]
        return ""
    assert "access_token" not in body
    assert answer.status_code == (409 if body["error_code"] == "idempotency_spent" else 400)
    if body["error_code"] == "policy_denied":
        assert (body["error"], body["hint"]) == ("invalid_request", "ask the platform team")
    return str(body["error_code"])


async def at_agent(call: Awaitable[Any]) -> str:
    """Call as a node agent; give the error's code, empty for an answer."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        refused = error
    else:
        return ""
    assert refused.code() is grpc.StatusCode.PERMISSION_DENIED, refused.details()
    raw = dict(refused.trailing_metadata() or ())["grpc-status-details-bin"]
    return "policy_denied" if b"policy_denied" in raw else str(raw)


def running(ground: Rig, task: str, **changes: str) -> dict[str, str]:
    return {name: value for name, value in ground.form(task=task, **changes).items() if name != "purpose"}


@pytest.mark.bears("TX25")
async def test_no_door_and_no_variant_of_the_exchange_skips_the_policy(ground: Rig) -> None:
    """Each variant is a token before, and a refusal with its record after the push; those that were kept for a retry, too."""
    async with ground.agent(TRIAGE, "ws_1") as agent:
        task = await ground.start(agent)
        scope_only = {
            name: value for name, value in ground.form(scope="ticket.read").items() if name != "authorization_details"
        }
        variants: dict[str, Callable[[], Awaitable[str]]] = {
            "https: task and token": lambda: at_https(agent, ground.form()),
            "https: retry": lambda: at_https(agent, ground.form(subject_token=kept), "k1"),
            "https: by scope alone": lambda: at_https(agent, scope_only),
            "https: any token": lambda: at_https(
                agent, ground.form(subject_token_type="urn:ietf:params:oauth:token-type:jwt")
            ),
            "https: jwt asked for": lambda: at_https(
                agent, ground.form(requested_token_type="urn:ietf:params:oauth:token-type:jwt")
            ),
            "https: audience": lambda: at_https(agent, ground.form(audience=TICKETS)),
            "https: running task": lambda: at_https(agent, running(ground, task.id)),
            "https: running task, scope": lambda: at_https(agent, running(ground, task.id, scope="ticket.read")),
            "https: running task, retry": lambda: at_https(agent, running(ground, task.id, subject_token=kept), "k2"),
            "agent: token": lambda: at_agent(ground.issue(agent, task.id)),
            "agent: scope": lambda: at_agent(ground.issue(agent, task.id, scope="ticket.read")),
            "agent: retry": lambda: at_agent(ground.issue(agent, task.id, idempotency_key="k3")),
        }
        kept = ground.oidc.token("alice")
        assert {name: await variant() for name, variant in variants.items()} == dict.fromkeys(variants, "")
        issued = len(ground.records("token_issued"))
        put = await ground.push(NO_TOKENS)
        told = {name: await variant() for name, variant in variants.items()}
        # A kept answer whose token the push has revoked already is spent before anybody asks.
        assert told.pop("https: retry") in {"policy_denied", "idempotency_spent"}
        assert told == dict.fromkeys(told, "policy_denied")
        refusals = ground.records("token_refused")
        assert len(refusals) == len(variants)
        for record in (one for one in refusals if one.fields["reason"] != "idempotency_spent"):
            assert (record.fields["reason"], record.fields["decision"]) == ("policy_denied", "deny")
            assert (record.fields["rules"], record.fields["policy"]) == (("no-tokens",), put.hash)
        assert len(ground.records("token_issued")) == issued
        # A task may still begin; with the other policy neither, and neither is its kept answer given.
        once = {"user_token": kept, "idempotency_key": "k4"}
        assert await at_agent(ground.start(agent, **once)) == ""
        await ground.push(NO_TASKS)
        assert await at_agent(ground.start(agent)) == "policy_denied"
        assert await at_agent(ground.start(agent, **once)) == "policy_denied"
        assert [one.fields["rules"] for one in ground.records("task_refused")] == [("no-tasks",)] * 2


def test_whatever_makes_a_task_or_a_token_records_the_decision_that_let_it() -> None:
    """A new door cannot forget the policy: rows of tasks and tokens are added only beside a record that demands a decision."""
    beside = {"add_task": {"task_started", "task_started_for"}, "add_token": {"token_issued", "assertion_issued"}}
    found = dict.fromkeys(beside, 0)
    for path in sorted((ROOT / "broker/server").rglob("*.py")):
        if "store" in path.parts:
            continue
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            calls = [
                one for one in ast.walk(function) if isinstance(one, ast.Call) and isinstance(one.func, ast.Attribute)
            ]
            names = {one.func.attr: one for one in calls}  # type: ignore[attr-defined]
            for adds, records in beside.items():
                if adds in names:
                    found[adds] += 1
                    said = [names[record] for record in records & names.keys()]
                    assert said, f"{path}: {function.name} adds without a record"
                    for record in said:
                        assert "decision" in {keyword.arg for keyword in record.keywords}, f"{path}: {function.name}"
    assert min(found.values()) > 0


@pytest.mark.bears("AC08")
async def test_a_policy_about_the_agents_behind_never_comes_into_force(ground: Rig) -> None:
    async with ground.agent(TRIAGE, "ws_1") as agent:
        before = (await ground.push(OPEN)).hash
        text = '@id("deep") permit(principal, action, resource) when { context.act.act.sub == "spiffe://example.org/boss" };'
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ground.push(text)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert b"policy_reads_act" in dict(caught.value.trailing_metadata() or ())["grpc-status-details-bin"]
        assert await at_https(agent, ground.form()) == ""
        changes = ground.records("policy_changed")
        assert changes[-1].fields["policy"] == before
        assert bundles.hash_of(text) not in {one.fields["policy"] for one in changes}
        (refused,) = ground.records("admin_refused")
        assert (refused.subject, refused.fields["reason"]) == ("policy", "policy_reads_act")
        assert refused.actor == changes[-1].actor


@pytest.mark.bears("BG11")
async def test_a_rule_that_fails_denies(ground: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine would skip the forbid and allow. A question without what the rule reads stands for any such defect."""
    await ground.push(OPEN + '@id("far") forbid(principal, action, resource) when { context.hop > 3 };')
    async with ground.agent(TRIAGE, "ws_1") as agent:
        monkeypatch.setattr(cedar, "circumstances", lambda asked, reads, literals: {})
        assert await at_agent(ground.start(agent)) == "policy_denied"
        (refused,) = ground.records("task_refused")
        assert refused.fields["decision"] == "deny"
        assert "hop" in refused.fields["errors"][0]  # type: ignore[index]
        assert ground.records("task_started", "token_issued") == []
        monkeypatch.undo()


@pytest.mark.bears("SP11")
async def test_a_prefix_in_a_policy_ends_at_a_segment(ground: Rig) -> None:
    await ground.push('@id("triage") permit(principal in AgentPath::"spiffe://example.org/triage", action, resource);')
    async with (
        ground.agent(TRIAGE, "ws_1") as itself,
        ground.agent(BELOW, "ws_2") as below,
        ground.agent(EVIL, "ws_3") as evil,
    ):
        assert await at_https(itself, ground.form()) == ""
        assert await at_https(below, ground.form()) == ""
        answer = await evil.http.post("/token", data=ground.form())
        assert (answer.status_code, answer.json()["error_code"]) == (400, "policy_denied")
        assert await at_agent(ground.start(evil)) == "policy_denied"
        assert {one.fields["reason"] for one in ground.records("token_refused", "task_refused")} == {"policy_denied"}
        assert {one.actor for one in ground.records("task_started")} == {str(TRIAGE), str(BELOW)}


@pytest.mark.bears("X05")
@pytest.mark.parametrize("rules", [NO_TASKS, NO_TOKENS], ids=["no tasks", "no tokens"])
async def test_a_changed_policy_is_the_same_answer_everywhere(ground: Rig, rules: str) -> None:
    """Exchange, re-exchange, renewal at the agent's door, introspection, and a verifier on the feed."""
    async with ground.agent(TRIAGE, "ws_1") as agent, ground.agent(SERVICE, "ws_2") as verifier:
        issued = (await agent.http.post("/token", data=ground.form())).json()
        held = await ground.start(agent)
        renewed = await ground.issue(agent, held.id)
        state = FeedState()
        listening = Stub(ground.channel, feed.BINDING).Subscribe()
        await listening.write(feed_pb2.SubscribeRequest())
        state.apply(await asyncio.wait_for(listening.read(), DEADLINE), monotonic=0, now=0)

        async def alive(token: str) -> bool:
            answer = (await verifier.http.post("/introspect", data={"token": token})).json()
            return bool(answer["active"])

        assert await alive(issued["access_token"])
        assert await alive(renewed.access_token)
        await ground.push(rules)
        assert not await alive(issued["access_token"])
        assert not await alive(renewed.access_token)
        assert await at_https(agent, ground.form()) == "policy_denied"
        assert await at_https(agent, running(ground, issued["task"])) in {"policy_denied", "task_ended"}
        assert await at_agent(ground.issue(agent, held.id)) != ""
        dead = await _until_dead(listening, state, issued["task"], held.id)
        assert dead == {issued["task"], held.id}
        listening.cancel()
        ends = ground.records("task_ended" if rules is NO_TASKS else "token_revoked")
        assert {one.subject for one in ends} == {issued["task"], held.id}
        assert all(one.fields["reasons"][0].startswith("policy:no-t") for one in ends)  # type: ignore[index, union-attr]


async def _until_dead(listening: Any, state: FeedState, *tasks: str) -> set[str]:
    """Follow the feed until it has told of every task, by its end or by its token's."""
    told: set[str] = set()
    async with asyncio.timeout(DEADLINE):
        while told < set(tasks):
            message = await listening.read()
            if message.WhichOneof("kind") == "frame":
                state.apply(message, monotonic=0, now=0)
                told.add(message.frame.task)
    return told & set(tasks)


async def test_the_same_decision_is_explained(ground: Rig) -> None:
    """The refusal, its record and the explanation name the same rule of the same bundle."""
    async with ground.agent(TRIAGE, "ws_1") as agent:
        task = await ground.start(agent)
        token = await ground.issue(agent, task.id)
        put = await ground.push(NO_TOKENS)
        assert await at_agent(ground.issue(agent, task.id)) == "policy_denied"
        async with admin_channel(ground.server) as admin:
            stub = Stub(admin, policies.BINDING)
            asked = policies_pb2.PolicyQuestion(
                action="issueToken", agent=str(TRIAGE), user="alice", audience=TICKETS, actions=DETAILS[0]["actions"]
            )
            for request in ({"question": asked}, {"token": token.access_token}):
                told = await stub.ExplainDecision(policies_pb2.ExplainDecisionRequest(**request), timeout=DEADLINE)
                assert (told.effect, told.code, list(told.rules), told.policy) == (
                    "deny",
                    "policy_denied",
                    ["no-tokens"],
                    put.hash,
                )
                assert told.hint == "ask the platform team"
            told = await stub.ExplainDecision(policies_pb2.ExplainDecisionRequest(task_id=task.id), timeout=DEADLINE)
            assert (told.effect, told.task_state) == ("allow", "active")
            assert [(one.id, one.standing) for one in told.parts[0].trace] == [
                ("all", "applies"),
                ("no-tokens", "does not apply"),
            ]
        (refused,) = ground.records("token_refused")
        assert (refused.fields["rules"], refused.fields["policy"]) == (("no-tokens",), put.hash)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await Stub(ground.channel, policies.BINDING).GetPolicy(policies_pb2.GetPolicyRequest(), timeout=DEADLINE)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
