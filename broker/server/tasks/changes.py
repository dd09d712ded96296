"""What workloads and operators do with running tasks: take up, suspend, resume, end, hand off, and start others below them.

Every change names the version it expects and a key under which it may be repeated: the repetition gets the first answer again,
whatever has happened since, and changes nothing. A workload changes its own tasks and those below them; what an operator has
stopped, only an operator lets go on. Nothing here says how a task ends or is suspended: :mod:`~broker.server.tasks.lifecycle`
and :mod:`~broker.server.tasks.suspension` do, for every cause.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from broker.audit.events import Event
from broker.clock import Clock
from broker.errors import BrokerError, Conflict, Invalid, PolicyDenied, Refused
from broker.server import failpoints
from broker.server.store.ports import Store, Writer
from broker.server.tasks import records
from broker.server.tasks.admission import Admitted, Caller, Claim, Starters, Vouching, admit, claim, identify
from broker.server.tasks.answers import Answers, digest_of, spent
from broker.server.tasks.decision import Policy, decide_child, own_task, task_unknown
from broker.server.tasks.delegated import attach
from broker.server.tasks.ids import Ids
from broker.server.tasks.kept import Changed, read_kept, write_kept
from broker.server.tasks.lifecycle import TASK_CHANGE, end
from broker.server.tasks.policy.asked import Action
from broker.server.tasks.refusals import Refusals
from broker.server.tasks.requests import Actor, ChangeRequest, ChildRequest, Operation
from broker.server.tasks.standing import Standing
from broker.server.tasks.supervisor import begin_lease
from broker.server.tasks.suspension import exhaust, resume, suspend
from broker.spiffe import SpiffeId
from broker.tasks import Cause, State, Task, start_successor

MINUTE: Final = timedelta(minutes=1)

_OWN_RESUMES: Final = frozenset(
    {Cause.PAUSED, Cause.PROCESS_EXITED, Cause.LEASE_LAPSED, Cause.SESSION_ENDED, Cause.USER_UNCONFIRMED}
)
"""Why a task may stand still for its own agent to let it go on: it stopped itself, its supervision did, or its user's session was
not confirmed, which is asked again."""
_BY_OPERATOR: Final = frozenset({Operation.SUSPEND, Operation.RESUME, Operation.REVOKE, Operation.HAND_OFF})


@dataclass(frozen=True, slots=True)
class _Who:
    """Who changes a task: ``by`` for the record; ``caller`` is None for an operator."""

    by: str
    owner: str
    caller: Caller | None


class Changes:
    """Changes tasks, for every door."""

    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        vouching: Vouching,
        starters: Starters,
        policy: Policy,
        standing: Standing,
        ids: Ids,
        refusals: Refusals,
        count: Callable[[str], None] | None = None,
    ) -> None:
        """``count`` is told the cause of each end."""
        self._store = store
        self._clock = clock
        self._vouching = vouching
        self._starters = starters
        self._policy = policy
        self._standing = standing
        self._ids = ids
        self._refusals = refusals
        self._count = count

    async def start_child(self, actor: Actor, request: ChildRequest) -> Task:
        """Start a task below one of the caller's own, for another workload; raises as :meth:`change`, and PolicyDenied."""
        async with self._refusals.recorded(Event.TASK_REFUSED, actor, request.parent):
            claimed = claim(actor, self._vouching, self._starters)
            return await self._store.write(lambda writer: self._start_child(writer, claimed, request))

    async def change(self, actor: Actor, request: ChangeRequest) -> Changed:
        """Change a task of the caller's own, or one below it.

        Raises:
            NotFound: there is no such task, or it is another workload's: the answer is the same.
            Refused: it is another process's, or the workload may not change it so.
            Conflict: it stands otherwise (``conflict``), has moved on from ``expected_version`` (``stale_version``), or the
                idempotency key was used for another request.
        """
        async with self._refusals.recorded(Event.TASK_REFUSED, actor, request.task_id):
            claimed = claim(actor, self._vouching, self._starters) if _begins(request) else None

            def act(writer: Writer) -> Changed:
                now = self._clock.now()
                caller = identify(writer, actor) if claimed is None else admit(writer, claimed, now)
                return self._change(writer, _Who(str(actor.spiffe_id), caller.owner, caller), request, now)

            return self._told(await self._store.write(act))

    async def change_as_operator(self, by: str, request: ChangeRequest) -> Changed:
        """Change any task because an operator says so; ``by`` is who. Raises NotFound, Conflict, Invalid."""
        who = _Who(by, by, None)
        async with self._refusals.recorded_of(Event.TASK_REFUSED, by, request.task_id):
            if request.operation not in _BY_OPERATOR:
                raise Invalid("an operator does not do that to a task", code="invalid_operation")
            return self._told(
                await self._store.write(lambda writer: self._change(writer, who, request, self._clock.now()))
            )

    # ---- inside the transaction

    def _start_child(self, writer: Writer, claimed: Claim, request: ChildRequest) -> Task:
        now = self._clock.now()
        admitted = admit(writer, claimed, now)
        lineage = attach(writer, admitted, writer.lineage(request.parent), now)
        parent = own_task(lineage, admitted)
        digest = digest_of(
            "child", None, parent.id, str(request.agent), request.purpose, request.authority.text(), request.ttl,
            request.supervision,
        )  # fmt: skip
        answers = Answers(writer, owner=admitted.owner, key=request.idempotency_key, digest=digest, now=now)
        if (kept := answers.recall()) is not None:
            known = writer.task(kept)
            if known is None:
                raise spent()
            self._policy.rules.may_begin(known).require()
            return known
        self._require_starter(request.agent)
        self._standing.require(writer, parent.delegation, now, agent=request.agent)
        child = decide_child(
            self._policy,
            lineage,
            request,
            task_id=self._ids.new("tsk", now),
            children=writer.children_of(parent.id),
            now=now,
        )
        self._policy.detail_types.require(child.authority)
        self._add(writer, child, admitted.actor, now)
        answers.keep(child.id)
        failpoints.reach("children.before_commit")
        return child

    def _add(self, writer: Writer, task: Task, actor: Actor | str, now: datetime, action: Action | None = None) -> None:
        decision = self._policy.rules.may_begin(task, action).require()
        writer.add_task(task)
        writer.record(records.task_started_for(task, actor, now, decision=decision))
        writer.change(TASK_CHANGE, task.id, task.state.value)
        begin_lease(writer, task)

    def _require_starter(self, agent: SpiffeId) -> None:
        if not self._starters.entry_ids_of(agent):
            raise PolicyDenied(
                "no workload of that SPIFFE ID may have tasks here",
                code="agent_unknown",
                hint="an operator registers it and sets may_start_tasks on its entry",
            )

    def _change(self, writer: Writer, who: _Who, request: ChangeRequest, now: datetime) -> Changed:
        lineage = writer.lineage(request.task_id)
        if who.caller is None:
            if not lineage:
                raise task_unknown()
        else:
            _governed(lineage, who.caller, request)
        digest = digest_of(
            "change", None, request.task_id, request.operation, None if request.to is None else str(request.to),
            request.expected_version, request.reason,
        )  # fmt: skip
        answers = Answers(writer, owner=who.owner, key=request.idempotency_key, digest=digest, now=now)
        if (kept := answers.recall()) is not None:
            return read_kept(writer, kept, lineage[-1])
        changed = self._apply(writer, who, request, lineage, now)
        if changed.refusal is None:
            answers.keep(write_kept(changed))
        failpoints.reach("lifecycle.before_commit")
        return changed

    def _apply(
        self, writer: Writer, who: _Who, request: ChangeRequest, lineage: tuple[Task, ...], now: datetime
    ) -> Changed:
        task, expected = lineage[-1], request.expected_version
        match request.operation:
            case Operation.ATTACH:
                assert isinstance(who.caller, Admitted)
                return Changed(_attached(writer, who.caller, lineage, expected, now))
            case Operation.SUSPEND:
                cause = Cause.OPERATOR if who.caller is None else Cause.PAUSED
                held = suspend(
                    writer, task, cause, by=who.by, now=now, expected_version=expected, reason=request.reason
                )
                return Changed(held.task, held.frame_seq)
            case Operation.RESUME:
                return self._resume(writer, who, request, task, now)
            case Operation.HAND_OFF:
                return self._hand_off(writer, who, request, lineage, now)
            case Operation.COMPLETE | Operation.REVOKE:
                state, cause = _ending(request.operation, who)
                over = end(
                    writer, task, state, cause, by=who.by, now=now, expected_version=expected, reason=request.reason
                )
                return Changed(over.task, over.frame_seq)

    def _resume(self, writer: Writer, who: _Who, request: ChangeRequest, task: Task, now: datetime) -> Changed:
        """Let a task go on: in the session of whoever takes it up, or, by an operator, in its own if that lives."""
        by, expected, reason = who.by, request.expected_version, request.reason
        self._policy.rules.may_begin(task, Action.RESUME).require()
        self._standing.require(writer, task.delegation, now, agent=task.agent)
        if who.caller is None:
            session = _living(writer, task)
            return Changed(
                resume(writer, task, by=by, now=now, session=session, expected_version=expected, reason=reason)
            )
        if task.state is State.SUSPENDED and task.cause not in _OWN_RESUMES:
            raise Refused(
                "only an operator lets this task go on",
                code="resume_not_allowed",
                hint="broker task resume, as an operator",
            )
        session = _taken_up(writer, task, who.caller)
        # First what may happen at all: an attempt that conflicts is not counted.
        resumed = _checked_resume(task, expected, now)
        if resumed and self._is_exhausted(writer, task.id, now):
            held = exhaust(writer, task, by=by, now=now)
            return Changed(held, refusal=_too_often())
        return Changed(resume(writer, task, by=by, now=now, session=session, expected_version=expected, reason=reason))

    def _is_exhausted(self, writer: Writer, task_id: str, now: datetime) -> bool:
        limits = self._policy.defaults
        return (
            writer.resumes_of(task_id) >= limits.max_resumes
            or writer.resumes_of(task_id, now - MINUTE) >= limits.max_resumes_per_minute
        )

    def _hand_off(
        self, writer: Writer, who: _Who, request: ChangeRequest, lineage: tuple[Task, ...], now: datetime
    ) -> Changed:
        """End a task as superseded, with all below it, and start its successor beside it."""
        task = lineage[-1]
        assert request.to is not None
        self._require_starter(request.to)
        self._standing.require(writer, task.delegation, now, agent=request.to)
        successor = start_successor(
            task,
            tuple(reversed(lineage[:-1])),
            id=self._ids.new("tsk", now),
            agent=request.to,
            now=now,
            max_depth=self._policy.defaults.max_depth,
        )
        over = end(
            writer, task, State.SUPERSEDED, Cause.HANDED_OFF, by=who.by, now=now,
            expected_version=request.expected_version, reason=request.reason,
        )  # fmt: skip
        if not over.frame_seq:
            raise Conflict("the task was handed off before", code="conflict")
        self._add(writer, successor, who.by if who.caller is None else who.caller.actor, now, Action.HANDOFF)
        return Changed(over.task, over.frame_seq, successor)

    # ---- after the commit

    def _told(self, changed: Changed) -> Changed:
        failpoints.reach("lifecycle.after_commit")
        if changed.refusal is not None:
            raise changed.refusal
        task = changed.task
        if self._count is not None and changed.frame_seq and task.state.is_terminal and task.cause is not None:
            self._count(task.cause.value)
        return changed


