"""Ends attacked at the real port: against new tokens and children, below a dead task, twice, late, and while nobody is there."""

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio
import httpx2
import pytest

from broker._proto.broker.server.v1 import tasks_pb2
from broker._proto.service import Stub
from broker.clock import SystemClock
from broker.server.api.grpc import tasks
from broker.server.api.http.token_formats import ACCESS_TOKEN
from broker.spiffe import SpiffeId
from tests.attacks.tasks.binding_rig import Desk, Process, desk, desk_settings, eventually, register, short_directory
from tests.attacks.tasks.listening import listening
from tests.fakes.oidc import OidcIssuer
from tests.integration.test_server_identity import DEADLINE, Estate, admin_channel, own_bundle, running
from tests.integration.test_token_endpoint import DETAILS, TICKETS, TRIAGE

ROUNDS = int(os.environ.get("BROKER_RACE_ROUNDS", "12"))
"""Ends that are raced against new tokens and children; BROKER_RACE_ROUNDS asks for more."""
ENTIRE = json.dumps(DETAILS)


@dataclass
class Hop:
    """One agent of a chain: its process, its task, its token."""

    id: SpiffeId
    process: Process
    task: str = ""
    token: str = ""


@pytest.fixture
async def at(oidc: OidcIssuer) -> AsyncIterator[Desk]:
    with short_directory() as directory:
        async with desk(directory, oidc) as opened:
            yield opened


async def hop(at: Desk, number: int) -> Hop:
    """An agent with an entry and a process; number 0 is the desk's own."""
    spiffe_id = TRIAGE if number == 0 else SpiffeId(f"spiffe://example.org/hop/{number}")
    entry = at.entry if number == 0 else await register(at.one, at.agent_id, spiffe_id)
    return Hop(spiffe_id, await at.process(f"ws_{number}", entry))


async def begin(at: Desk, first: Hop, **changes: str) -> None:
    answer = await first.process.http.post("/token", data=at.form(**changes))
    assert answer.status_code == 200, answer.text
    first.task, first.token = answer.json()["task"], answer.json()["access_token"]


async def child(parent: Hop, agent: SpiffeId | str, **changes: str) -> httpx2.Response:
    asked = {"agent": str(agent), "purpose": "a part of it", "authorization_details": ENTIRE} | changes
    return await parent.process.http.post(f"/tasks/{parent.task}/children", data=asked)


async def taken(at: Desk, parent: Hop, own: Hop) -> httpx2.Response:
    """Exchange the parent's token, as the agent that a task was started for."""
    asked = at.form(subject_token=parent.token, subject_token_type=ACCESS_TOKEN)
    del asked["purpose"], asked["authorization_details"]
    return await own.process.http.post("/token", data=asked | ({"task": own.task} if own.task else {}))


async def is_active(one: Hop, token: str = "") -> bool:
    answer = await one.process.http.post("/introspect", data={"token": token or one.token})
    return bool(answer.json()["active"])


def refusals(at: Desk) -> list[str]:
    return [str(one.fields["reason"]) for one in at.records("token_refused", "task_refused")]


@pytest.mark.bears("RV03", "RV04", "V02", "V03", "V04")
async def test_an_end_against_children_and_tokens_at_the_same_moment(at: Desk) -> None:
    """Whatever comes first: no child and no token is there after the end that was not ended by it."""
    first, second = await hop(at, 0), await hop(at, 1)
    survivors, made, luck = 0, 0, random.Random(4711)
    ended: list[str] = []
    for number in range(ROUNDS):
        await begin(at, first)
        renewal = at.form(task=first.task)
        del renewal["purpose"]
        ending = "complete" if number % 2 else "revoke"
        asks = {
            "child": lambda: child(first, second.id),
            "token": lambda asked=renewal: first.process.http.post("/token", data=asked),
            "end": lambda how=ending: first.process.http.post(f"/tasks/{first.task}/{how}"),
        }
        order = luck.sample(2 * list(asks), 2 * len(asks))
        answers = list(zip(order, await asyncio.gather(*(asks[one]() for one in order)), strict=True))
        assert [answer.status_code for name, answer in answers if name == "end"] == [200, 200]
        tokens = [one.json()["access_token"] for name, one in answers if name == "token" and one.status_code == 200]
        children = [one.json()["id"] for name, one in answers if name == "child" and one.status_code == 201]
        made += len(tokens) + len(children)
        survivors += sum([await is_active(first, token) for token in [first.token, *tokens]])
        for each in children:
            shown = await second.process.http.get(f"/tasks/{each}")
            assert shown.json()["state"] == "cascaded", shown.text
            second.task = each
            assert (await taken(at, first, second)).status_code == 400
        assert (await child(first, second.id)).status_code in {400, 403, 409}
        ended += [first.task, *children]
    assert survivors == 0
    assert sorted(one.subject for one in at.records("task_ended")) == sorted(ended), "each has ended once"
    print(f"rounds {ROUNDS}: {made} tokens and children came before the end, none outlived it")


