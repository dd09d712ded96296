"""A model of the task tree, written down from the rules alone, agrees with the store after every step.

The model knows no SQL, no epochs and no frames: it walks its own dictionary. What it is compared with is everything that
answers: the rows, the server's own judgement of tokens, and a verifier that has just heard the feed's snapshot.
"""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from broker.errors import BrokerError, Refused
from broker.server.store.tables import tree_ends
from broker.server.tasks import suspension
from broker.server.tasks.config import TaskDefaults
from broker.server.tasks.requests import IssuedToken, Operation
from broker.tasks import State, TaskClaims, lineage_state
from tests.fakes.oidc import OidcIssuer
from tests.unit.server.tasks.estate import Estate, authority, detail, running
from tests.unit.server.tasks.life import OPERATOR, change, child, hop, register
from tests.unit.server.tasks.watching import verifiers_view

AGENTS = 5
MAX_DEPTH = 4
MAX_CHILDREN = 3
ACTIONS = ("ticket.close", "ticket.read", "ticket.write")
PICK = st.integers(0, 999)
SOME = st.sets(st.sampled_from(ACTIONS), min_size=1)
SECONDS = st.sampled_from([1, 20, 60, 200])


@dataclass
class Node:
    """A task as the model sees it. ``stored`` is what was written; what counts follows from the clock and those above."""

    id: str
    parent: "Node | None"
    chain: tuple[int, ...]
    actions: frozenset[str]
    expires_at: datetime
    stored: State = State.ACTIVE
    version: int = 1
    is_paused: bool = False
    is_attached: bool = True
    children: list["Node"] = field(default_factory=list)

    @property
    def agent(self) -> int:
        return self.chain[0]

    def line(self) -> list["Node"]:
        return [self, *(self.parent.line() if self.parent else [])]

    def below(self) -> list["Node"]:
        return [one for each in self.children for one in (each, *each.below())]

    def own(self, now: datetime) -> State:
        return State.EXPIRED if not self.stored.is_terminal and now >= self.expires_at else self.stored

    def state(self, now: datetime) -> State:
        if self.own(now).is_terminal:
            return self.own(now)
        above = [each.own(now) for each in self.line()[1:]]
        if any(state.is_terminal for state in above):
            return State.CASCADED
        return self.own(now) if set(above) <= {State.ACTIVE} else State.SUSPENDED

    def is_active(self, now: datetime) -> bool:
        return all(each.own(now) is State.ACTIVE for each in self.line())

    def move(self, state: State) -> None:
        self.stored, self.version = state, self.version + 1

    def end(self, state: State, now: datetime) -> bool:
        """End it and all below; False for a conflict."""
        if self.stored is state:
            return True
        if self.stored.is_terminal:
            return False
        self.move(State.EXPIRED if now >= self.expires_at else state)
        for each in self.below():
            if not each.stored.is_terminal:
                each.move(State.EXPIRED if now >= each.expires_at else State.CASCADED)
        return True


@dataclass
class Held:
    """A token as the model sees it: a suspension above it is for ever."""

    node: Node
    claims: TaskClaims
    is_dead: bool = False


