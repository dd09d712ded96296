"""The claims of a task token: RFC 9068's, the actor chain, the binding, and the task behind it.

Responsible for what a token of ours says: built from our own records only, read back with a declared fate for every
claim. Signatures, keys and audiences are judged in :mod:`broker.tasks.verify`. No name, group or free text is in it.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from typing import Final, Self

from broker.errors import Invalid, InvalidToken, Refused
from broker.spiffe import SpiffeId
from broker.spiffe.jose import b64url_encode, numeric_date
from broker.spiffe.strictjson import JsonValue
from broker.tasks.actors import nested_act, read_act
from broker.tasks.authority import Authority
from broker.tasks.binding import Confirmation
from broker.tasks.claim_values import invalid, named, own_id, string
from broker.tasks.lineage import act_chain, lineage_epoch, require_lineage_active
from broker.tasks.reference import TaskReference
from broker.tasks.resource import Resource
from broker.tasks.task import MAX_ACT_DEPTH, Task
from broker.tasks.texts import check_id, check_issuer

MAX_TTL: Final = timedelta(seconds=300)
"""Longest life of a task token: the floor under the feed for verifiers that do not hear it."""
PURPOSES_KEPT: Final = 1_024
"""Purposes that are not hashed twice, a few KiB each at most: every token of a task says the same."""


class Fate(StrEnum):
    """What becomes of a claim that is read. A claim without a fate is named, and means nothing."""

    VERIFIED = "required and verified"
    RECORDED = "required and recorded"
    OPTIONAL_VERIFIED = "optional and verified"
    OPTIONAL = "optional and recorded"


FATES: Final[Mapping[str, Fate]] = {
    "iss": Fate.VERIFIED,  # equal to the issuer whose keys were used
    "aud": Fate.VERIFIED,  # one string, equal to the verifier's resource
    "exp": Fate.VERIFIED,  # against the clock
    "iat": Fate.VERIFIED,  # against the clock
    "nbf": Fate.OPTIONAL_VERIFIED,  # against the clock
    "sub": Fate.RECORDED,
    "client_id": Fate.VERIFIED,  # equal to act.sub
    "act": Fate.VERIFIED,  # nothing but IDs, not too deep, no agent twice
    "cnf": Fate.OPTIONAL_VERIFIED,  # against the holder; absent only where the audience takes bearer tokens
    "scope": Fate.VERIFIED,  # equal to the actions of authorization_details
    "authorization_details": Fate.VERIFIED,  # known types and members
    "task": Fate.VERIFIED,  # its state, by the verifier's feed; its hop equals the length of act
    "jti": Fate.RECORDED,
    "txn": Fate.RECORDED,
    "sid": Fate.OPTIONAL,
    "acr": Fate.OPTIONAL,
    "auth_time": Fate.OPTIONAL,
}
"""Every claim that we put into a task token, or judge in one."""

_REQUIRED: Final = frozenset(name for name, fate in FATES.items() if fate in (Fate.VERIFIED, Fate.RECORDED))


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskClaims:
    """What a task token says. Fields bear the claims' names; times are whole seconds since 1970.

    ``act`` is the chain of agents, the present actor first: always ``client_id``, the agent that asked.
    """

    iss: str
    sub: str
    client_id: SpiffeId
    aud: Resource
    exp: int
    iat: int
    jti: str
    txn: str
    scope: str
    act: tuple[SpiffeId, ...]
    cnf: Confirmation | None
    authorization_details: Authority
    task: TaskReference
    nbf: int | None = None
    sid: str | None = None
    acr: str | None = None
    auth_time: int | None = None
    unknown: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # What one claim says of another. It holds for what we mint as for what we read.
        if not self.act or self.act[0] != self.client_id:
            raise invalid("client_id is not the present actor")
        if len(self.act) > MAX_ACT_DEPTH or len(set(self.act)) != len(self.act):
            raise invalid("the chain of actors is too long, or meets one twice")
        # A root that was handed off has history and no parent.
        if self.task.hop != len(self.act) or (self.task.hop == 1 and self.task.parent is not None):
            raise invalid("the task's hop does not fit the chain of actors")
        if self.exp <= self.iat:
            raise invalid("exp is not after iat")
        if self.scope != self.authorization_details.scope():
            raise invalid("scope does not say what authorization_details say")

    def to_payload(self) -> dict[str, JsonValue]:
        """Give the token's payload; absent claims are left out."""
        payload: dict[str, JsonValue] = {
            "iss": self.iss,
            "sub": self.sub,
            "client_id": str(self.client_id),
            "aud": self.aud.text,
            "exp": self.exp,
            "iat": self.iat,
            "jti": self.jti,
            "txn": self.txn,
            "scope": self.scope,
            "act": nested_act(self.act),
            "authorization_details": self.authorization_details.to_json(),
            "task": self.task.to_json(),
        }
        if self.cnf is not None:
            payload["cnf"] = self.cnf.to_json()
        optional = {"nbf": self.nbf, "sid": self.sid, "acr": self.acr, "auth_time": self.auth_time}
        return payload | {name: value for name, value in optional.items() if value is not None}

    @classmethod
    def parse(cls, payload: Mapping[str, JsonValue]) -> Self:
        """Read a payload whose signature was checked; raises InvalidToken for any claim not as declared.

        A claim that a newer issuer added is named in ``unknown`` and means nothing (RFC 7519 §4): what restricts stands
        inside ``task``, ``cnf`` and ``authorization_details``, whose members are closed sets.
        """
        if not payload.keys() >= _REQUIRED:
            raise InvalidToken("a claim of the token is missing", code="token_claim_missing")
        act = read_act(payload["act"])
        try:
            return cls(
                iss=string(payload, "iss"),
                sub=named(payload, "sub"),
                # The same text twice is the usual token: its parsed form is taken, not parsed again.
                client_id=act[0] if payload["client_id"] == str(act[0]) else SpiffeId(string(payload, "client_id")),
                aud=Resource(string(payload, "aud")),
                exp=numeric_date(payload, "exp", required=True),
                iat=numeric_date(payload, "iat", required=True),
                nbf=numeric_date(payload, "nbf", required=False),
                jti=own_id(payload["jti"], "jti"),
                txn=own_id(payload["txn"], "txn"),
                sid=named(payload, "sid") if "sid" in payload else None,
                scope=string(payload, "scope"),
                act=act,
                cnf=Confirmation.parse(payload["cnf"]) if "cnf" in payload else None,
                authorization_details=Authority.parse(_array(payload["authorization_details"])),
                task=TaskReference.parse(payload["task"]),
                acr=named(payload, "acr") if "acr" in payload else None,
                auth_time=numeric_date(payload, "auth_time", required=False),
                unknown=tuple(sorted(payload.keys() - FATES.keys())),
            )
        except InvalidToken:
            raise
        except Invalid as error:
            raise InvalidToken(f"a claim of the token: {error.message}", code="token_claim_invalid") from None


