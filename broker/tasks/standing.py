"""A standing delegation: what a user lets agents do while the user is away.

Responsible for what it permits: whom, how much, how long, through how many agents. It was made by the user in a session of
their own, never by an agent. What a task may do is asked for anew with each task, and lies within the ceiling. Stores
nothing; a withdrawn one permits nothing.
"""

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Self

from broker.errors import BrokerError, Invalid, PolicyDenied, Refused
from broker.spiffe import SpiffeId
from broker.spiffe.strictjson import JsonValue
from broker.tasks.authority import Authority
from broker.tasks.causes import Cause
from broker.tasks.delegation import Delegation
from broker.tasks.task import MAX_ACT_DEPTH
from broker.tasks.texts import check_digest, check_id, check_issuer, check_name, check_purpose

MAX_AGENTS: Final = 64
"""Most agents, or families of agents, in one delegation."""
BELOW: Final = "/*"
"""At the end of a pattern: every SPIFFE ID below it, not the one itself."""

_MEMBERS: Final = frozenset(
    {"client", "session", "acr", "token_hash", "authority", "agents", "max_task_ttl", "max_hops", "purpose"}
)


@dataclass(frozen=True, slots=True)
class AgentPattern:
    """One SPIFFE ID, or with ``/*`` at the end all below it, at a segment boundary; raises Invalid."""

    text: str

    def __post_init__(self) -> None:
        try:
            found = SpiffeId(self.text.removesuffix(BELOW))
        except BrokerError:
            raise _invalid("an agent is neither a SPIFFE ID nor one with /* at its end", "invalid_agent") from None
        if not found.path and not self.text.endswith(BELOW):
            raise _invalid("an agent is a trust domain, not a workload", "invalid_agent")

    def covers(self, agent: SpiffeId) -> bool:
        """Tell whether this agent is meant."""
        if self.text.endswith(BELOW):
            return str(agent).startswith(self.text[:-1])
        return str(agent) == self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class StandingDelegation:
    """What one user permits; raises Invalid. ``max_task_ttl`` is in seconds. Times are aware; one that ended says why."""

    id: str
    issuer: str
    user: str
    client: str
    token_hash: str
    auth_time: datetime
    authority: Authority
    agents: tuple[AgentPattern, ...]
    purpose: str
    max_task_ttl: int
    max_hops: int
    created_at: datetime
    expires_at: datetime
    session: str | None = None
    acr: str | None = None
    ended_at: datetime | None = None
    cause: Cause | None = None

    def __post_init__(self) -> None:
        """Check each field."""
        check_id(self.id, "delegation's id")
        check_issuer(self.issuer, "delegation's issuer")
        check_name(self.user, "user")
        check_name(self.client, "client")
        check_digest(self.token_hash, "delegation's token hash")
        check_purpose(self.purpose)
        if not 1 <= len(self.agents) <= MAX_AGENTS:
            raise _invalid(f"it does not name 1 to {MAX_AGENTS} agents", "invalid_agent")
        if self.max_task_ttl < 1 or not 1 <= self.max_hops <= MAX_ACT_DEPTH:
            raise _invalid(f"its longest task is not a second, or its hops are not 1 to {MAX_ACT_DEPTH}")
        times = (self.auth_time, self.created_at, self.expires_at, self.ended_at)
        if any(time is not None and time.tzinfo is None for time in times):
            raise _invalid("one of its times has no time zone")
        if self.expires_at <= self.created_at:
            raise _invalid("it ends before it starts")

    def state(self, now: datetime) -> str:
        """Say how it stands: ``standing``, ``withdrawn`` or ``expired``."""
        if self.ended_at is not None:
            return "withdrawn"
        return "expired" if now >= self.expires_at else "standing"

    def require_live(self, now: datetime) -> None:
        """Refuse when it is over; raises Refused (``delegation_withdrawn``, ``delegation_expired``)."""
        if self.ended_at is not None:
            raise Refused(
                "the delegation was withdrawn", code="delegation_withdrawn", hint="ask the user for a new one"
            )
        if now >= self.expires_at:
            raise Refused("the delegation has expired", code="delegation_expired", hint="ask the user for a new one")

    def require_agent(self, agent: SpiffeId) -> None:
        """Refuse an agent that the user did not name; raises PolicyDenied (``delegation_agent``)."""
        if not any(pattern.covers(agent) for pattern in self.agents):
            raise not_named()

    def delegation(self) -> Delegation:
        """Give what a task of it carries. It is of no session: it is made to outlive the one it was made in."""
        return Delegation(
            issuer=self.issuer,
            user=self.user,
            expires_at=self.expires_at,
            token_hash=self.token_hash,
            client=self.client,
            acr=self.acr,
            auth_time=self.auth_time,
            issued_at=self.created_at,
            standing=self.id,
            max_hops=self.max_hops,
        )

    def terms(self) -> dict[str, JsonValue]:
        """Give, for the store, what its own columns do not hold."""
        return {
            "client": self.client,
            "session": self.session,
            "acr": self.acr,
            "token_hash": self.token_hash,
            "authority": self.authority.to_json(),
            "agents": [pattern.text for pattern in self.agents],
            "max_task_ttl": self.max_task_ttl,
            "max_hops": self.max_hops,
            "purpose": self.purpose,
        }

    @classmethod
    def of(
        cls,
        terms: JsonValue,
        *,
        id: str,  # noqa: A002 - the field's name
        issuer: str,
        user: str,
        auth_time: datetime,
        created_at: datetime,
        expires_at: datetime,
        ended_at: datetime | None = None,
        cause: Cause | None = None,
    ) -> Self:
        """Read what :meth:`terms` wrote, with the columns beside it; raises Invalid."""
        if not isinstance(terms, dict) or terms.keys() != _MEMBERS:
            raise _invalid("its terms do not have exactly their members")
        agents = terms["agents"]
        if not isinstance(agents, list):
            raise _invalid("its agents are not a list")
        session, acr = terms["session"], terms["acr"]
        return cls(
            id=id,
            issuer=issuer,
            user=user,
            client=_text(terms["client"]),
            session=None if session is None else _text(session),
            acr=None if acr is None else _text(acr),
            token_hash=_text(terms["token_hash"]),
            auth_time=auth_time,
            authority=Authority.parse(terms["authority"]),
            agents=tuple(AgentPattern(_text(one)) for one in agents),
            purpose=_text(terms["purpose"]),
            max_task_ttl=_whole(terms["max_task_ttl"]),
            max_hops=_whole(terms["max_hops"]),
            created_at=created_at,
            expires_at=expires_at,
            ended_at=ended_at,
            cause=cause,
        )


def not_named() -> PolicyDenied:
    """Give the one answer for a delegation that is not there and for one that names other agents."""
    return PolicyDenied(
        "no delegation of this id names this agent",
        code="delegation_agent",
        hint="the user names the agents when the delegation is made",
    )


def read_agents(texts: JsonValue) -> tuple[AgentPattern, ...]:
    """Read the patterns of a request, each once, in order; raises Invalid (``invalid_agent``)."""
    if not isinstance(texts, list) or not 1 <= len(texts) <= MAX_AGENTS:
        raise _invalid(f"it does not name 1 to {MAX_AGENTS} agents", "invalid_agent")
    patterns = (AgentPattern(_text(one)) for one in texts)
    return tuple({pattern.text: pattern for pattern in patterns}.values())


def _text(value: JsonValue) -> str:
    if not isinstance(value, str) or re.search("[\ud800-\udfff]", value):
        raise _invalid("a member is not text")
    return value


def _whole(value: JsonValue) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _invalid("a member is not a whole number")
    return value


def _invalid(what: str, code: str = "invalid_delegation") -> Invalid:
    return Invalid(f"the delegation cannot be: {what}", code=code)
