"""Races on the life of tasks, through the real doors: whatever comes first, nothing is committed after the end.

On PostgreSQL two servers share the database: workloads come to the one, operators to the other. ``BROKER_LONG_RACES=10000`` is the
long form, with as many rounds of each race, and a tree of as many tasks.
"""

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Any

import psycopg
import pytest

from broker.audit.records import Record
from broker.client import Tasks
from broker.errors import BrokerError, Conflict, NotFound, Refused, Unavailable
from broker.server.authority import plan, rotation
from broker.server.store.tables import tree_ends
from broker.server.tasks import lifecycle
from tests.attacks.tasks.life_rig import Life, hop, inhabited, settings_of
from tests.attacks.tasks.policy_rig import audit_records
from tests.fakes.oidc import OidcIssuer
from tests.integration.identity_rig import Estate, admin_channel, running
from tests.integration.test_token_endpoint import Process

LONG = int(os.environ.get("BROKER_LONG_RACES", "0"))
ROUNDS = LONG or 40
SEED = int(os.environ.get("BROKER_SEED", "4711"))
AT_ONCE = 8
"""Rounds that run beside each other."""
ASKED = max(1, ROUNDS // 40)
"""Of so many rounds one asks about each of its tokens; the audit log is looked at for all."""

pytestmark = [
    pytest.mark.timeout(180 + LONG),
    pytest.mark.parametrize("ground_of", ["sqlite", "postgres"], indirect=True),
]


@pytest.fixture
async def life(ground_of: Estate, oidc: OidcIssuer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Life]:
    """A server with its node; where the store can be shared, operators come to a second one."""
    # How long a replica waits until the others know its keys, before it signs.
    monkeypatch.setattr(plan, "AHEAD", timedelta(seconds=0.2))
    monkeypatch.setattr(rotation, "CHECK_EVERY", 0.1)
    settings = settings_of(oidc, max_children=100_000, max_depth=6)
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(running(ground_of, **settings))
        made = await stack.enter_async_context(inhabited(ground_of, one, oidc))
        if ground_of.store_url:
            beside = replace(ground_of, directory=ground_of.directory / "2")
            other = await stack.enter_async_context(running(beside, **settings))
            made.operator = Tasks(await stack.enter_async_context(admin_channel(other)))
        await made.introspected("nothing")
        yield made


def trail(estate: Estate) -> list[Record]:
    """The audit log of either store, in its order."""
    if not estate.store_url:
        return audit_records(estate)
    with psycopg.connect(estate.store_url) as database:
        rows = database.execute("SELECT body FROM audit_records ORDER BY seq").fetchall()
    return [Record.from_body(bytes(body)) for (body,) in rows]


Asked = Callable[[], Awaitable[Any]]


async def served(asked: Asked) -> Any:
    """Ask, and again where a busy machine let nobody write for longer than a server waits: then nothing was done."""
    for _ in range(5):
        try:
            return await asked()
        except Unavailable:
            await asyncio.sleep(0.2)
    return await asked()


async def attempt(asked: Asked) -> Any:
    """Give the answer, or the refusal; anything else is a defect, and is raised."""
    try:
        return await served(asked)
    except (Refused, Conflict, NotFound) as error:
        return error


async def rounds(one_round: Callable[[int, random.Random], Awaitable[None]]) -> None:
    numbers = iter(range(ROUNDS))

    async def run(worker: int) -> None:
        luck = random.Random(SEED + worker)
        for number in numbers:
            await one_round(number, luck)

    async with asyncio.TaskGroup() as group:
        for worker in range(AT_ONCE):
            group.create_task(run(worker))


async def both(number: int, luck: random.Random, one: Asked, end: Asked) -> tuple[Any, Any]:
    """Let two run against each other; of eight rounds one lets each be first for sure, so that both orders are met."""
    match number % 8:
        case 0:
            return await attempt(one), await attempt(end)
        case 1:
            ended = await attempt(end)
            return await attempt(one), ended

    async def soon(asked: Asked) -> Any:
        await asyncio.sleep(luck.random() * 0.01)
        return await attempt(asked)

    done, ended = await asyncio.gather(soon(one), soon(end))
    return done, ended


@dataclass
class Tally:
    """How the rounds came out, and which tasks and tokens they left."""

    outcomes: Counter[str] = field(default_factory=Counter)
    tokens: int = 0

    def count(self, outcome: Any) -> bool:
        """Count an answer, and tell whether it was one and no refusal."""
        refused = isinstance(outcome, BrokerError)
        self.outcomes[outcome.reason if refused else "done"] += 1
        return not refused


def check_trail(estate: Estate, roots: set[str]) -> Counter[str]:
    """After the end of a tree there is nothing of it but ends; each task of it ended once. Gives how often what is there."""
    over: set[str] = set()
    seen: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    for one in trail(estate):
        root = one.fields.get("root")
        if root not in roots:
            continue
        seen[one.event.value] += 1
        if one.event == "task_ended":
            ends[one.subject] += 1
            if one.subject == root:
                over.add(str(root))
        elif one.event in {"task_started", "task_resumed", "task_suspended", "task_attached", "token_issued"}:
            assert root not in over, f"{one.event} of {one.subject} after the end of its tree"
    assert over == roots
    assert set(ends.values()) == {1}
    return seen


def told(name: str, estate: Estate, tally: Tally, seen: Counter[str], began: float) -> None:
    store = "PostgreSQL, two servers" if estate.store_url else "SQLite"
    print(
        f"\n{name} on {store}: {ROUNDS} rounds in {time.monotonic() - began:.1f} s; {dict(tally.outcomes)}; {dict(seen)}"
    )


@pytest.mark.bears("RV03", "V03")
async def test_a_child_that_is_started_while_its_parent_is_revoked(life: Life) -> None:
    agent = await life.agent(hop(0), "ws_hop0")
    await life.agent(hop(1), "ws_hop1")
    user_token, tally, roots, began = life.oidc.token("alice", lifetime=3600), Tally(), set(), time.monotonic()

    async def one_round(number: int, luck: random.Random) -> None:
        root = await served(lambda: life.start(agent, user_token=user_token))
        roots.add(root.id)
        child, over = await both(
            number, luck, lambda: life.child(agent, root.id, hop(1)), lambda: life.operator.revoke(root.id)
        )
        assert over.state == "revoked"
        if tally.count(child):
            assert (await life.operator.get(child.id)).state == "cascaded", "it began, so it has ended"
        else:
            assert child.reason == "task_ended"

    await rounds(one_round)
    seen = check_trail(life.estate, roots)
    assert tally.outcomes["done"] + tally.outcomes["task_ended"] == ROUNDS
    assert min(tally.outcomes.values()) >= ROUNDS // 8
    assert seen["task_started"] == seen["task_ended"] == ROUNDS + tally.outcomes["done"]
    told("child against revoke", life.estate, tally, seen, began)


@pytest.mark.bears("RV12", "RV03")
async def test_a_resume_against_a_revoke(life: Life) -> None:
    agent = await life.agent(hop(0), "ws_hop0")
    user_token, tally, roots, began = life.oidc.token("alice", lifetime=3600), Tally(), set(), time.monotonic()

    async def one_round(number: int, luck: random.Random) -> None:
        root = await served(lambda: life.start(agent, user_token=user_token))
        roots.add(root.id)
        await served(lambda: life.change(agent, root.id, "suspend"))

        async def resume_and_work() -> Any:
            await served(lambda: life.change(agent, root.id, "resume", expected_version=2))
            return await attempt(lambda: life.issue(agent, root.id))

        outcome, over = await both(number, luck, resume_and_work, lambda: life.operator.revoke(root.id))
        assert over.state == "revoked"
        if tally.count(outcome) and number % ASKED == 0:
            assert not await life.is_active(outcome)
        assert (await life.operator.get(root.id)).state == "revoked", "nothing comes back"

    await rounds(one_round)
    seen = check_trail(life.estate, roots)
    assert set(tally.outcomes) <= {"done", "conflict", "task_ended"}
    assert min(tally.outcomes["done"], tally.outcomes["conflict"]) >= ROUNDS // 8
    told("resume against revoke", life.estate, tally, seen, began)


@pytest.mark.bears("V02", "V03", "RV02")
async def test_a_token_against_the_completion_of_its_task(life: Life) -> None:
    agent = await life.agent(hop(0), "ws_hop0")
    user_token, tally, roots, began = life.oidc.token("alice", lifetime=3600), Tally(), set(), time.monotonic()

    async def one_round(number: int, luck: random.Random) -> None:
        root = await served(lambda: life.start(agent, user_token=user_token))
        roots.add(root.id)
        token, over = await both(
            number, luck, lambda: life.issue(agent, root.id), lambda: life.complete(agent, root.id)
        )
        assert over.state == "completed"
        if tally.count(token) and number % ASKED == 0:
            assert not await life.is_active(token)

    await rounds(one_round)
    seen = check_trail(life.estate, roots)
    assert tally.outcomes["done"] + tally.outcomes["task_ended"] == ROUNDS
    assert min(tally.outcomes.values()) >= ROUNDS // 8
    assert seen["token_issued"] == tally.outcomes["done"]
    told("token against completion", life.estate, tally, seen, began)


@pytest.mark.bears("V04", "RV10")
async def test_ends_at_both_servers_are_one_end(life: Life) -> None:
    """The root and the one below it, each ended twice at the same moment: everybody is told that it is over, as it is."""
    agent = await life.agent(hop(0), "ws_hop0")
    await life.agent(hop(1), "ws_hop1")
    user_token, tally, roots, began = life.oidc.token("alice", lifetime=3600), Tally(), set(), time.monotonic()
    async with admin_channel(life.server) as here:
        servers = (life.operator, Tasks(here))

        async def one_round(number: int, luck: random.Random) -> None:
            root = await served(lambda: life.start(agent, user_token=user_token))
            roots.add(root.id)
            child = await served(lambda: life.child(agent, root.id, hop(1)))
            asked = [partial(server.revoke, task.id) for task in (root, child) for server in servers]
            luck.shuffle(asked)
            # None of them is refused.
            for answer in await asyncio.gather(*map(served, asked)):
                assert answer.state in ({"revoked"} if answer.id == root.id else {"revoked", "cascaded"})
            tally.outcomes[(await life.operator.get(child.id)).state] += 1

        await rounds(one_round)
    seen = check_trail(life.estate, roots)
    assert seen["task_ended"] == 2 * ROUNDS
    told("ends at both servers", life.estate, tally, seen, began)


# ---- a whole tree


WRITERS = 50
DEPTH = 4
"""Generations below the root."""


class Tree:
    """A tree of tasks that many writers work at."""

    def __init__(self, life: Life, agents: list[Process], root: Any, user_token: str) -> None:
        self.life, self.agents, self.user_token = life, agents, user_token
        self.nodes: list[tuple[int, Any]] = [(0, root)]
        self.tokens: list[str] = []
        self.late: list[str] = []
        self.closed_at = float("inf")

    async def grow(self, fan_out: int) -> None:
        generation = list(self.nodes)
        limit = asyncio.Semaphore(16)

        async def add(depth: int, parent: Any) -> None:
            async with limit:
                made = await served(lambda: self.life.child(self.agents[depth], parent.id, hop(depth + 1)))
                self.nodes.append((depth + 1, made))

        for _ in range(DEPTH):
            before = len(self.nodes)
            async with asyncio.TaskGroup() as group:
                for depth, parent in generation:
                    for _ in range(fan_out):
                        group.create_task(add(depth, parent))
            generation = self.nodes[before:]

    async def write(self, luck: random.Random) -> None:
        """Start tasks and fetch tokens anywhere, until some time after the close was answered."""
        while time.monotonic() < self.closed_at + 0.3:
            depth, task = luck.choice(self.nodes)
            began = time.monotonic()
            is_child = luck.random() < 0.5 and depth < DEPTH + 1
            child = partial(self.life.child, self.agents[depth], task.id, hop(depth + 1))
            answer = await attempt(child if is_child else partial(self.life.issue, self.agents[depth], task.id))
            if isinstance(answer, BrokerError):
                continue
            if began > self.closed_at:
                self.late.append(task.id)
            if is_child:
                self.nodes.append((depth + 1, answer))
            else:
                self.tokens.append(answer)


@pytest.mark.bears("V03", "V01")
async def test_a_tree_is_closed_while_fifty_write_in_it(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends by one row, and the rows of its tasks are written while the fifty go on."""
    monkeypatch.setattr(tree_ends, "WRITTEN_AT_ONCE", 100)
    monkeypatch.setattr(lifecycle, "ROWS_EACH", 20)
    agents = [await life.agent(hop(depth), f"ws_hop{depth}") for depth in range(DEPTH + 2)]
    user_token = life.oidc.token("alice", lifetime=3600)
    root, beside = [await life.start(agents[0], user_token=user_token, ttl=3000) for _ in range(2)]
    other = await life.issue(agents[0], beside.id)
    tree = Tree(life, agents, root, user_token)
    # With four generations: 10 below each are 11,111 tasks, 3 are 121.
    await tree.grow(10 if LONG else 3)
    planted = len(tree.nodes)

    async def close() -> float:
        await asyncio.sleep(0.3)
        began = time.monotonic()
        over = await served(lambda: life.operator.revoke(root.id))
        tree.closed_at = time.monotonic()
        assert over.state == "revoked"
        return tree.closed_at - began

    took, *_ = await asyncio.gather(close(), *(tree.write(random.Random(SEED + each)) for each in range(WRITERS)))
    assert tree.late == [], "nothing succeeds that was asked for after the answer"
    assert len(tree.tokens) > 0
    living = await life.operator.list(root=root.id, state="live")
    assert living == []
    everything = await life.operator.list(root=root.id)
    assert {one.state for one in everything} == {"revoked", "cascaded"}
    assert {task.id for _, task in tree.nodes} == {one.id for one in everything}
    for token in tree.tokens[:: max(1, len(tree.tokens) // 100)]:
        assert not await life.is_active(token)
    assert await life.is_active(other), "the tree beside lives"
    (ended,) = [one for one in trail(life.estate) if one.event == "task_ended" and one.subject == root.id]
    assert ended.fields["tasks_ended"] == len(everything)
    assert took < 2 or not LONG
    store = "PostgreSQL, two servers" if life.estate.store_url else "SQLite"
    print(
        f"\nclose of {len(everything)} tasks ({planted} planted) under {WRITERS} writers on {store}:"
        f" {took * 1000:.0f} ms, {len(tree.tokens)} tokens, {json.dumps(dict(Counter(one.state for one in everything)))}"
    )