def issue_claims(
    task: Task,
    *,
    issuer: str,
    resource: Resource,
    authority: Authority,
    cnf: Confirmation | None,
    jti: str,
    txn: str,
    now: datetime,
    ttl: timedelta,
    not_after: Iterable[datetime] = (),
    ancestors: Sequence[Task] = (),
    use: str | None = None,
    parameter_digest: str | None = None,
) -> TaskClaims:
    """Make the claims of one token from our records; the end is the earliest of all ends (``not_after`` are others).

    ``ancestors`` are the task's, nearest first. Raises Refused when a task of the chain is not active or no time is
    left, PolicyDenied when the authority is not the task's or does not concern the resource, Invalid for bad ids.
    """
    check_issuer(issuer, "issuer")
    check_id(jti, "jti")
    check_id(txn, "txn")
    require_lineage_active(task, ancestors, now)
    act = act_chain(task, ancestors)
    granted = task.authority.narrow(authority).for_resource(resource)
    lineage = (task, *ancestors)
    ends = [now + min(ttl, MAX_TTL), task.delegation.expires_at, *(each.expires_at for each in lineage), *not_after]
    iat, exp = _seconds(now), _seconds(min(ends))
    if exp <= iat:
        raise Refused("less than a second is left for a token", code="no_lifetime_left")
    delegation = task.delegation
    return TaskClaims(
        iss=issuer,
        sub=task.user,
        client_id=task.agent,
        aud=resource,
        exp=exp,
        iat=iat,
        jti=jti,
        txn=txn,
        sid=delegation.session,
        scope=granted.scope(),
        act=act,
        cnf=cnf,
        authorization_details=granted,
        task=TaskReference(
            id=task.id,
            root=task.root,
            parent=task.parent,
            epoch=lineage_epoch(lineage),
            hop=len(act),
            purpose=purpose_hash(task.purpose),
            authority_hash=task.authority.digest,
            use=use,
            parameter_digest=parameter_digest,
        ),
        acr=delegation.acr,
        auth_time=None if delegation.auth_time is None else _seconds(delegation.auth_time),
    )


@lru_cache(maxsize=PURPOSES_KEPT)
def purpose_hash(purpose: str) -> str:
    """Give what a token says of a purpose: ``sha-256:`` and the hash of its UTF-8 text."""
    return "sha-256:" + b64url_encode(hashlib.sha256(purpose.encode()).digest())


def _seconds(time: datetime) -> int:
    # Down to the whole second, in integers: no token lives longer than its sources.
    return (time - _EPOCH) // _SECOND


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_SECOND: Final = timedelta(seconds=1)


def _array(value: JsonValue) -> list[JsonValue]:
    # In a token it is an array: text that holds JSON is what a form parameter is.
    if not isinstance(value, list):
        raise invalid("authorization_details is not a list")
    return value
