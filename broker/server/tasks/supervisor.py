"""Watches over tasks: those that live by a heartbeat, and those whose node agent must not fall silent.

Invariants: a lease is judged by steady time (:mod:`broker.server.tasks.leases`), never by the wall clock. One that lapses
suspends its task, with frame and record, and a sign of life that comes later changes nothing about it: to go on is an act of its
own. A task that was not let go on in time ends. After a start of the server every lease begins anew, once. Where several
servers share a store, each tells the others what it has heard, and whoever sees a lease lapse first acts on it.
"""

import asyncio
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from broker.clock import Clock
from broker.errors import BrokerError, Refused
from broker.server.store.ports import Reader, Store, Writer, making_nothing_due
from broker.server.store.rows import Change
from broker.server.tasks.admission import identify
from broker.server.tasks.decision import own_task
from broker.server.tasks.leases import Leases, SteadyTime
from broker.server.tasks.lifecycle import TASK_CHANGE, end, end_session
from broker.server.tasks.requests import Actor
from broker.server.tasks.suspension import suspend
from broker.spiffe import SpiffeId
from broker.tasks import Cause, State, Supervision, Task, effective_state, require_lineage_active
from broker.tasks.causes import SessionEnd
from broker.tasks.task import TERMINAL
from broker.telemetry.log import get_logger

CHECK_EVERY: Final = 0.25
"""Seconds between two looks for who is silent: a look costs what it finds."""
TELL_EVERY: Final = 2.0
"""Seconds in which a server sums up for the others whom it has heard; leases are that much longer where there are others."""
AT_ONCE: Final = 200
"""Tasks of one transaction, so that others do not wait."""
TOLD_AT_ONCE: Final = 1_000
"""Names in one change of the log: some 60 KiB."""
BEAT_CHANGE: Final = "beat"
"""The change log's word for signs of life; its body says of whom."""
SERVER: Final = "server"

log = get_logger("supervision")


@dataclass(frozen=True, slots=True)
class SupervisionRules:
    """How long who may be silent.

    ``lease``: a supervised process, before its task is suspended. ``lapsed``: how long that task waits to be let go on before
    it ends. ``agent_lease``: a node agent, before the attached tasks of its workloads are suspended, or, with
    ``ends_with_agent``, end together with their sessions.
    """

    lease: timedelta = timedelta(seconds=30)
    lapsed: timedelta = timedelta(minutes=10)
    agent_lease: timedelta = timedelta(seconds=30)
    ends_with_agent: bool = False


@dataclass(frozen=True, slots=True)
class Lease:
    """How long a task lives without another sign: ``ttl`` seconds from each, ``left`` from now."""

    ttl: float
    left: float


