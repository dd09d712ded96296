"""What is asked of the assertions, as values that are well formed once they exist: a subject, and what is wanted for it."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from broker.server.tasks.requests import check_key, check_scope
from broker.server.tasks.subjects import SubjectKind
from broker.spiffe import strictjson
from broker.tasks import Authority, Resource
from broker.tasks.context import NO_CONTEXT, Context
from broker.tasks.grants import GrantFormat

TRANSACTION: Final = "txn_token"
"""The kind of a transaction token: the end of its token type URN."""


@dataclass(frozen=True, slots=True)
class OwnTask:
    """A running task of the caller's own; a user's token, where sent, must be of its user."""

    task_id: str
    user_token: str = field(default="", repr=False)
    kind: SubjectKind = SubjectKind.ANY


@dataclass(frozen=True, slots=True)
class HeldToken:
    """A task token, whoever asked for it."""

    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class HeldTransaction:
    """A transaction token that is to be handed on under another name."""

    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class TransactionRequest:
    """A transaction token. ``resource`` says whose part of an own task it is about; a held token says so itself."""

    audience: str
    subject: OwnTask | HeldToken | HeldTransaction
    scope: str
    resource: Resource | None = None
    authority: Authority | None = None
    request_context: Context = field(default_factory=lambda: NO_CONTEXT)
    request_details: Context = field(default_factory=lambda: NO_CONTEXT)
    idempotency_key: str = ""

    def __post_init__(self) -> None:
        """Check the texts; raises Invalid."""
        check_scope(self.scope)
        check_key(self.idempotency_key)

    @property
    def kind(self) -> str:
        """What is asked for."""
        return TRANSACTION

    def parts(self) -> tuple[str | None, ...]:
        """Give what shapes the answer."""
        contexts = (self.request_context, self.request_details)
        texts = (strictjson.canonical(dict(context)).decode() for context in contexts)
        return *_common(self), *texts


@dataclass(frozen=True, slots=True)
class GrantRequest:
    """A grant for a remote authorization server, by its issuer; ``resource`` None takes the only one that it serves."""

    format: GrantFormat
    audience: str
    subject: OwnTask | HeldToken
    resource: Resource | None = None
    scope: str = ""
    authority: Authority | None = None
    idempotency_key: str = ""

    def __post_init__(self) -> None:
        """Check the texts; raises Invalid."""
        check_scope(self.scope)
        check_key(self.idempotency_key)

    @property
    def kind(self) -> str:
        """What is asked for."""
        return self.format.value

    def parts(self) -> tuple[str | None, ...]:
        """Give what shapes the answer."""
        return _common(self)


AssertionRequest = TransactionRequest | GrantRequest


@dataclass(frozen=True, slots=True)
class IssuedAssertion:
    """A signed token of a ``kind``, and what it says. ``repr`` hides it."""

    token: str = field(repr=False)
    kind: str
    issued_at: datetime
    expires_at: datetime
    scope: str
    authority: Authority
    task_id: str


def _common(request: AssertionRequest) -> tuple[str | None, ...]:
    own = request.subject.task_id if isinstance(request.subject, OwnTask) else None
    authority = None if request.authority is None else request.authority.text()
    resource = None if request.resource is None else request.resource.text
    return request.audience, own, resource, request.scope, authority
