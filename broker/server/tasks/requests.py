"""What is asked of the task half, and by whom: values that are well formed once they exist.

Both doors (the node agents' gRPC and HTTPS) read their own wire into these; what may be granted is decided in ``decision``.
"""

import re
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Final

from broker.errors import Invalid, PolicyDenied
from broker.server.tasks.subjects import SubjectKind
from broker.spiffe import SpiffeId, strictjson
from broker.tasks import Authority, Resource
from broker.tasks.task import Supervision
from broker.tasks.texts import THUMBPRINT, check_digest, check_id, check_purpose

MAX_KEY: Final = 255
"""Longest idempotency key, in characters."""
MAX_SCOPE: Final = 4096
"""Longest scope, in characters."""
MAX_SCOPES: Final = 64
"""Most actions in one scope: a task names what it does, not all that exists."""
MAX_LIMITS: Final = 4096

_KEY: Final = re.compile(r"[\x21-\x7e]{1,255}")
_SCOPE: Final = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+(?: [\x21\x23-\x5b\x5d-\x7e]+)*")


class Door(StrEnum):
    """Where a request came in."""

    AGENT = "agent"
    """A node agent vouches for a local process that it attested."""
    HTTPS = "https"
    """The workload itself, by the X.509-SVID of its connection, or by a JWT-SVID or WIT with a proof."""


@dataclass(frozen=True, slots=True)
class Actor:
    """The authenticated workload. ``session`` and ``entry_id`` are None where only the certificate is known.

    ``x5t`` is empty where it came without a certificate; ``jkt`` is the key that it has proven, empty for none. ``x5t``, ``not_after`` and ``serial`` (lower hex; empty where an older agent did not tell) are of the leaf that it holds now; ``agent`` is the node agent that vouches, None at the HTTPS
    door.
    """

    spiffe_id: SpiffeId
    x5t: str
    not_after: datetime
    door: Door
    session: str | None = None
    entry_id: str | None = None
    agent: SpiffeId | None = None
    serial: str = ""
    run: str = ""
    """The run of the node agent that vouches; empty where it did not say."""
    jkt: str = ""


@dataclass(frozen=True, slots=True)
class StartRequest:
    """Start a task on a user's word. ``ttl`` in seconds and ``supervision`` None ask for the server's default."""

    user_token: str = field(repr=False)
    purpose: str
    authority: Authority
    ttl: int = 0
    supervision: Supervision | None = None
    limits: str = ""
    kind: SubjectKind = SubjectKind.ANY
    idempotency_key: str = ""
    delegation_id: str = ""

    def __post_init__(self) -> None:
        """Check each field; raises Invalid."""
        check_delegation(self.delegation_id, self.user_token)
        if not self.user_token and not self.delegation_id:
            raise Invalid(
                "the user's token is missing",
                code="user_token_missing",
                hint="a task acts on a user's word: send it, or name a standing delegation",
            )
        if self.ttl < 0:
            raise Invalid("the ttl is negative", code="invalid_ttl")
        check_purpose(self.purpose)
        check_key(self.idempotency_key)
        refuse_limits(self.limits)


@dataclass(frozen=True, slots=True)
class IssueRequest:
    """One token of a task for one resource.

    ``scope`` and ``authority`` narrow what the task has; empty and None take all of it that concerns the resource. A
    ``user_token``, where sent, must be of the task's user.
    """

    resource: Resource
    task_id: str = ""
    scope: str = ""
    authority: Authority | None = None
    user_token: str = field(default="", repr=False)
    kind: SubjectKind = SubjectKind.ANY
    idempotency_key: str = ""
    delegation_id: str = ""
    jkt: str = ""
    """The thumbprint of the key that the token is to be bound to; empty: to the certificate."""
    bearer: bool = False
    """Ask for a token that is bound to nobody, where server and audience permit it."""
    parameter_digest: str = ""
    """The hash of the one call's parameters that a token for one use is wanted for; empty: for any number of calls."""

    def __post_init__(self) -> None:
        """Check each field; raises Invalid."""
        if self.jkt and (self.bearer or THUMBPRINT.fullmatch(self.jkt) is None):
            raise Invalid("the key's thumbprint is malformed, or the token is to be a bearer's", code="invalid_binding")
        if self.parameter_digest:
            check_digest(self.parameter_digest, "parameter digest")
        if self.task_id:
            check_id(self.task_id, "task id")
        check_scope(self.scope)
        check_key(self.idempotency_key)
        check_delegation(self.delegation_id, self.user_token)