class Supervisor:
    """The use cases of supervision, and the memory of who was heard."""

    def __init__(
        self, store: Store, clock: Clock, rules: SupervisionRules, count: Callable[[str], None] | None = None
    ) -> None:
        """``count`` is told the cause of each end."""
        self._store = store
        self._clock = clock
        self._rules = rules
        self._count = count
        # Others tell what they have heard a moment later.
        slack = 2 * TELL_EVERY if store.is_shared else 0.0
        self._time = SteadyTime(clock.monotonic())
        self._tasks = Leases(rules.lease.total_seconds() + slack)
        self._agents = Leases(rules.agent_lease.total_seconds() + slack)
        self._lapsed = Leases(rules.lapsed.total_seconds())
        self._self = secrets.token_hex(8)
        self._heard_tasks: set[str] = set()
        self._heard_agents: set[str] = set()
        self._told_at = 0.0

    @property
    def lease(self) -> float:
        """Seconds that a supervised process may be silent."""
        return self._rules.lease.total_seconds()

    @property
    def agent_lease(self) -> float:
        """Seconds that a node agent may be silent."""
        return self._rules.agent_lease.total_seconds()

    async def start(self) -> None:
        """Begin every lease anew, and follow the change log; raises Unavailable."""
        self._store.subscribe(self._committed)

        def query(reader: Reader) -> tuple[Sequence[str], Sequence[str], Sequence[SpiffeId]]:
            return reader.leased_tasks(), reader.lapsed_tasks(), reader.agents_with_sessions()

        leased, lapsed, agents = await self._store.read(query)
        now = self._now()
        for task_id in leased:
            self._tasks.heard(task_id, now)
        for task_id in lapsed:
            self._lapsed.heard(task_id, now)
        for agent in agents:
            self._agents.heard(str(agent), now)

    # ---- signs of life

    async def renew(self, actor: Actor, task_id: str) -> Lease:
        """Take a heartbeat in; raises NotFound, and Refused for a task that is over, suspended, or kept otherwise."""
        await self._require(actor, task_id, Supervision.LEASE)
        self._tasks.heard(task_id, self._now())
        if self._store.is_shared:
            self._heard_tasks.add(task_id)
        return Lease(self.lease, self.lease)

    async def attach(self, actor: Actor, task_id: str) -> Lease:
        """Admit a process to the stream by which its node agent watches it; raises as :meth:`renew`."""
        await self._require(actor, task_id, Supervision.ATTACHED)
        return Lease(self.lease, self.lease)

    def agent_heard(self, agent: SpiffeId) -> None:
        """Note that a node agent has reported."""
        self._agents.heard(str(agent), self._now())
        if self._store.is_shared:
            self._heard_agents.add(str(agent))

    def lease_of(self, task: Task) -> Lease | None:
        """Give the lease of a task that lives by a heartbeat; None for the others."""
        if task.supervision is not Supervision.LEASE or task.state.is_terminal:
            return None
        return Lease(self.lease, min(self.lease, self._tasks.left(task.id, self._now())))

    async def _require(self, actor: Actor, task_id: str, supervision: Supervision) -> None:
        def query(reader: Reader) -> None:
            lineage = reader.lineage(task_id)
            task = own_task(lineage, identify(reader, actor))
            require_lineage_active(task, tuple(reversed(lineage[:-1])), self._clock.now())
            if task.supervision is not supervision:
                raise Refused(
                    f"the task's supervision is {task.supervision.value}, not {supervision.value}",
                    code="supervision_mismatch",
                )

        await self._store.read(query)

    # ---- silence

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        every = min(CHECK_EVERY, self.lease / 4, self.agent_lease / 4)
        while True:
            try:
                await self.check()
            except BrokerError as error:
                log.warning("leases_not_judged", code=error.reason, error=error.message)
            await asyncio.sleep(every)

    async def check(self) -> None:
        """Act on every lease that has lapsed, and tell the others who was heard; raises Unavailable."""
        now = self._time.look(self._clock.monotonic(), is_listening=self._store.is_current)
        if not self._store.is_current:
            return
        await self._tell(now)
        if due := self._tasks.due(now, AT_ONCE):
            await self._store.write(lambda writer: self._suspend(writer, due))
            for task_id in due:
                self._tasks.forget(task_id)
        for agent in self._agents.due(now, AT_ONCE):
            await self._agent_is_lost(agent)
        if due := self._lapsed.due(now, AT_ONCE):
            ended = await self._store.write(lambda writer: self._end(writer, due))
            for task_id in due:
                self._lapsed.forget(task_id)
            for _ in range(ended if self._count is not None else 0):
                assert self._count is not None
                self._count(Cause.LEASE_LAPSED.value)

    def _suspend(self, writer: Writer, task_ids: Sequence[str]) -> None:
        now = self._clock.now()
        for task_id in task_ids:
            task = writer.task(task_id)
            if (
                task is not None
                and task.supervision is Supervision.LEASE
                and effective_state(task, now) is State.ACTIVE
            ):
                suspend(writer, task, Cause.LEASE_LAPSED, by=SERVER, now=now)

    def _end(self, writer: Writer, task_ids: Sequence[str]) -> int:
        now, count = self._clock.now(), 0
        for task_id in task_ids:
            task = writer.task(task_id)
            if task is not None and task.cause is Cause.LEASE_LAPSED and effective_state(task, now) is State.SUSPENDED:
                count += end(writer, task, State.REVOKED, Cause.LEASE_LAPSED, by=SERVER, now=now).frame_seq > 0
        return count

    async def _agent_is_lost(self, name: str) -> None:
        agent, stopped = SpiffeId(name), 0
        act = self._end_sessions if self._rules.ends_with_agent else self._stop_attached
        while count := await self._store.write(lambda writer: act(writer, agent)):
            stopped += count
        # One that was heard meanwhile is waited for as before: what was stopped stays so.
        if self._agents.left(name, self._now()) == 0:
            self._agents.forget(name)
        if stopped:
            log.warning("agent_silent", agent=name, seconds=self.agent_lease, stopped=stopped)

    def _stop_attached(self, writer: Writer, agent: SpiffeId) -> int:
        now, count = self._clock.now(), 0
        for session in writer.sessions_of_agent(agent):
            for task in writer.tasks_of_session(session.id):
                if task.supervision is Supervision.ATTACHED and effective_state(task, now) is State.ACTIVE:
                    count += suspend(writer, task, Cause.LEASE_LAPSED, by=SERVER, now=now).frame_seq > 0
            if count >= AT_ONCE:
                break
        return count

    def _end_sessions(self, writer: Writer, agent: SpiffeId) -> int:
        now = self._clock.now()
        over = writer.sessions_of_agent(agent)[:AT_ONCE]
        for session in over:
            end_session(writer, session.id, agent=agent, now=now, cause=SessionEnd.AGENT_LOST, by=SERVER)
        return len(over)

    # ---- the change log

    async def _tell(self, now: float) -> None:
        """Tell other servers whom this one has heard since the last time. They and this one hear nothing else of it."""
        if not (self._heard_tasks or self._heard_agents) or now - self._told_at < TELL_EVERY:
            return
        names = [*(("tasks", name) for name in self._heard_tasks), *(("agents", name) for name in self._heard_agents)]
        self._heard_tasks, self._heard_agents, self._told_at = set(), set(), now
        bodies = []
        for start in range(0, len(names), TOLD_AT_ONCE):
            body: dict[str, object] = {"by": self._self, "tasks": [], "agents": []}
            for kind, name in names[start : start + TOLD_AT_ONCE]:
                told = body[kind]
                assert isinstance(told, list)
                told.append(name)
            bodies.append(json.dumps(body, separators=(",", ":")))

        def act(writer: Writer) -> None:
            for text in bodies:
                writer.change(BEAT_CHANGE, "", text)

        await self._store.write(making_nothing_due(act))

    def _committed(self, changes: Sequence[Change]) -> None:
        for change in changes:
            if change.kind == BEAT_CHANGE:
                self._beaten(change.body)
            elif change.kind == TASK_CHANGE:
                self._moved(change.key, change.body)

    def _beaten(self, body: str) -> None:
        told = json.loads(body)
        if told.get("by") == self._self:
            return
        now = self._now()
        for task_id in told["tasks"]:
            self._tasks.heard(task_id, now)
        for agent in told["agents"]:
            self._agents.heard(agent, now)

    def _moved(self, task_id: str, state: str) -> None:
        if state == State.SUSPENDED:
            self._tasks.forget(task_id)
            self._lapsed.heard(task_id, self._now())
        elif state in TERMINAL:
            self._tasks.forget(task_id)
            self._lapsed.forget(task_id)
        elif state == State.ACTIVE and task_id in self._lapsed:
            # It was let go on. One that does not live by a heartbeat is passed over when its time comes.
            self._lapsed.forget(task_id)
            self._tasks.heard(task_id, self._now())

    def _now(self) -> float:
        return self._time.at(self._clock.monotonic())


def begin_lease(writer: Writer, task: Task) -> None:
    """Have every server wait for the first heartbeat of a task that lives by one; part of the act that starts it."""
    if task.supervision is Supervision.LEASE:
        writer.change(BEAT_CHANGE, task.id, json.dumps({"tasks": [task.id], "agents": []}, separators=(",", ":")))
