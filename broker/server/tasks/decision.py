"""May it, and how much: the decisions of the exchange, as pure functions over rows of this moment.

Invariants (tokens.md 7.2): what is granted is the intersection of what was asked, what the user's token permits, what the
task has, and what the registered audience is; nothing here ever adds. A limit that is not metered is refused. No clock, no
store, no network: the caller brings ``now`` and the rows, from inside the transaction that writes the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from broker.errors import Invalid, InvalidToken, NotFound, PolicyDenied, Refused
from broker.server.tasks.admission import Admitted, Caller
from broker.server.tasks.bindings import Bound, bind
from broker.server.tasks.config import Audience, Audiences, TaskDefaults
from broker.server.tasks.detail_types import DetailTypes
from broker.server.tasks.policy.rules import Rules
from broker.server.tasks.requests import ChildRequest, IssueRequest, StartRequest, unmetered
from broker.server.tasks.standing import StandingWord
from broker.server.tasks.subjects import Subject
from broker.tasks import Authority, Confirmation
from broker.tasks.lineage import require_lineage_active, start_child, start_task
from broker.tasks.reference import ONCE
from broker.tasks.task import Supervision, Task


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator set: audiences, types of details, defaults of tasks and tokens, and the rules that narrow all of it."""

    audiences: Audiences
    defaults: TaskDefaults
    rules: Rules
    detail_types: DetailTypes = field(default_factory=DetailTypes)


ONCE_TTL: Final = timedelta(seconds=60)
"""Longest life of a token for one use: it is asked for when the call is made."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What one token may say: for which audience, with what authority there, until when at the latest."""

    audience: Audience
    authority: Authority
    cnf: Confirmation | None
    ttl: timedelta
    not_after: tuple[datetime, ...]
    use: str | None = None
    parameter_digest: str | None = None


def decide_start(
    policy: Policy,
    admitted: Admitted,
    subject: Subject | StandingWord,
    request: StartRequest,
    *,
    task_id: str,
    now: datetime,
) -> Task:
    """Give the task that may start, not written yet; raises Refused, PolicyDenied, Invalid."""
    if subject.expires_at <= now:
        # Within the leeway it was readable; nothing can be granted on it (TX19).
        raise InvalidToken("the user token has expired", code="subject_expired", hint="get a new one from the issuer")
    if isinstance(subject, Subject):
        require_may_act(subject, admitted)
    authority = subject.narrow(request.authority)
    policy.detail_types.require(authority)
    if authority.metered():
        raise unmetered()
    for detail in authority.details:
        for location in detail.locations:
            policy.audiences.require_holding(location)
    supervision = _supervision(policy.defaults, admitted, request)
    # The store keeps whole seconds: what is answered now must be what is read later.
    start = now.replace(microsecond=0)
    return start_task(
        id=task_id,
        agent=admitted.actor.spiffe_id,
        # Without supervision it hangs on no process: it neither ends with this one nor belongs to it alone.
        session=None if supervision is Supervision.NONE else admitted.session,
        purpose=request.purpose,
        authority=authority,
        delegation=subject.delegation(),
        now=start,
        ttl=min(
            _task_ttl(policy.defaults, admitted, request, start, supervision),
            timedelta(seconds=subject.max_task_ttl or policy.defaults.max_task_ttl),
        ),
        supervision=supervision,
    )


def decide_issue(
    policy: Policy,
    admitted: Admitted,
    lineage: Sequence[Task],
    request: IssueRequest,
    *,
    now: datetime,
    bound: Bound | None = None,
) -> Grant:
    """Give what a token of this task may say; ``lineage`` is the task and its ancestors, root first.

    ``bound``: what it is bound to, where that is decided already.

    Raises:
        NotFound: there is no such task, or it is another workload's: the answer is the same.
        Refused: the task, an ancestor, its session or its delegation is over.
        PolicyDenied: the audience is not registered, or the authority does not reach that far.
    """
    task = own_task(lineage, admitted)
    require_lineage_active(task, tuple(reversed(lineage[:-1])), now)
    audience = policy.audiences.find(request.resource)
    authority = task.authority if request.authority is None else task.authority.narrow(request.authority)
    if authority.metered():
        raise unmetered()
    if request.scope:
        # Of the resource first: an action that only another service offers is not in the scope of this one.
        authority = authority.for_resource(audience.resource).for_scope(request.scope)
    if bound is None:
        bound = bind(audience, admitted, request, allow_bearer=policy.defaults.allow_bearer)
    ends = [each.expires_at for each in lineage] + [task.delegation.expires_at]
    if admitted.entry.expires_at is not None:
        ends.append(admitted.entry.expires_at)
    if bound.ends_with_svid:
        ends.append(admitted.actor.not_after)
    ttl = min(_token_ttl(policy.defaults, audience), bound.longest)
    if not request.parameter_digest:
        return Grant(audience, authority, bound.cnf, ttl, tuple(ends))
    # For one call, whose parameters are known: it is no use for another.
    return Grant(audience, authority, bound.cnf, min(ttl, ONCE_TTL), tuple(ends), ONCE, request.parameter_digest)


