"""Attacks on who acts for whom, through the real TLS port and the node agent's real channel. Every refusal leaves its record."""

import asyncio
import json
import os
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx2
import pytest

from broker._proto.broker.server.v1 import policies_pb2
from broker._proto.service import Stub
from broker.server.api.grpc import policies
from broker.server.api.http.token_formats import ACCESS_TOKEN, JWT
from broker.spiffe.jose import parse_compact
from tests.attacks.tasks.life_rig import NEIGHBOUR, WIKI, Life, hop, living, refused
from tests.attacks.tasks.policy_rig import OPEN
from tests.fakes.oidc import OidcIssuer
from tests.integration.identity_rig import DEADLINE, Estate, admin_channel
from tests.integration.test_token_endpoint import DETAILS, TICKETS, TRIAGE, Process

STEPS = int(os.environ.get("BROKER_LONG_CHAIN_STEPS", "400"))
"""Steps of the random walk; X02 names 100,000: 25 minutes on two cores that have much else to do."""
pytestmark = pytest.mark.timeout(180 + STEPS // 10)


@pytest.fixture
async def life(ground_of: Estate, oidc: OidcIssuer) -> AsyncIterator[Life]:
    async with living(ground_of, oidc) as one:
        yield one


def error(response: httpx2.Response) -> str:
    body = response.json()
    assert response.status_code == 400, response.text
    assert body["error"] == "invalid_request", response.text
    assert "access_token" not in body
    code: str = body["error_code"]
    return code


def claims_of(token: str) -> dict[str, Any]:
    return dict(parse_compact(token).payload)


def nested(act: Any) -> list[str]:
    """The actors, the present one first; nothing else stands in an ``act``."""
    found = []
    while act is not None:
        assert act.keys() <= {"sub", "act"}
        found.append(act["sub"])
        act = act.get("act")
    return found


# ---- what the subject token says of actors


@pytest.mark.bears("TX03", "TX04", "TX05", "AC01", "AC04")
async def test_a_subject_token_that_speaks_of_actors(life: Life) -> None:
    agent = await life.agent(TRIAGE, "ws_1")
    me, other = {"sub": str(TRIAGE)}, {"sub": str(NEIGHBOUR)}
    svid = await life.jwt_svid(TRIAGE)
    mine = {"actor_token": svid, "actor_token_type": JWT}
    # Claims of the subject token, the reason without an actor token, and the reason with the caller's own.
    rows: list[tuple[dict[str, Any], str, str]] = [
        ({"act": me}, "subject_delegated", "subject_delegated"),
        ({"act": {}}, "subject_delegated", "subject_delegated"),
        ({"act": me | {"aud": TICKETS, "exp": 9999999999, "scope": "all"}}, "subject_delegated", "subject_delegated"),
        ({"act": me, "may_act": me}, "actor_token_required", "subject_delegated"),
        ({"may_act": me}, "actor_token_required", ""),
        ({"may_act": other}, "actor_token_required", "may_act_mismatch"),
        ({"may_act": me | {"aud": "x"}}, "actor_token_required", "may_act_unknown"),
        ({"may_act": {"sub": "triage"}}, "actor_token_required", "may_act_unknown"),
    ]
    reasons = []
    for claims, alone, with_actor in rows:
        subject = life.oidc.token("alice", **claims)
        reasons.append(error(await agent.http.post("/token", data=life.form(subject_token=subject))))
        assert reasons[-1] == alone, claims
        answer = await agent.http.post("/token", data=life.form(subject_token=subject, **mine))
        if with_actor:
            reasons.append(error(answer))
            assert reasons[-1] == with_actor, claims
        else:
            assert nested(claims_of(answer.json()["access_token"])["act"]) == [str(TRIAGE)]
    # By the node agent's vouching there is no actor token; the workload that the user did not name gets nothing either.
    for claims, code in (({"act": me}, "subject_delegated"), ({"may_act": other}, "may_act_mismatch")):
        reasons.append(await refused(life.start(agent, user_token=life.oidc.token("alice", **claims))))
        assert reasons[-1] == code
    records = life.records("token_refused", "task_refused")
    assert [one.fields["reason"] for one in records] == reasons
    assert {one.actor for one in records} == {str(TRIAGE)}
    assert len(life.records("task_started")) == len(life.records("token_issued")) == 1, "of the one that was right"


@pytest.mark.bears("AC01", "TX04")
async def test_a_chain_is_rebuilt_from_our_records_whoever_says_otherwise(life: Life, tmp_path: Path) -> None:
    line = await life.chain(2)
    (agent, task), (below_agent, below) = line
    token = await life.issue(agent, task.id)
    forged = claims_of(token) | {"act": {"sub": str(hop(1)), "act": {"sub": str(NEIGHBOUR)}}}
    reasons = []
    with OidcIssuer.start(tmp_path) as stranger:
        untrusted = stranger.token("alice", act={"sub": str(hop(0))})
        plain = stranger.token("alice")
        # Our own claims with another chain, signed by somebody: by the stranger, and by the user's provider.
        by_stranger = stranger.raw_token({"alg": "RS256", "kid": "key-1", "typ": "at+jwt"}, forged)
        by_provider = life.oidc.raw_token({"alg": "RS256", "kid": life.oidc.keys[0].kid, "typ": "at+jwt"}, forged)
        for subject in (untrusted, plain, by_stranger, by_provider):
            reasons.append(error(await below_agent.http.post("/token", data=life.form(subject_token=subject))))
    assert len(life.records("token_refused")) == len(reasons)
    assert [one.fields["reason"] for one in life.records("token_refused")] == reasons
    assert life.records("token_issued")[-1].subject == task.id, "and nothing else was issued"
    # The agent below shows the token of the one above: what it gets says who is behind it, by the record of the task.
    answer = await below_agent.http.post("/token", data=_again(token))
    assert answer.status_code == 200, answer.text
    assert nested(claims_of(answer.json()["access_token"])["act"]) == [str(hop(1)), str(hop(0))]
    assert claims_of(answer.json()["access_token"])["task"]["id"] == below.id


def _again(token: str, resource: str = TICKETS, **changes: str) -> dict[str, str]:
    """An exchange of one of our own tokens."""
    return {
        "grant_type": "urn:ietf:params:oauth:grant-type:token-exchange",
        "subject_token": token,
        "subject_token_type": ACCESS_TOKEN,
        "resource": resource,
    } | changes


@pytest.mark.bears("AC02", "AC03", "AC05", "AC06")
async def test_five_hops_and_no_sixth_and_no_way_back(life: Life) -> None:
    line = await life.chain(5)
    names = [str(hop(number)) for number in (4, 3, 2, 1, 0)]
    tokens = []
    for number, (agent, task) in enumerate(line):
        tokens.append(await life.issue(agent, task.id))
        # The third hop nests as the second did: nobody is overwritten.
        assert nested(claims_of(tokens[-1])["act"]) == names[4 - number :]
        said = await life.introspected(tokens[-1])
        assert said["active"]
        assert said["act"] == claims_of(tokens[-1])["act"], "introspection says the same"
    # By the tokens alone, hop after hop at the token endpoint, it is the same chain.
    held = tokens[0]
    for number, (agent, task) in enumerate(line[1:], 1):
        answer = await agent.http.post("/token", data=_again(held))
        assert answer.status_code == 200, answer.text
        held = answer.json()["access_token"]
        assert nested(claims_of(held)["act"]) == names[4 - number :]
        assert claims_of(held)["task"]["hop"] == number + 1
        assert claims_of(held)["task"]["id"] == task.id

    leaf_agent, leaf = line[-1]
    assert await refused(life.child(leaf_agent, leaf.id, hop(5))) == "act_chain_depth"
    assert await refused(life.child(line[3][0], line[3][1].id, hop(1))) == "act_chain_cycle"
    assert await refused(life.child(line[3][0], line[3][1].id, hop(3))) == "act_chain_cycle"
    assert await refused(life.change(line[1][0], line[1][1].id, "handoff", to=str(hop(0)))) == "act_chain_cycle"
    for parent, agent, to in ((leaf.id, leaf_agent, hop(5)), (line[3][1].id, line[3][0], hop(0))):
        form = {"agent": str(to), "purpose": "x", "authorization_details": json.dumps(DETAILS)}
        answer = await agent.http.post(f"/tasks/{parent}/children", data=form)
        assert answer.status_code == 403, answer.text
        assert answer.json()["error_code"] == ("act_chain_depth" if to == hop(5) else "act_chain_cycle")
    reasons = [one.fields["reason"] for one in life.records("task_refused")]
    assert reasons == ["act_chain_depth", *["act_chain_cycle"] * 3, "act_chain_depth", "act_chain_cycle"]
    assert len(life.records("task_started")) == 5
    assert await life.is_active(held), "a refusal ends nothing"


# ---- names


@pytest.mark.bears("AC07")
async def test_a_name_that_changes_hands_gives_nothing_to_who_has_it_now(life: Life) -> None:
    agent = await life.agent(TRIAGE, "ws_1")
    names = {"preferred_username": "alice", "email": "alice@example.org", "name": "Alice"}
    before = (await agent.http.post("/token", data=life.form(subject_token=life.oidc.token("u-1", **names)))).json()
    claims = claims_of(before["access_token"])
    assert (claims["sub"], claims["act"]) == ("u-1", {"sub": str(TRIAGE)})
    assert not {"alice", "alice@example.org", "Alice"} & set(map(str, claims.values())), "no name that may change hands"
    heir = life.oidc.token("u-2", **names)
    form = {name: value for name, value in life.form(subject_token=heir).items() if name != "purpose"}
    answer = await agent.http.post("/token", data=form | {"task": before["task"]})
    assert answer.status_code == 400, answer.text
    assert "access_token" not in answer.json()
    (record,) = life.records("token_refused")
    assert record.fields["reason"] == answer.json()["error_code"]
    assert life.about(before["task"], "token_issued")[0].fields["user"] == "u-1"
    fresh = (await agent.http.post("/token", data=life.form(subject_token=heir))).json()
    assert (claims_of(fresh["access_token"])["sub"], fresh["task"] == before["task"]) == ("u-2", False)


@pytest.mark.bears("AC09")
async def test_nobody_makes_itself_privileged_by_saying_so(life: Life) -> None:
    """Wherever a child may say something: the user's token, its own request, its authority, and what a policy may read."""
    agent = await life.agent(hop(0), "ws_hop0")
    parent = await life.start(agent)
    below_agent = await life.agent(hop(1), "ws_hop1")
    child = {"agent": str(hop(1)), "purpose": "x", "authorization_details": json.dumps(DETAILS)}
    raised = json.dumps([DETAILS[0] | {"sub_profile": "admin"}])
    for changes, code in (
        ({"sub_profile": "admin"}, "parameter_unknown"),
        ({"authorization_details": raised}, "invalid_authorization_details"),
    ):
        answer = await agent.http.post(f"/tasks/{parent.id}/children", data=child | changes)
        assert (answer.status_code, answer.json()["error_code"]) == (400, code), answer.text
    below = await life.child(agent, parent.id, hop(1))
    again = await below_agent.http.post("/token", data=life.form(task=below.id, sub_profile="admin"))
    assert error(again) == "parameter_unknown"
    spoken = life.oidc.token("alice", sub_profile="admin", act_profile="admin")
    issued = (await below_agent.http.post("/token", data=life.form(subject_token=spoken))).json()
    assert "admin" not in json.dumps(claims_of(issued["access_token"])), "it is not taken over"
    assert "admin" not in json.dumps(claims_of(await life.issue(below_agent, below.id)))
    assert len(life.records("task_refused", "token_refused")) == 3
    # Nor does a rule come into force that would ask for it.
    async with admin_channel(life.server) as admin:
        for question in ("principal.sub_profile", "context.sub_profile", "context.user.sub_profile"):
            text = OPEN + f'@id("p") permit(principal, action, resource) when {{ {question} == "admin" }};'
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await Stub(admin, policies.BINDING).PushPolicy(
                    policies_pb2.PushPolicyRequest(text=text), timeout=DEADLINE
                )
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert [one.subject for one in life.records("admin_refused")] == ["policy"] * 3
    assert [one.fields["source"] for one in life.records("policy_changed")] == ["built_in"]


# ---- nothing ever widens


ACTIONS = ("ticket.read", "ticket.write", "ticket.close", "page.read")
RESOURCES = (TICKETS, WIKI)
Power = dict[str, frozenset[str]]
"""What may be done, by service."""


def details_of(power: Power) -> str:
    return json.dumps([{"type": "api", "locations": [at], "actions": sorted(power[at])} for at in sorted(power)])


def power_of(details: Any) -> Power:
    return {one["locations"][0]: frozenset(one["actions"]) for one in details}


def is_within(inner: Power, outer: Power) -> bool:
    return all(at in outer and actions <= outer[at] for at, actions in inner.items())


class Walk:
    """A random walk over tasks, children and tokens; each answer is held against what was given before."""

    def __init__(self, life: Life, agents: list[Process], luck: random.Random) -> None:
        self.life, self.agents, self.luck = life, agents, luck
        self.lines: list[tuple[tuple[int, Any, Power], ...]] = []
        """Of each task its line, the root first: number of the agent, task, what it may do."""
        self.tokens: list[tuple[tuple[tuple[int, Any, Power], ...], dict[str, Any], str]] = []
        self.done: dict[str, int] = {"child": 0, "token": 0, "again": 0, "refused": 0}

    def some_power(self) -> Power:
        chosen = self.luck.sample(RESOURCES, self.luck.randint(1, len(RESOURCES)))
        return {at: frozenset(self.luck.sample(ACTIONS, self.luck.randint(1, len(ACTIONS)))) for at in chosen}

    def part_of(self, power: Power) -> Power:
        chosen = self.luck.sample(sorted(power), self.luck.randint(1, len(power)))
        return {
            at: frozenset(self.luck.sample(sorted(power[at]), self.luck.randint(1, len(power[at])))) for at in chosen
        }

    def forget_what_ends(self) -> None:
        """Leave what may end while it is asked for: a long walk outlives the shorter of its tasks."""
        soon = time.time() + DEADLINE
        self.lines = [line for line in self.lines if line[-1][1].expires_at > soon]
        self.tokens = [one for one in self.tokens if one[0][-1][1].expires_at > soon]

    async def step(self) -> None:
        if not self.lines or self.luck.random() < 0.05:
            power, number = self.some_power(), self.luck.randrange(len(self.agents))
            task = await self.life.start(
                self.agents[number], authorization_details=details_of(power), ttl=self.luck.choice([100, 400, 3000])
            )
            self.lines.append(((number, task, power),))
            return
        move = self.luck.choice([self.child, self.child, self.token, self.token, self.again])
        await move(self.luck.choice(self.lines))

    async def child(self, line: tuple[tuple[int, Any, Power], ...]) -> None:
        number, parent, power = line[-1]
        wanted = self.part_of(power) if self.luck.random() < 0.7 else self.some_power()
        to = self.luck.randrange(len(self.agents))
        may = is_within(wanted, power) and len(line) < 8 and to not in {each for each, _, _ in line}
        asked = self.life.child(
            self.agents[number], parent.id, hop(to), authorization_details=details_of(wanted),
            ttl=self.luck.choice([0, 50, 10_000]),
        )  # fmt: skip
        if not may:
            await refused(asked)
            self.done["refused"] += 1
            return
        made = await asked
        assert (made.parent, made.root, made.depth) == (parent.id, line[0][1].id, len(line))
        assert is_within(power_of(json.loads(made.authorization_details)), wanted)
        assert made.expires_at <= parent.expires_at
        self.lines.append((*line, (to, made, wanted)))
        self.done["child"] += 1

    async def token(self, line: tuple[tuple[int, Any, Power], ...]) -> None:
        number, task, power = line[-1]
        resource = self.luck.choice(sorted(power)) if self.luck.random() < 0.8 else self.luck.choice(RESOURCES)
        actions = sorted(power.get(resource, ())) if self.luck.random() < 0.7 else ACTIONS
        scope = frozenset(self.luck.sample(actions, self.luck.randint(0, min(2, len(actions)))))
        may = resource in power and scope <= power[resource]
        asked = self.life.issue(self.agents[number], task.id, resource=resource, scope=" ".join(sorted(scope)))
        if not may:
            await refused(asked)
            self.done["refused"] += 1
            return
        token = await asked
        self.judge(line, claims_of(token), resource)
        self.tokens.append((line, claims_of(token), token))
        self.done["token"] += 1

    async def refusal(self) -> None:
        """Beyond their rate refusals are counted only: the next record says how many, and this one is it."""
        number, task, _ = self.lines[-1][-1]
        await refused(self.life.issue(self.agents[number], task.id, resource="https://elsewhere.example.org"))
        self.done["refused"] += 1

    async def again(self, line: tuple[tuple[int, Any, Power], ...]) -> None:
        """The agent shows a token that some agent had: of its own task, of the one above, or anybody's."""
        if not self.tokens:
            return
        shown_line, shown, token = self.luck.choice(self.tokens)
        near = [
            each for each in self.lines if each[: len(shown_line)] == shown_line and len(each) <= len(shown_line) + 1
        ]
        if self.luck.random() < 0.8:
            line = self.luck.choice(near)
        resource = shown["aud"] if self.luck.random() < 0.8 else self.luck.choice(RESOURCES)
        scope = self.luck.sample(ACTIONS, self.luck.choice([0, 0, 1]))
        form = _again(token, resource, task=line[-1][1].id) | ({"scope": " ".join(scope)} if scope else {})
        answer = await self.agents[line[-1][0]].http.post("/token", data=form)
        if answer.status_code != 200:
            assert "access_token" not in answer.json()
            self.done["refused"] += 1
            return
        assert line in near, "the task of the token, or one right below it"
        claims = claims_of(answer.json()["access_token"])
        self.judge(line, claims, resource)
        assert is_within(power_of(claims["authorization_details"]), power_of(shown["authorization_details"]))
        assert set(claims["scope"].split()) <= set(shown["scope"].split())
        assert claims["exp"] <= shown["exp"]
        self.done["again"] += 1

    def judge(self, line: tuple[tuple[int, Any, Power], ...], claims: dict[str, Any], resource: str) -> None:
        """Hold a token against its task and every one above."""
        power = power_of(claims["authorization_details"])
        assert claims["aud"] == resource
        assert set(power) == {resource}
        assert set(claims["scope"].split()) <= power[resource]
        for _, task, allowed in line:
            assert is_within(power, allowed)
            assert claims["exp"] <= task.expires_at
        assert (claims["sub"], claims["task"]["id"], claims["task"]["root"]) == ("alice", line[-1][1].id, line[0][1].id)
        assert nested(claims["act"]) == [str(hop(number)) for number, _, _ in reversed(line)]
        assert claims["client_id"] == claims["act"]["sub"]


def refusals_told(life: Life) -> int:
    """Of how many refusals the audit log tells, those included that it only counts."""
    count = 0
    for record in life.records("task_refused", "token_refused"):
        reasons = record.fields.get("reasons", [])
        count += 1 + sum(int(text.removeprefix("left_out:")) for text in reasons if text.startswith("left_out:"))
    return count


@pytest.mark.bears("X02", "AC05")
async def test_nothing_ever_widens_along_any_chain(ground_of: Estate, oidc: OidcIssuer) -> None:
    seed = int(os.environ.get("BROKER_SEED", "4711"))
    async with living(ground_of, oidc, max_depth=8, max_children=1000) as life:
        walk = Walk(
            life, [await life.agent(hop(number), f"ws_hop{number}") for number in range(9)], random.Random(seed)
        )
        for number in range(STEPS):
            if number % 50 == 0:
                walk.forget_what_ends()
            await walk.step()
        assert min(walk.done.values()) > STEPS / 100, (seed, walk.done)
        assert max(len(line) for line in walk.lines) >= 4
        async with asyncio.timeout(DEADLINE):
            while (told := refusals_told(life)) < walk.done["refused"]:
                await walk.refusal()
        assert told == walk.done["refused"], "each refusal is on record"