def _begins(request: ChangeRequest) -> bool:
    """Tell whether a change gives authority: then the workload is admitted as for a new task, else only known."""
    return request.operation in {Operation.ATTACH, Operation.RESUME, Operation.HAND_OFF}


def _governed(lineage: Sequence[Task], caller: Caller, request: ChangeRequest) -> None:
    """Refuse who has no say over a task: neither its own process nor one of a task above it; raises NotFound, Refused."""
    mine = [each for each in lineage if each.agent == caller.actor.spiffe_id]
    if not mine:
        raise task_unknown()
    task = lineage[-1]
    if mine[-1] is not task and request.operation in {Operation.ATTACH, Operation.COMPLETE, Operation.HAND_OFF}:
        # Those above may stop its work, and never do it in its name.
        raise Refused("only the task's own agent does that", code="not_its_agent")
    if mine[-1] is task and request.operation is Operation.RESUME and task.session != caller.session:
        _require_gone(task)
        return
    own_task(mine, caller)


def _require_gone(task: Task) -> None:
    if task.state is not State.SUSPENDED:
        raise Refused(
            "the task belongs to another process of this workload", code="session_mismatch", hint="start a new task"
        )


def _taken_up(writer: Writer, task: Task, caller: Caller) -> str | None:
    """Give the session that a task goes on in; raises Refused where its own process still lives, or the entry is another.

    Continuity is not authority: the process that is gone gives nothing to the next one but the task's name.
    """
    if task.agent != caller.actor.spiffe_id:
        return _living(writer, task)
    if task.session in {None, caller.session}:
        return task.session
    assert task.session is not None
    known = writer.session(task.session)
    if known is not None and known.ended_at is None:
        raise Refused(
            "the task belongs to another process of this workload, which lives",
            code="session_mismatch",
            hint="that process resumes it, or ends first",
        )
    if caller.session is None:
        raise Refused(
            "no node agent has told of this process, so nobody can watch it",
            code="session_unknown",
            hint="take the task up through the node agent's socket",
        )
    if known is not None and isinstance(caller, Admitted) and known.entry_id != caller.entry.id:
        raise Refused(
            "the process was registered by another entry than the one before",
            code="entry_changed",
            hint="an operator resumes it, or start a new task",
        )
    return caller.session