def decide_child(
    policy: Policy,
    lineage: Sequence[Task],
    request: ChildRequest,
    *,
    task_id: str,
    children: int,
    now: datetime,
) -> Task:
    """Give the task that may start below another, not written yet; ``lineage`` is the parent and its ancestors, root first.

    Raises Refused when one of them is not active, PolicyDenied when authority, depth, number or chain says no.
    """
    parent, ancestors = lineage[-1], tuple(reversed(lineage[:-1]))
    require_lineage_active(parent, ancestors, now)
    if children >= policy.defaults.max_children:
        raise PolicyDenied(
            f"a task may start {policy.defaults.max_children} tasks over its life",
            code="too_many_children",
            hint="an operator sets max_children under [server.tasks]",
        )
    if request.authority.metered():
        raise unmetered()
    supervision = request.supervision or parent.supervision
    if supervision is Supervision.NONE and parent.supervision is not Supervision.NONE:
        _require_unsupervised(policy.defaults)
    return start_child(
        parent,
        ancestors,
        id=task_id,
        agent=request.agent,
        # Nobody's until a process of its agent takes it up, by its own identity.
        session=None,
        purpose=request.purpose,
        authority=request.authority,
        now=now.replace(microsecond=0),
        ttl=timedelta(seconds=min(request.ttl or policy.defaults.task_ttl, policy.defaults.max_task_ttl)),
        max_depth=policy.defaults.max_depth,
        supervision=supervision,
    )


def own_task(lineage: Sequence[Task], caller: Caller) -> Task:
    """Give the task if it is this very process's, or, unsupervised, this workload's; raises NotFound, Refused."""
    if not lineage or lineage[-1].agent != caller.actor.spiffe_id:
        raise task_unknown()
    task = lineage[-1]
    if task.session is not None and task.session != caller.session:
        raise Refused(
            "the task belongs to another process of this workload",
            code="session_mismatch",
            hint="continuity is not authority: start a new task",
        )
    return task


def require_same_user(task: Task, subject: Subject) -> None:
    """Refuse a user token that is not of the task's user (X04); raises PolicyDenied."""
    if (subject.user, subject.issuer) != (task.delegation.user, task.delegation.issuer):
        raise PolicyDenied("the user token is not of the task's user", code="subject_mismatch")


def require_same_delegation(task: Task, delegation_id: str) -> None:
    """Refuse a standing delegation that is not the task's own; raises PolicyDenied."""
    if task.delegation.standing != delegation_id:
        raise PolicyDenied("the delegation is not the task's", code="subject_mismatch")


def require_may_act(subject: Subject, caller: Caller) -> None:
    """Refuse an actor whom the user's token does not name, where it names one (RFC 8693 §4.4); raises Invalid."""
    if subject.may_act is not None and subject.may_act != caller.actor.spiffe_id:
        raise Invalid(
            "the user token names another workload in may_act",
            code="may_act_mismatch",
            hint="only the workload that may_act names acts on this token",
        )


def task_unknown() -> NotFound:
    """Give the one answer for a task that is not there and for one that is not yours."""
    return NotFound("no such task", code="task_unknown")


def _supervision(defaults: TaskDefaults, admitted: Admitted, request: StartRequest) -> Supervision:
    if request.supervision is Supervision.NONE:
        _require_unsupervised(defaults)
    wanted = request.supervision or defaults.supervision
    if admitted.session is not None or wanted is Supervision.LEASE:
        # A heartbeat says who lives, also where no node agent does.
        return wanted
    if request.supervision is Supervision.ATTACHED:
        raise Refused(
            "no node agent has told of this process, so nobody can watch it",
            code="session_unknown",
            hint="start the task through the node agent's socket, or leave supervision out",
        )
    return Supervision.NONE


def _require_unsupervised(defaults: TaskDefaults) -> None:
    if not defaults.allow_unsupervised:
        raise PolicyDenied(
            "this server does not permit tasks without supervision",
            code="unsupervised_not_allowed",
            hint="leave supervision out, or have an operator set allow_unsupervised under [server.tasks]",
        )


def _task_ttl(
    defaults: TaskDefaults, admitted: Admitted, request: StartRequest, start: datetime, supervision: Supervision
) -> timedelta:
    """Clamp the life of a task to every source but the delegation, which the rules themselves look at."""
    wanted = min(request.ttl or defaults.task_ttl, defaults.max_task_ttl)
    ends = [start + timedelta(seconds=wanted)]
    if admitted.entry.expires_at is not None:
        ends.append(admitted.entry.expires_at)
    if admitted.session is None and supervision is Supervision.NONE:
        # Nobody would notice the end of the process: the certificate stands in for it.
        ends.append(admitted.actor.not_after)
    ttl = min(ends) - start
    if ttl < timedelta(seconds=1):
        raise Refused("nothing is left of the task's time", code="task_expired")
    return ttl


def _token_ttl(defaults: TaskDefaults, audience: Audience) -> timedelta:
    return timedelta(seconds=min(defaults.token_ttl, audience.token_ttl or defaults.token_ttl))