class TaskTree(RuleBasedStateMachine):
    """Random lives of task trees; the estate is real."""

    def __init__(self, directory: Path, oidc: OidcIssuer, url: str) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.stack = AsyncExitStack()
        self.nodes: list[Node] = []
        self.held: list[Held] = []
        self.known: set[int] = set()  # agents whose process the server has seen begin something
        self.written_at_once = tree_ends.WRITTEN_AT_ONCE
        limits = TaskDefaults(
            max_depth=MAX_DEPTH, max_children=MAX_CHILDREN, max_resumes=1000, max_resumes_per_minute=1000
        )
        self.estate: Estate = self.run(
            self.stack.enter_async_context(running(directory, oidc, defaults=limits, url=url))
        )
        for number in range(1, AGENTS):
            self.run(register(self.estate, number))

    def run(self, coroutine: Any) -> Any:
        return self.loop.run_until_complete(coroutine)

    def attempt(self, coroutine: Any, expected: bool) -> Any:
        """Do it, and have it succeed exactly where the model says so."""
        try:
            answer = self.run(coroutine)
        except BrokerError as error:
            if expected:
                raise AssertionError(f"{error.reason}: {error.message}") from None
            return None
        assert expected, "the model says no"
        return answer

    @property
    def now(self) -> datetime:
        return self.estate.clock.now()

    def node(self, pick: int) -> Node:
        return self.nodes[pick % len(self.nodes)]

    def actor(self, node: Node) -> Any:
        return hop(self.estate, node.agent)

    @initialize(at_once=st.sampled_from([0, 1, tree_ends.WRITTEN_AT_ONCE]))
    def say_what_is_large(self, at_once: int) -> None:
        """A tree of more than so many ends by one row, and those of its tasks follow: the model must not notice."""
        tree_ends.WRITTEN_AT_ONCE = at_once  # type: ignore[misc]

    @rule(ttl=SECONDS, actions=SOME)
    def start(self, ttl: int, actions: set[str]) -> None:
        may = authority(detail(actions=sorted(actions)))
        task = self.run(self.estate.start(authority=may, ttl=ttl))
        assert task.expires_at == self.now.replace(microsecond=0) + timedelta(seconds=ttl)
        self.known.add(0)
        self.nodes.append(Node(task.id, None, (0,), frozenset(actions), task.expires_at))

    @precondition(lambda self: self.nodes)
    @rule(pick=PICK, agent=st.integers(0, AGENTS - 1), ttl=SECONDS, actions=SOME)
    def start_child(self, pick: int, agent: int, ttl: int, actions: set[str]) -> None:
        parent = self.node(pick)
        may = (
            parent.is_active(self.now)
            and agent not in parent.chain
            and len(parent.chain) < MAX_DEPTH
            and len(parent.children) < MAX_CHILDREN
            and actions <= parent.actions
        )
        told = self.run(self.estate.store.read(lambda reader: reader.task(parent.id)))
        asked = child(
            self.estate,
            told,
            self.actor(parent),
            hop(self.estate, agent).spiffe_id,
            authority=authority(detail(actions=sorted(actions))),
            ttl=ttl,
        )
        task = self.attempt(asked, may)
        if task is not None:
            self.attach(parent)
            ends = min(self.now.replace(microsecond=0) + timedelta(seconds=ttl), *(e.expires_at for e in parent.line()))
            assert task.expires_at == ends
            below = Node(
                task.id, parent, (agent, *parent.chain), frozenset(actions), task.expires_at, is_attached=False
            )
            parent.children.append(below)
            self.nodes.append(below)

    def attach(self, node: Node) -> None:
        self.known.add(node.agent)
        if not node.is_attached:
            node.is_attached, node.version = True, node.version + 1

    @precondition(lambda self: self.nodes)
    @rule(pick=PICK)
    def issue(self, pick: int) -> None:
        node = self.node(pick)
        may = node.is_active(self.now)
        told = self.run(self.estate.store.read(lambda reader: reader.task(node.id)))
        issued: IssuedToken | None = self.attempt(self.estate.issue(told, self.actor(node)), may)
        if issued is not None:
            self.attach(node)
            claims = self.estate.verify(issued).claims
            assert [str(each) for each in claims.act] == [str(hop(self.estate, n).spiffe_id) for n in node.chain]
            assert set(claims.scope.split(" ")) == node.actions
            assert claims.exp <= min(each.expires_at for each in node.line()).timestamp()
            self.held.append(Held(node, claims))

    @precondition(lambda self: self.nodes)
    @rule(pick=PICK, by_operator=st.booleans())
    def suspend(self, pick: int, by_operator: bool) -> None:
        node = self.node(pick)
        own = node.own(self.now)
        by = OPERATOR if by_operator else self.actor(node)
        may = own in {State.ACTIVE, State.SUSPENDED} and (by_operator or node.agent in self.known)
        self.attempt(change(self.estate, by, node.id, Operation.SUSPEND), may)
        if own is State.ACTIVE and may:
            node.move(State.SUSPENDED)
            node.is_paused = not by_operator
            for each in self.held:
                each.is_dead = each.is_dead or node in each.node.line()
        elif own is State.SUSPENDED and by_operator and node.is_paused:
            # It waits for an operator from now on, whatever it stood still for.
            node.move(State.SUSPENDED)
            node.is_paused = False

    @precondition(lambda self: self.nodes)
    @rule(pick=PICK, by_operator=st.booleans())
    def resume(self, pick: int, by_operator: bool) -> None:
        node = self.node(pick)
        may = node.own(self.now) is State.SUSPENDED and (by_operator or node.is_paused)
        by = OPERATOR if by_operator else self.actor(node)
        self.attempt(change(self.estate, by, node.id, Operation.RESUME), may)
        if may:
            node.move(State.ACTIVE)
            if not by_operator:
                self.known.add(node.agent)

    @precondition(lambda self: self.nodes)
    @rule(pick=PICK, how=st.sampled_from(["complete", "cancel", "revoke"]))
    def end(self, pick: int, how: str) -> None:
        node = self.node(pick)
        state = State.COMPLETED if how == "complete" else State.REVOKED
        operation = Operation.COMPLETE if how == "complete" else Operation.REVOKE
        may = (how == "revoke" or node.agent in self.known) and node.end(state, self.now)
        by = OPERATOR if how == "revoke" else self.actor(node)
        self.attempt(change(self.estate, by, node.id, operation), may)

    @precondition(lambda self: self.nodes)
    @rule(pick=PICK, agent=st.integers(1, AGENTS - 1))
    def hand_off(self, pick: int, agent: int) -> None:
        node = self.node(pick)
        may = node.is_active(self.now) and agent not in node.chain and len(node.chain) < MAX_DEPTH
        to = hop(self.estate, agent).spiffe_id
        changed = self.attempt(change(self.estate, self.actor(node), node.id, Operation.HAND_OFF, to=to), may)
        if changed is not None:
            self.known.add(node.agent)
            node.end(State.SUPERSEDED, self.now)
            heir = Node(
                changed.successor.id,
                node.parent,
                (agent, *node.chain),
                node.actions,
                node.expires_at,
                is_attached=False,
            )
            if node.parent is not None:
                node.parent.children.append(heir)
            self.nodes.append(heir)

    @rule(seconds=SECONDS)
    def pass_time(self, seconds: int) -> None:
        self.estate.clock.advance(seconds)

    @rule()
    def sweep(self) -> None:
        self.run(self.estate.lifecycle.sweep())
        for node in sorted(self.nodes, key=lambda each: len(each.line())):
            if not node.stored.is_terminal and self.now >= node.expires_at:
                node.end(State.EXPIRED, self.now)

    @rule(limit=st.integers(1, 3))
    def write_rows(self, limit: int) -> None:
        self.run(self.estate.store.write(lambda writer: writer.write_tree_ends(limit)))

    @invariant()
    def rows_agree(self) -> None:
        now = self.now

        def query(reader: Any) -> list[tuple[Any, ...]]:
            return [reader.lineage(node.id) for node in self.nodes]

        for node, lineage in zip(self.nodes, self.run(self.estate.store.read(query)), strict=True):
            task = lineage[-1]
            assert (task.state, task.version) == (node.stored, node.version), node.id
            assert lineage_state(task, lineage[-2::-1], now) is node.state(now), node.id
            assert [each.id for each in lineage[::-1]] == [each.id for each in node.line()]
            assert (task.session is not None) == node.is_attached

    @invariant()
    def tokens_agree(self) -> None:
        now, estate = self.now, self.estate
        claims = [each.claims for each in self.held]
        by_server = self.run(
            estate.store.read(lambda reader: [estate.tokens.is_alive(reader, one, now) for one in claims])
        )
        feed = self.run(verifiers_view(estate.store, now))
        for each, is_alive in zip(self.held, by_server, strict=True):
            fresh = now.timestamp() < each.claims.exp
            expected = fresh and not each.is_dead and each.node.is_active(now)
            assert is_alive == expected
            try:
                feed.require_alive(
                    root=each.claims.task.root,
                    epoch=each.claims.task.epoch,
                    task=each.claims.task.id,
                    session=each.claims.cnf.session,
                    jti=each.claims.jti,
                )
                by_feed = True
            except Refused:
                by_feed = False
            assert (by_feed and fresh) == expected

    def teardown(self) -> None:
        tree_ends.WRITTEN_AT_ONCE = self.written_at_once  # type: ignore[misc]
        self.run(self.stack.aclose())
        self.loop.close()


