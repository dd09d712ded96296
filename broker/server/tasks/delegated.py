"""A token of ours as the subject of an exchange: delegation from one agent to the next.

What a token *is* decides (tokens.md 7.2): one that bears ``act`` goes this way whatever the request's parameters say, and what
comes out never sheds it, because the chain is rebuilt from the task's own records. The agent of the token gets another token of
the same task; another agent gets one of the task that was started for it below that one, which is how the first agent has
named it. Whoever merely holds the token gets nothing. Nothing is ever wider than the token, nor lives longer.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final, TypeAlias

from broker.errors import BrokerError, InvalidToken, PolicyDenied, Refused
from broker.server.store.ports import Reader, Writer
from broker.server.tasks import records
from broker.server.tasks.admission import Admitted
from broker.server.tasks.decision import Grant, Policy, decide_issue
from broker.server.tasks.lifecycle import TASK_CHANGE
from broker.server.tasks.requests import IssueRequest
from broker.server.tasks.subjects import SUBJECT_HEADERS, TOKENS_KEPT, digest_of_token
from broker.spiffe import jose
from broker.tasks import Authority, Supervision, Task, TaskClaims, require_lineage_active

IsAlive: TypeAlias = Callable[[Reader, TaskClaims, datetime], bool]
"""Tells whether one of our tokens is alive as a whole, by the rows of this moment."""


@dataclass(frozen=True, slots=True)
class Presented:
    """A token of ours that was shown as the subject: its claims, signature checked; whether it lives is asked later."""

    claims: TaskClaims


@dataclass(frozen=True, slots=True)
class Glance:
    """What a token says of itself, and nothing of it is checked: enough to send it to whoever judges it.

    ``is_own``: it says that it is one of ours; then it is judged as such, whatever type it was called. ``names_actor``: it
    has ``may_act``.
    """

    is_own: bool
    names_actor: bool


_UNREADABLE: Final = Glance(is_own=False, names_actor=False)
"""Whatever cannot be read is refused by whoever judges it."""


class Glances:
    """Looks at tokens, at each once: an agent shows its user's with every exchange."""

    def __init__(self, issuer: str) -> None:
        """``issuer`` is the ``iss`` of our own tokens."""
        self._issuer = issuer
        self._seen: dict[bytes, Glance] = {}

    def at(self, token: str) -> Glance:
        """Look at a token."""
        digest = digest_of_token(token)
        glance = self._seen.get(digest)
        if glance is None:
            glance = self._look(token)
            if len(self._seen) >= TOKENS_KEPT:
                self._seen.clear()
            self._seen[digest] = glance
        return glance

    def _look(self, token: str) -> Glance:
        try:
            jws = jose.parse_compact(token, allowed_headers=SUBJECT_HEADERS)
        except BrokerError:
            return _UNREADABLE
        is_own = jws.payload.get("iss") == self._issuer and jws.header.keys() <= jose.DEFAULT_HEADERS
        return Glance(is_own, "may_act" in jws.payload)


def resolve(
    writer: Writer,
    is_alive: IsAlive,
    admitted: Admitted,
    presented: Presented,
    request: IssueRequest,
    *,
    now: datetime,
) -> IssueRequest:
    """Find the task that the caller may have a token of; raises Refused, PolicyDenied."""
    claims = presented.claims
    if not is_alive(writer, claims, now):
        raise Refused("the subject token is no longer valid", code="subject_ended", hint="get a new one, or a new task")
    mine = admitted.actor.spiffe_id
    if mine == claims.client_id:
        if claims.cnf is not None and claims.cnf.jkt not in (None, admitted.actor.jkt):
            # NOTE(security): another process of the workload, or a thief in one, has the token and not its key.
            raise PolicyDenied(
                "the subject token is bound to a key that was not proved",
                code="subject_not_held",
                hint="send a DPoP proof by that key, or the user's token with the task",
            )
        wanted: tuple[str, ...] = (claims.task.id,)
    else:
        wanted = writer.open_children(claims.task.id, str(mine))
    if request.task_id:
        wanted = tuple(task_id for task_id in wanted if task_id == request.task_id)
    if len(wanted) > 1:
        raise InvalidToken(
            "several tasks below the subject token's wait for this workload",
            code="subject_ambiguous",
            hint="name one with the parameter task",
        )
    if not wanted:
        # NOTE(security): a service that was shown the token, or a thief, is not its actor (TX15).
        raise PolicyDenied(
            "the subject token is another workload's, and no task of it was started for this one",
            code="subject_not_delegated",
            hint="the workload that acts starts a task below its own, and names this one",
        )
    return replace(request, task_id=wanted[0])


def narrowed(
    policy: Policy,
    admitted: Admitted,
    lineage: tuple[Task, ...],
    request: IssueRequest,
    presented: Presented,
    *,
    now: datetime,
) -> Grant:
    """Decide as for any token of the task, within what the subject token says and no longer than it lives."""
    limit = presented.claims.authorization_details
    if request.authority is not None:
        limit.narrow(request.authority)
    elif lineage:
        resource = policy.audiences.find(request.resource).resource
        request = replace(request, authority=_both(lineage[-1].authority.for_resource(resource), limit))
    grant = decide_issue(policy, admitted, lineage, request, now=now)
    limit.narrow(grant.authority.for_resource(grant.audience.resource))
    end = datetime.fromtimestamp(presented.claims.exp, UTC)
    return replace(grant, not_after=(*grant.not_after, end))


def _both(mine: Authority, limit: Authority) -> Authority:
    """Give what both allow, where one of them lies within the other; raises PolicyDenied where neither does."""
    try:
        return limit.narrow(mine)
    except PolicyDenied:
        return mine.narrow(limit)


def attach(writer: Writer, admitted: Admitted, lineage: tuple[Task, ...], now: datetime) -> tuple[Task, ...]:
    """Let the first process of its agent have a task that nobody has taken up; raises Refused.

    A task that is no such task, or not this agent's, is given back as it is: who may have it is judged elsewhere.
    """
    if not lineage:
        return lineage
    task = lineage[-1]
    if task.session is not None or task.supervision is Supervision.NONE or task.agent != admitted.actor.spiffe_id:
        return lineage
    require_lineage_active(task, tuple(reversed(lineage[:-1])), now)
    if admitted.session is None:
        if task.supervision is Supervision.LEASE:
            # It lives by a heartbeat, also where no node agent watches.
            return lineage
        raise Refused(
            "no node agent has told of this process, so nobody can watch it",
            code="session_unknown",
            hint="take the task up through the node agent's socket",
        )
    mine = replace(task, session=admitted.session, version=task.version + 1)
    writer.replace_task(mine, expected_version=task.version)
    writer.record(records.task_attached(mine, admitted.actor, now))
    writer.change(TASK_CHANGE, mine.id, mine.state.value)
    return (*lineage[:-1], mine)
