"""What an operator decides about tasks, as values that are valid once they exist.

Settings files and environment variables are read elsewhere; this module only says what may be chosen, and refuses with
Misconfigured what must not be.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from broker.errors import Misconfigured, PolicyDenied
from broker.spiffe import SpiffeId
from broker.tasks import Resource
from broker.tasks.task import MAX_ACT_DEPTH, Supervision
from broker.tasks.verify import BEARER_SECONDS

MIN_TOKEN_TTL: Final = 10
"""Seconds: below it a token is dead before a slow caller has used it."""
MAX_TOKEN_TTL: Final = 300
"""Seconds: the floor under revocation. Who never hears of an end stops believing after this."""
DEFAULT_TOKEN_TTL: Final = 180
MAX_TASK_TTL: Final = 30 * 86400
"""Seconds: no user's word is taken for longer than a month."""
DEFAULT_DELEGATION_AGE: Final = 300
"""Seconds since the user signed in: a standing delegation is the word of somebody who is there."""
MAX_CHILDREN: Final = 100_000
"""Beyond it a single task could fill the store."""
BINDINGS: Final = frozenset({"x5t", "session", "dpop", "window", "bearer"})
"""How a token may be tied to its holder: ``window`` and ``bearer`` are weaker, and never a default."""
MAX_BEARER_TTL: Final = BEARER_SECONDS
RISKS: Final = frozenset({"high", "normal", "low"})

_NAMESPACE: Final = re.compile(r"[\x21-\x7e]{0,64}")


@dataclass(frozen=True, slots=True)
class Audience:
    """A service that tokens are for: its resource, how tokens are bound, who may introspect; raises Misconfigured.

    ``transactions``: whether its tokens may become transaction tokens, at their holder's wish or that of ``transaction_requesters``.
    """

    resource: Resource
    binding: frozenset[str] = frozenset({"x5t", "session"})
    risk: str = "high"
    introspectors: frozenset[SpiffeId] = frozenset()
    token_ttl: int | None = None
    transactions: bool = False
    transaction_requesters: frozenset[SpiffeId] = frozenset()

    def __post_init__(self) -> None:
        """Check each field."""
        if self.transaction_requesters and not self.transactions:
            raise Misconfigured(
                f"the audience {self.resource.text} names transaction_requesters without transactions",
                code="audience_transactions",
                hint="set transactions = true, or leave them out",
            )
        if not self.binding or not self.binding <= BINDINGS:
            raise Misconfigured(
                f"the audience {self.resource.text} names a binding that is not one of {', '.join(sorted(BINDINGS))}",
                code="audience_binding",
                hint="x5t, session and dpop bind a token to its holder",
            )
        if self.binding == {"bearer"}:
            raise Misconfigured(
                f"the audience {self.resource.text} takes bearer tokens only",
                code="audience_binding",
                hint="name a binding for those who can: bearer is only for a caller that asks for it",
            )
        if self.risk not in RISKS:
            raise Misconfigured(f"the audience {self.resource.text} has an unknown risk", code="audience_risk")
        if self.token_ttl is not None:
            _check_token_ttl(self.token_ttl)

    @property
    def session_bound(self) -> bool:
        """Whether tokens for it survive the rotation of a certificate, by the workload session."""
        return "session" in self.binding

    @property
    def takes_bearer(self) -> bool:
        """Whether it takes tokens that are bound to nobody."""
        return "bearer" in self.binding


class Audiences:
    """The registered audiences. One that is not here does not exist: nothing configured, nothing issued."""

    def __init__(self, audiences: Iterable[Audience] = ()) -> None:
        """Index them; raises Misconfigured when two name the same resource."""
        self._by_resource: dict[Resource, Audience] = {}
        for audience in audiences:
            if audience.resource in self._by_resource:
                raise Misconfigured(f"the audience {audience.resource.text} is there twice", code="audience_twice")
            self._by_resource[audience.resource] = audience

    def __iter__(self) -> Iterator[Audience]:
        """Give each, in the order of the settings."""
        return iter(self._by_resource.values())

    def find(self, resource: Resource) -> Audience:
        """Give the audience of exactly this resource; raises PolicyDenied(code="invalid_target")."""
        audience = self._by_resource.get(resource)
        if audience is None:
            raise PolicyDenied(
                "the resource is not a registered audience",
                code="invalid_target",
                hint="an operator registers it under [[server.audiences]]",
            )
        return audience

    def holding(self, location: Resource) -> Audience | None:
        """Give the audience that a location is or lies in, the nearest one; None where there is none."""
        found = self._by_resource.get(location)
        if found is not None:
            return found
        above = (one for resource, one in self._by_resource.items() if resource.contains(location))
        return max(above, key=lambda one: len(one.resource.text), default=None)

    def require_holding(self, location: Resource) -> None:
        """Refuse a location that lies in no audience: no token could ever use it; raises PolicyDenied(invalid_target)."""
        if location not in self._by_resource and not any(one.contains(location) for one in self._by_resource):
            raise PolicyDenied(
                "a location lies in no registered audience",
                code="invalid_target",
                hint="an operator registers it under [[server.audiences]]",
            )