@dataclass(frozen=True, slots=True)
class ChildRequest:
    """Start a task below a running one, for another workload; ``ttl`` 0 and ``supervision`` None take the usual.

    That workload fetches its own tokens: nothing of them passes through the one that asks.
    """

    parent: str
    agent: SpiffeId
    purpose: str
    authority: Authority
    ttl: int = 0
    supervision: Supervision | None = None
    limits: str = ""
    idempotency_key: str = ""

    def __post_init__(self) -> None:
        """Check each field; raises Invalid."""
        if self.ttl < 0:
            raise Invalid("the ttl is negative", code="invalid_ttl")
        check_purpose(self.purpose)
        check_key(self.idempotency_key)
        refuse_limits(self.limits)


class Operation(StrEnum):
    """How a task can be changed. Which of them a workload may, and which an operator, is decided elsewhere."""

    ATTACH = "attach"
    """Take up a task that another agent, or an operator, has left for this one."""
    SUSPEND = "suspend"
    RESUME = "resume"
    COMPLETE = "complete"
    REVOKE = "revoke"
    """End it unfinished."""
    HAND_OFF = "handoff"
    """Give the work to another agent and stop."""


@dataclass(frozen=True, slots=True)
class ChangeRequest:
    """Change one task. ``to`` is whom a hand-off is for; ``reason`` an operator's sentence for the record."""

    task_id: str
    operation: Operation
    to: SpiffeId | None = None
    expected_version: int | None = None
    idempotency_key: str = ""
    reason: str = ""

    def __post_init__(self) -> None:
        """Check each field; raises Invalid."""
        check_id(self.task_id, "task id")
        check_key(self.idempotency_key)
        if self.reason:
            check_purpose(self.reason)
        if (self.operation is Operation.HAND_OFF) != (self.to is not None):
            raise Invalid("a hand-off names one agent, and nothing else does", code="invalid_handoff")


@dataclass(frozen=True, slots=True)
class IssuedToken:
    """A signed task token and what it grants. ``repr`` hides it."""

    access_token: str = field(repr=False)
    issued_at: datetime
    expires_at: datetime
    scope: str
    authority: Authority
    task_id: str
    jti: str
    token_type: str = "Bearer"  # noqa: S105 - the type's name
    """How it is sent: ``DPoP`` with a proof (RFC 9449 §5), else ``Bearer``."""


def check_scope(scope: str) -> None:
    """Refuse what is no list of scope tokens, or a list beyond use; raises Invalid (RFC 6749 §3.3)."""
    if not scope:
        return
    if len(scope) > MAX_SCOPE or scope.count(" ") >= MAX_SCOPES or _SCOPE.fullmatch(scope) is None:
        raise Invalid("the scope is too long or not a list of scope tokens", code="invalid_scope")


def check_delegation(delegation_id: str, user_token: str) -> None:
    """Refuse what is no delegation's id, and an id beside a user's token: one word at a time; raises Invalid."""
    if delegation_id and user_token:
        raise Invalid("there are a user's token and a delegation: send one", code="subject_ambiguous")
    if delegation_id:
        check_id(delegation_id, "delegation's id")


def check_key(key: str) -> None:
    """Refuse an idempotency key that is no short printable text; empty is none; raises Invalid."""
    if key and _KEY.fullmatch(key) is None:
        raise Invalid(
            f"the idempotency key is not 1 to {MAX_KEY} printable characters without spaces",
            code="invalid_idempotency_key",
        )


def refuse_limits(limits: str) -> None:
    """Refuse every limit: nothing here meters it yet, and an unmetered bound is no bound; raises PolicyDenied."""
    if not limits:
        return
    value = strictjson.loads(limits.encode(errors="replace"), max_bytes=MAX_LIMITS)
    if not isinstance(value, dict):
        raise Invalid("limits are not a JSON object", code="invalid_limits")
    if value:
        raise unmetered()


def unmetered() -> PolicyDenied:
    """Give the refusal of a bound that nobody counts."""
    return PolicyDenied(
        "this server does not meter limits yet, so it does not accept any",
        code="unmetered_limit",
        hint="leave the limits out: a limit that nobody counts would be a promise that nobody keeps",
    )