@pytest.mark.bears("RV04", "V06")
async def test_a_dead_task_in_the_middle_shields_nothing_below_it(at: Desk) -> None:
    hops = [await hop(at, number) for number in range(3)]
    root, middle, leaf = hops
    await begin(at, root)
    for above, own, ttl in ((root, middle, "3"), (middle, leaf, "600")):
        own.task = (await child(above, own.id, ttl=ttl)).json()["id"]
        own.token = (await taken(at, above, own)).json()["access_token"]
    # Nobody calls: time alone ends it, for what is below as well.

    async def is_over() -> bool:
        return not await is_active(middle)

    await eventually(is_over)
    assert not await is_active(leaf)
    async with listening(at.channel) as ear:
        answer = await root.process.http.post(f"/tasks/{root.task}/revoke")
        assert answer.status_code == 200, answer.text
        assert [await ear.refuses(one.token) for one in hops] == ["task_ended"] * 3
    for one in hops:
        assert not await is_active(one)
        asked = at.form(task=one.task)
        del asked["purpose"]
        assert (await one.process.http.post("/token", data=asked)).status_code == 400
    states = {one.subject: one.fields["state"] for one in at.records("task_ended")}
    assert (states[root.task], states[middle.task]) == ("revoked", "expired")
    assert states[leaf.task] in {"expired", "cascaded"}


@pytest.mark.bears("RV13", "V04")
async def test_of_two_with_the_same_version_one_is_late(at: Desk) -> None:
    first, second = await hop(at, 0), await hop(at, 1)
    await begin(at, first)
    one = {"expected_version": "2"}
    answer = await first.process.http.post(f"/tasks/{first.task}/suspend", data=one)
    assert (answer.status_code, answer.json()["error_code"]) == (409, "stale_version"), answer.text
    answers = await asyncio.gather(
        *(first.process.http.post(f"/tasks/{first.task}/suspend", data={"expected_version": "1"}) for _ in range(2))
    )
    assert sorted(answer.status_code for answer in answers) in ([200, 200], [200, 409])
    resumed = await first.process.http.post(f"/tasks/{first.task}/resume", data={"expected_version": "2"})
    assert (resumed.status_code, resumed.json()["version"]) == (200, 3)
    async with admin_channel(at.one) as admin:
        operators = Stub(admin, tasks.BINDING)
        stale = tasks_pb2.RevokeTaskRequest(task_id=first.task, expected_version=2, reason="late")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await operators.RevokeTask(stale, timeout=DEADLINE)
        assert "version" in str(caught.value.details())
        assert await is_active_task(first)
        started = await child(first, second.id)
        below = started.json()["id"]
        # The child, then the parent, twice and at once, by two people.
        names = [below, first.task, below, first.task]
        ends = await asyncio.gather(
            *(operators.RevokeTask(tasks_pb2.RevokeTaskRequest(task_id=name), timeout=DEADLINE) for name in names),
            return_exceptions=True,
        )
        wrong = [one for one in ends if isinstance(one, BaseException) and "cascaded" not in str(one)]
        assert wrong == []
    ended = [one.subject for one in at.records("task_ended")]
    assert sorted(ended) == sorted([first.task, below]), "each has ended once"
    assert refusals(at)[0] == "stale_version"


async def is_active_task(one: Hop) -> bool:
    return bool((await one.process.http.get(f"/tasks/{one.task}")).json()["state"] == "active")


@pytest.mark.bears("V06", "RV09")
async def test_a_deadline_that_passes_while_the_server_is_down(oidc: OidcIssuer) -> None:
    with short_directory() as directory:
        async with desk(directory, oidc) as at:
            first = await hop(at, 0)
            await begin(at, first)
            word = tasks_pb2.StartTaskRequest(
                workload=first.process.session, user_token=oidc.token("alice"), purpose="short", ttl=2,
                authorization_details=ENTIRE,
            )  # fmt: skip
            short = await Stub(at.channel, tasks.BINDING).StartTask(word, timeout=DEADLINE)
            token = await Stub(at.channel, tasks.BINDING).IssueToken(
                tasks_pb2.IssueTokenRequest(workload=first.process.session, task_id=short.id, resource=TICKETS),
                timeout=DEADLINE,
            )
        # It is over before anybody is there again.
        await asyncio.sleep(max(0.0, short.expires_at - SystemClock().now().timestamp()))
        async with reopened(directory, oidc, at) as again:
            holder = Hop(TRIAGE, await again.process("ws_0"), short.id, token.access_token)
            assert not await is_active(holder)
            assert await is_active(holder, first.token), "the other one goes on"

            async def is_written() -> bool:
                return [(one.subject, one.fields["cause"]) for one in again.records("task_ended")] == [
                    (short.id, "expired")
                ]

            await eventually(is_written)
            async with listening(again.channel) as ear:
                assert (ear.says(holder.token), ear.says(first.token)) == ("task_ended", "alive")


@asynccontextmanager
async def reopened(directory: Any, oidc: OidcIssuer, before: Desk) -> AsyncIterator[Desk]:
    """The same server again, after a stop."""
    async with running(Estate(directory), **desk_settings(oidc)) as one, AsyncExitStack() as stack:
        before.node.trusted = await own_bundle(one)
        async with before.node.dial(one.port) as channel:
            yield Desk(one, oidc, directory, stack, before.node, before.agent_id, channel, before.entry)