@dataclass(frozen=True, slots=True)
class SubjectIssuer:
    """An OpenID issuer whose users' tokens count as their word; raises Misconfigured.

    ``audiences``: what stands for us in ``aud``. ``clients``: other clients whose tokens we take (``azp``, ``client_id``).
    ``namespace`` is put before every ``sub``, so that two issuers cannot name the same user. ``required_claims`` must be in
    each token with just these values (a tenant, a hosted domain). ``session_lease`` (seconds, 0: none): how long after the
    issuer's last word of a session it counts. ``delegation_clients``: those whose tokens may make a standing delegation, within
    ``delegation_max_age`` seconds of the sign-in; ``approval_clients`` and ``approval_max_age`` in the same way those through which
    people decide approvals. ``jwks_url`` is where its keys are, if they are not to be looked up.
    """

    issuer: str
    audiences: frozenset[str]
    clients: frozenset[str] = frozenset()
    namespace: str = ""
    ca_path: Path | None = None
    required_claims: tuple[tuple[str, str], ...] = ()
    session_lease: int = 0
    delegation_clients: frozenset[str] = frozenset()
    delegation_max_age: int = DEFAULT_DELEGATION_AGE
    approval_clients: frozenset[str] = frozenset()
    approval_max_age: int = DEFAULT_DELEGATION_AGE
    jwks_url: str = ""

    def __post_init__(self) -> None:
        """Check each field."""
        check_https(self.issuer, "the subject issuer")
        if self.jwks_url:
            check_https(self.jwks_url.partition("?")[0], "the address of the issuer's keys")
        if self.session_lease < 0 or self.delegation_max_age < 1 or self.approval_max_age < 1:
            raise Misconfigured(f"a time of the subject issuer {self.issuer} is not one", code="subject_times")
        if not self.audiences or "" in self.audiences:
            raise Misconfigured(
                f"the subject issuer {self.issuer} has no audiences",
                code="subject_audiences",
                hint="name what this broker is called in the aud of its tokens",
            )
        if unknown := self.delegation_clients - self.clients - self.audiences:
            # Their tokens would be refused before anybody asks what they may do.
            raise Misconfigured(
                f"{min(unknown)} makes delegations and is no client of {self.issuer}",
                code="delegation_client_unknown",
                hint="name it in clients, too",
            )
        if unknown := self.approval_clients - self.clients - self.audiences:
            raise Misconfigured(
                f"{min(unknown)} decides approvals and is no client of {self.issuer}",
                code="approval_client_unknown",
                hint="name it in clients, too",
            )
        if _NAMESPACE.fullmatch(self.namespace) is None:
            raise Misconfigured(f"the namespace of {self.issuer} is not short printable text", code="subject_namespace")


@dataclass(frozen=True, slots=True)
class Transmitter:
    """Who sends security events (Shared Signals Framework 1.0), of the users of one subject issuer; raises Misconfigured.

    ``audiences``: what stands for us in ``aud``. Events are pushed to us (RFC 8935) unless ``poll_url`` says where to fetch them
    (RFC 8936), every ``poll_every`` seconds. ``token`` is the bearer token of either: expected of a pusher, shown to the polled.
    ``jwks_url`` is where its keys are, if they are not to be looked up.
    """

    issuer: str
    audiences: frozenset[str]
    subject_issuer: str
    ca_path: Path | None = None
    jwks_url: str = ""
    poll_url: str = ""
    poll_every: float = 5.0
    token: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        """Check each field."""
        check_https(self.issuer, "the transmitter")
        for url in (self.jwks_url, self.poll_url):
            if url:
                check_https(url.partition("?")[0], f"an address of the transmitter {self.issuer}")
        if not self.audiences or "" in self.audiences:
            raise Misconfigured(
                f"the transmitter {self.issuer} has no audiences",
                code="ssf_audiences",
                hint="name what this broker is called in the aud of its events",
            )
        if self.poll_every <= 0:
            raise Misconfigured(f"poll_every of the transmitter {self.issuer} is not a time", code="ssf_times")

    @property
    def discovery(self) -> str:
        """Where its configuration lies (SSF 1.0 §7.2.1): the well-known part comes before the issuer's path."""
        parts = urlsplit(self.issuer)
        return f"{parts.scheme}://{parts.netloc}/.well-known/ssf-configuration{parts.path.rstrip('/')}"


