"""A question to the policy: which agent does what for whom, at which audience, and under which circumstances; and who may approve it.

Pure. A question is made of committed facts only (a task, its delegation, a registered audience), so that the same task asks the same
question whenever it is judged again. What a person or an agent wrote freely (the purpose above all) is never part of it, nor is the
chain of agents behind the present one: only the current actor decides (RFC 8693 §4.1).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Final

from broker.errors import Invalid
from broker.server.tasks.config import RISKS, Audience
from broker.spiffe import SpiffeId
from broker.tasks import Resource, Task
from broker.tasks.task import MAX_ACT_DEPTH, Supervision
from broker.tasks.texts import check_issuer, check_name

MAX_ACTIONS: Final = 256
"""Most action names of one question: more than an authority of 4 KiB usefully holds."""


class Action(StrEnum):
    """What is asked for. What an agent does lies in a group of the schema: ``begin`` a task, or ``issue`` a token of one."""

    START = "startTask"
    CHILD = "startChild"
    HANDOFF = "handOff"
    RESUME = "resumeTask"
    ISSUE = "issueToken"
    TRANSACTION = "issueTransactionToken"
    GRANT = "issueGrant"
    """A grant for another trust domain's authorization server."""
    APPROVE = "approve"
    """What a person does, and no agent: it lies in no group, so that no rule about agents makes anybody an approver."""

    @property
    def group(self) -> str | None:
        """The action's group in the schema; None for what a person does."""
        match self:
            case Action.APPROVE:
                return None
            case Action.ISSUE | Action.TRANSACTION | Action.GRANT:
                return "issue"
        return "begin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What every question has; raises Invalid. Its kinds are :class:`Asked` and :class:`ApprovalAsked`.

    ``agent`` acts for ``user`` of ``issuer``. ``actions`` are the names of the authority that concern the audience; ``identified``
    says that each of them is limited to one named thing there. ``hop`` is how many agents stand above this one. ``acr`` and
    ``auth_age`` (whole seconds, None where nobody told) are of the sign-in of whoever asks: each kind says who that is.
    """

    action: Action
    agent: SpiffeId
    user: str
    issuer: str
    audience: Resource
    risk: str = "high"
    actions: frozenset[str] = frozenset()
    identified: bool = False
    acr: str | None = None
    auth_age: int | None = None
    hop: int = 0
    supervision: str = Supervision.ATTACHED.value

    def __post_init__(self) -> None:
        """Check what a person may have typed."""
        check_name(self.user, "user")
        check_issuer(self.issuer, "issuer")
        if self.acr is not None:
            check_name(self.acr, "acr")
        if self.risk not in RISKS or self.supervision not in SUPERVISIONS:
            raise Invalid("there is no such risk or supervision", code="invalid_question")
        if not 0 <= self.hop < MAX_ACT_DEPTH or len(self.actions) > MAX_ACTIONS or (self.auth_age or 0) < 0:
            raise Invalid("hop, actions or auth_age are out of range", code="invalid_question")

    @property
    def principal(self) -> tuple[str, str]:
        """Who asks: a kind of the schema, and a name of that kind."""
        return "Agent", str(self.agent)

    @property
    def users(self) -> tuple[tuple[str, str], ...]:
        """The users that are spoken of, each once, with the issuer."""
        return ((self.user, self.issuer),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked(Question):
    """Whether an agent may; raises Invalid. ``acr`` and ``auth_age`` are of the sign-in of the user whom it acts for."""

    def __post_init__(self) -> None:
        """Check that it is something that an agent does."""
        Question.__post_init__(self)
        if self.action.group is None:
            raise Invalid(
                f"{self.action.value} is nothing that an agent does",
                code="invalid_question",
                hint="name the approver: a person approves",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ApprovalAsked(Question):
    """Whether a person may approve what an agent wants to do for a user; raises Invalid.

    ``user`` and ``issuer`` are the requester's, ``acr`` and ``auth_age`` of the approver's sign-in. That nobody approves for
    himself is no matter of the policy: it is refused before anything is asked here.
    """

    action: Action = field(default=Action.APPROVE, init=False)
    approver: str
    approver_issuer: str

    def __post_init__(self) -> None:
        """Check the approver as well."""
        Question.__post_init__(self)
        check_name(self.approver, "approver")
        check_issuer(self.approver_issuer, "approver_issuer")
        if self.approver == self.user and self.approver_issuer != self.issuer:
            # One user of the schema would be of two issuers, and a rule about the one would hold for the other.
            raise Invalid(
                "approver and user have one name and two issuers",
                code="invalid_question",
                hint="a namespace keeps the users of two issuers apart",
            )

    @property
    def principal(self) -> tuple[str, str]:
        """Who asks: the approver."""
        return "User", self.approver

    @property
    def users(self) -> tuple[tuple[str, str], ...]:
        """The requester and the approver."""
        return tuple(dict.fromkeys(((self.user, self.issuer), (self.approver, self.approver_issuer))))


SUPERVISIONS: Final = frozenset({"attached", "lease", "none"})
"""How a task may be watched, as the schema knows it."""


def about(
    task: Task, audience: Audience, action: Action, details: Iterable[tuple[str, bool]], auth_age: int | None
) -> Asked:
    """Give the question about a task at one audience; ``details`` are its action names there, and whether each names one thing."""
    return Asked(action=action, acr=task.delegation.acr, auth_age=auth_age, **_facts(task, audience, details))


def about_approval(
    task: Task,
    audience: Audience,
    details: Iterable[tuple[str, bool]],
    *,
    approver: str,
    approver_issuer: str,
    acr: str | None,
    auth_age: int | None,
) -> ApprovalAsked:
    """Give the question whether a person may approve what a task wants at one audience."""
    return ApprovalAsked(
        approver=approver,
        approver_issuer=approver_issuer,
        acr=acr,
        auth_age=auth_age,
        **_facts(task, audience, details),
    )


def _facts(task: Task, audience: Audience, details: Iterable[tuple[str, bool]]) -> dict[str, Any]:
    found = tuple(details)
    return {
        "agent": task.agent,
        "user": task.user,
        "issuer": task.delegation.issuer,
        "audience": audience.resource,
        "risk": audience.risk,
        "actions": frozenset(name for name, _ in found),
        "identified": all(is_named for _, is_named in found),
        "hop": task.depth,
        "supervision": task.supervision.value,
    }


def age_of_login(task: Task, at: datetime) -> int | None:
    """Give the whole seconds since the user logged in, at least 0: an issuer's clock may be ahead of ours."""
    logged_in = task.delegation.auth_time
    return None if logged_in is None else max(0, int((at - logged_in).total_seconds()))


def families_of(action: str) -> tuple[str, ...]:
    """Give the families that an action lies in: of ``a.b.c`` they are ``a.*`` and ``a.b.*``; a family lies in itself."""
    parts = action.split(".")
    return tuple(".".join(parts[:count]) + ".*" for count in range(1, len(parts)))


def places_above(resource: Resource) -> tuple[str, ...]:
    """Give the resource and all that it lies in, at segment boundaries, the host last."""
    scheme, host, *segments = resource.text.split("/")[0], *resource.text.split("/")[2:]
    return tuple("/".join((scheme, "", host, *segments[:count])) for count in range(len(segments), -1, -1))


def paths_above(spiffe_id: SpiffeId) -> tuple[str, ...]:
    """Give the SPIFFE ID and all that it lies below, at segment boundaries, its trust domain last."""
    root, segments = str(spiffe_id.trust_domain.id), spiffe_id.path.split("/")[1:]
    return tuple("/".join((root, *segments[:count])) for count in range(len(segments), -1, -1))