def _living(writer: Writer, task: Task) -> str | None:
    """Give a task's session, for who lets it go on and does not work on it.

    Whose process is gone waits for the agent's next one, which takes it up by its own identity.
    """
    known = None if task.session is None else writer.session(task.session)
    return None if known is None or known.ended_at is not None else known.id


def _checked_resume(task: Task, expected: int | None, now: datetime) -> bool:
    """Tell whether a resume would be one at all, and not a conflict."""
    current = expected is None or expected == task.version
    return current and task.state is State.SUSPENDED and now < task.expires_at


def _attached(
    writer: Writer, admitted: Admitted, lineage: tuple[Task, ...], expected: int | None, now: datetime
) -> Task:
    task = lineage[-1]
    if expected is not None and expected != task.version:
        raise Conflict(f"the task is at version {task.version}, not {expected}", code="stale_version")
    mine = own_task(attach(writer, admitted, lineage, now), admitted)
    if mine.state is not State.ACTIVE:
        raise Conflict(f"the task is {mine.state.value}: that does not follow", code="conflict")
    return mine


def _ending(operation: Operation, who: _Who) -> tuple[State, Cause]:
    if operation is Operation.COMPLETE:
        return State.COMPLETED, Cause.COMPLETED
    return State.REVOKED, Cause.OPERATOR if who.caller is None else Cause.CANCELLED


def _too_often() -> BrokerError:
    return Refused(
        "the task was taken up again too often",
        code="resume_limit",
        hint="an operator looks at it, then broker task resume",
    )
