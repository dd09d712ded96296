"""Tasks and their ancestors: how a task begins, and the chain of agents that stands behind it.

Responsible for what a child may be. Every ancestor must be active; authority only shrinks; a chain never meets the same
agent twice. ``ancestors`` are always given nearest first: the parent, its parent, …, the root.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta

from broker.errors import PolicyDenied, Refused
from broker.spiffe import SpiffeId
from broker.tasks.authority import Authority
from broker.tasks.delegation import Delegation
from broker.tasks.task import MAX_ACT_DEPTH, State, Supervision, Task, effective_state, require_active


def start_task(
    *,
    id: str,  # noqa: A002 - the field's name
    agent: SpiffeId,
    session: str | None,
    purpose: str,
    authority: Authority,
    delegation: Delegation,
    now: datetime,
    ttl: timedelta,
    supervision: Supervision = Supervision.ATTACHED,
) -> Task:
    """Begin a root task that ends with its delegation at the latest; raises Refused, Invalid."""
    delegation.require_live(now)
    return Task(
        id=id,
        root=id,
        parent=None,
        depth=0,
        user=delegation.user,
        agent=agent,
        session=session,
        purpose=purpose,
        authority=authority,
        delegation=delegation,
        created_at=now,
        expires_at=min(now + ttl, delegation.expires_at),
        supervision=supervision,
    )


def start_child(
    parent: Task,
    ancestors: Sequence[Task],
    *,
    id: str,  # noqa: A002 - the field's name
    agent: SpiffeId,
    session: str | None,
    purpose: str,
    authority: Authority,
    now: datetime,
    ttl: timedelta,
    max_depth: int = MAX_ACT_DEPTH,
    supervision: Supervision = Supervision.ATTACHED,
) -> Task:
    """Begin a task below another, for the same user and within its authority; raises Refused, PolicyDenied.

    ``ancestors`` are the parent's own. ``max_depth`` is the most agents in one chain; the user's delegation may
    permit fewer.
    """
    require_lineage_active(parent, ancestors, now)
    chain = act_chain(parent, ancestors)
    _require_room(agent, chain, min(max_depth, parent.delegation.max_hops or MAX_ACT_DEPTH))
    lineage = (parent, *ancestors)
    return Task(
        id=id,
        root=parent.root,
        parent=parent.id,
        depth=parent.depth + 1,
        user=parent.user,
        agent=agent,
        session=session,
        purpose=purpose,
        authority=parent.authority.narrow(authority),
        delegation=parent.delegation,
        created_at=now,
        expires_at=min(now + ttl, *(task.expires_at for task in lineage)),
        supervision=supervision,
        epoch=parent.epoch,
    )


def start_successor(
    task: Task,
    ancestors: Sequence[Task],
    *,
    id: str,  # noqa: A002 - the field's name
    agent: SpiffeId,
    now: datetime,
    max_depth: int = MAX_ACT_DEPTH,
) -> Task:
    """Begin the task that takes over a task's work, beside it; raises Refused, PolicyDenied.

    It has the same user, purpose, authority, place and end at the latest; the agent that gives the work away, and those
    before it, stay in the chain. The task itself has to end as superseded: that is the caller's part. ``ancestors`` are the
    task's own.
    """
    require_lineage_active(task, ancestors, now)
    _require_room(agent, act_chain(task, ancestors), min(max_depth, task.delegation.max_hops or MAX_ACT_DEPTH))
    return Task(
        id=id,
        root=id if task.parent is None else task.root,
        parent=task.parent,
        depth=task.depth,
        user=task.user,
        agent=agent,
        session=None,
        purpose=task.purpose,
        authority=task.authority,
        delegation=task.delegation,
        created_at=now,
        expires_at=task.expires_at,
        supervision=task.supervision,
        epoch=0 if task.parent is None else task.epoch,
        supersedes=task.id,
        history=(task.agent, *task.history),
    )


def _require_room(agent: SpiffeId, chain: Sequence[SpiffeId], max_depth: int) -> None:
    if agent in chain:
        raise PolicyDenied("the agent is in the chain already", code="act_chain_cycle")
    if len(chain) >= min(max_depth, MAX_ACT_DEPTH):
        raise PolicyDenied("the chain of agents is too long", code="act_chain_depth")


def lineage_epoch(lineage: Sequence[Task]) -> int:
    """Give the epoch below which tokens of a task are dead; ``lineage`` is the task and its ancestors, in any order.

    All take theirs from one counter of the tree, so that what is issued with it is above all suspensions so far.
    """
    return max(each.epoch for each in lineage)


def lineage_state(task: Task, ancestors: Sequence[Task], now: datetime) -> State:
    """Give the state that counts: the task's own, or a worse one of an ancestor; raises Refused for another's ancestors.

    Below a task that is over a task is cascaded, swept or not; below one that is suspended it is suspended.
    """
    require_lineage(task, ancestors)
    own = effective_state(task, now)
    if own.is_terminal:
        return own
    above = [effective_state(each, now) for each in ancestors]
    if any(state.is_terminal for state in above):
        return State.CASCADED
    return own if all(state is State.ACTIVE for state in above) else State.SUSPENDED


def require_lineage_active(task: Task, ancestors: Sequence[Task], now: datetime) -> None:
    """Refuse unless the task and every ancestor are active at this moment; raises Refused."""
    require_lineage(task, ancestors)
    # The delegation is not asked: no task of it ends later than it does.
    for each in (task, *ancestors):
        require_active(each, now)


def require_lineage(task: Task, ancestors: Sequence[Task]) -> None:
    """Refuse ancestors that are not exactly the task's own, up to the root; raises Refused (``task_lineage``)."""
    child = task
    for parent in ancestors:
        if parent.id != child.parent or parent.root != task.root or parent.depth != child.depth - 1:
            raise Refused("the ancestors given are not the task's", code="task_lineage")
        child = parent
    if child.parent is not None:
        raise Refused("the task's ancestors do not reach its root", code="task_lineage")


def act_chain(task: Task, ancestors: Sequence[Task]) -> tuple[SpiffeId, ...]:
    """Give the agents behind a task from our own records, the present actor first (RFC 8693 §4.1); raises Refused.

    Whoever handed a task off stands behind the one who took it over.
    """
    require_lineage(task, ancestors)
    chain = tuple(agent for each in (task, *ancestors) for agent in (each.agent, *each.history))
    if len(set(chain)) != len(chain):
        raise Refused("the chain of agents meets one twice", code="act_chain_cycle")
    return chain