@pytest.mark.bears("V06", "RV04")
def test_the_tree_is_as_the_model_says(tmp_path_factory: pytest.TempPathFactory, oidc: OidcIssuer) -> None:
    run_state_machine_as_test(
        lambda: TaskTree(tmp_path_factory.mktemp("tree"), oidc, ""),
        settings=settings(max_examples=40, stateful_step_count=30),
    )


@pytest.mark.bears("V06", "RV04")
def test_the_tree_is_so_on_postgresql(cluster: Any, tmp_path_factory: pytest.TempPathFactory, oidc: OidcIssuer) -> None:
    urls: list[str] = []

    def fresh() -> TaskTree:
        urls.append(cluster.schema())
        return TaskTree(tmp_path_factory.mktemp("tree"), oidc, urls[-1])

    try:
        run_state_machine_as_test(
            fresh, settings=settings(max_examples=4, stateful_step_count=40, phases=[Phase.generate])
        )
    finally:
        for url in urls:
            cluster.drop_schema(url)


def test_the_comparison_finds_a_suspension_that_nobody_tells(
    tmp_path_factory: pytest.TempPathFactory, oidc: OidcIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What agrees with anything would say nothing: one broken rule must be found."""
    monkeypatch.setattr(suspension, "_frames", lambda *_: [])
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            lambda: TaskTree(tmp_path_factory.mktemp("tree"), oidc, ""),
            settings=settings(max_examples=50, stateful_step_count=30, phases=[Phase.generate], print_blob=False),
        )