def check_transmitters(
    transmitters: Iterable[Transmitter], issuers: Iterable[SubjectIssuer]
) -> tuple[Transmitter, ...]:
    """Refuse transmitters that are there twice, or speak of users whose tokens nobody takes; raises Misconfigured."""
    known = tuple(transmitters)
    if len({one.issuer for one in known}) != len(known):
        raise Misconfigured("a transmitter is there twice", code="ssf_twice")
    subjects = {one.issuer for one in issuers}
    for one in known:
        if one.subject_issuer not in subjects:
            raise Misconfigured(
                f"the transmitter {one.issuer} speaks of the users of {one.subject_issuer}, which is no subject issuer",
                code="ssf_subject",
                hint="set subject_issuer to an issuer under [[server.subjects]]",
            )
    return known


def check_issuers(issuers: Iterable[SubjectIssuer]) -> tuple[SubjectIssuer, ...]:
    """Refuse issuers that could name the same user; raises Misconfigured."""
    known = tuple(issuers)
    if len({one.issuer for one in known}) != len(known):
        raise Misconfigured("a subject issuer is there twice", code="subject_twice")
    for one in known:
        for other in known:
            if one is not other and other.namespace.startswith(one.namespace):
                raise Misconfigured(
                    f"the users of {one.issuer} and {other.issuer} cannot be told apart",
                    code="subject_namespace",
                    hint='give each a namespace, such as "staff:" and "partner:"; none may begin with another',
                )
    return known


@dataclass(frozen=True, slots=True)
class TaskDefaults:
    """Lives and supervision where a request does not say; all lives in seconds; raises Misconfigured.

    ``allow_unsupervised`` lets a caller ask for supervision "none": a task that no process has to stay alive for. Where no
    node agent has told of a caller's workload session, its task lives no longer than the certificate it was started with. ``max_depth`` is the most agents in one chain,
    ``max_children`` the most tasks that one task may start over its life. A workload may take a task up again
    ``max_resumes`` times, and ``max_resumes_per_minute`` times within a minute: beyond, an operator has to look.
    """

    token_ttl: int = DEFAULT_TOKEN_TTL
    task_ttl: int = 3600
    max_task_ttl: int = 86400
    supervision: Supervision = Supervision.ATTACHED
    allow_unsupervised: bool = False
    max_depth: int = 5
    max_children: int = 100
    max_resumes: int = 20
    max_resumes_per_minute: int = 3
    allow_bearer: bool = False

    def __post_init__(self) -> None:
        """Check each field."""
        _check_token_ttl(self.token_ttl)
        if not 1 <= self.task_ttl <= self.max_task_ttl <= MAX_TASK_TTL:
            raise Misconfigured(
                "task_ttl must be at least 1 s and at most max_task_ttl, which is at most 30 days", code="task_ttl"
            )
        if not 1 <= self.max_depth <= MAX_ACT_DEPTH:
            raise Misconfigured(f"max_depth must be 1 to {MAX_ACT_DEPTH}", code="max_depth")
        if not 0 <= self.max_children <= MAX_CHILDREN:
            raise Misconfigured(f"max_children must be 0 to {MAX_CHILDREN}", code="max_children")
        if self.max_resumes < 0 or self.max_resumes_per_minute < 0:
            raise Misconfigured("max_resumes and max_resumes_per_minute must not be negative", code="max_resumes")


def check_https(url: str, what: str) -> None:
    """Refuse what is no plain https address with a host; raises Misconfigured."""
    try:
        parts = urlsplit(url)
        plain = parts.scheme == "https" and parts.hostname and parts.port != 0 and "@" not in parts.netloc
    except ValueError:
        plain = False
    if not plain or not url.isascii() or "?" in url or "#" in url or not url.isprintable():
        raise Misconfigured(f"{what} is not an https address without user, query and fragment", code="not_https")


def _check_token_ttl(ttl: int) -> None:
    if not MIN_TOKEN_TTL <= ttl <= MAX_TOKEN_TTL:
        raise Misconfigured(
            f"token_ttl must be {MIN_TOKEN_TTL} to {MAX_TOKEN_TTL} seconds",
            code="token_ttl",
            hint="a token is renewed by asking again, not by living longer",
        )
