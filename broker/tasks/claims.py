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

from broker.errors import Invalid, InvalidSpiffeId, InvalidToken, Refused
from broker.spiffe import SpiffeId
from broker.spiffe.jose import b64url_encode, numeric_date
from broker.spiffe.strictjson import JsonValue
from broker.tasks.authority import Authority
from broker.tasks.binding import Confirmation
from broker.tasks.lineage import act_chain, lineage_epoch, require_lineage_active
from broker.tasks.resource import Resource
from broker.tasks.task import MAX_ACT_DEPTH, Task
from broker.tasks.texts import DIGEST, ID, NAME, check_id, check_issuer

MAX_TTL: Final = timedelta(seconds=300)
"""Longest life of a task token: the floor under the feed for verifiers that do not hear it."""
MAX_EPOCH: Final = 2**53 - 1
"""Largest epoch: the largest whole number that every JSON reader keeps."""
PURPOSES_KEPT: Final = 1_024
"""Purposes that are not hashed twice, a few KiB each at most: every token of a task says the same."""
USES: Final = frozenset({"once"})
"""What ``task.use`` may say; absent means any number of uses within the token's life."""


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
_TASK_REQUIRED: Final = frozenset({"id", "root", "epoch", "hop", "purpose", "authority_hash"})
_TASK_MEMBERS: Final = _TASK_REQUIRED | {"parent", "use"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskReference:
    """The claim ``task``. ``hop`` counts the agents of the chain; ``purpose`` and ``authority_hash`` are hashes."""

    id: str
    root: str
    parent: str | None
    epoch: int
    hop: int
    purpose: str
    authority_hash: str
    use: str | None = None

    def to_json(self) -> dict[str, JsonValue]:
        """Give the members that are present."""
        value: dict[str, JsonValue] = {"id": self.id}
        if self.parent is not None:
            value["parent"] = self.parent
        value |= {
            "root": self.root,
            "epoch": self.epoch,
            "hop": self.hop,
            "purpose": self.purpose,
            "authority_hash": self.authority_hash,
        }
        if self.use is not None:
            value["use"] = self.use
        return value


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
            raise _invalid("client_id is not the present actor")
        if len(self.act) > MAX_ACT_DEPTH or len(set(self.act)) != len(self.act):
            raise _invalid("the chain of actors is too long, or meets one twice")
        # A root that was handed off has history and no parent.
        if self.task.hop != len(self.act) or (self.task.hop == 1 and self.task.parent is not None):
            raise _invalid("the task's hop does not fit the chain of actors")
        if self.exp <= self.iat:
            raise _invalid("exp is not after iat")
        if self.scope != self.authorization_details.scope():
            raise _invalid("scope does not say what authorization_details say")

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
                iss=_string(payload, "iss"),
                sub=_named(payload, "sub"),
                # The same text twice is the usual token: its parsed form is taken, not parsed again.
                client_id=act[0] if payload["client_id"] == str(act[0]) else SpiffeId(_string(payload, "client_id")),
                aud=Resource(_string(payload, "aud")),
                exp=numeric_date(payload, "exp", required=True),
                iat=numeric_date(payload, "iat", required=True),
                nbf=numeric_date(payload, "nbf", required=False),
                jti=_own_id(payload["jti"], "jti"),
                txn=_own_id(payload["txn"], "txn"),
                sid=_named(payload, "sid") if "sid" in payload else None,
                scope=_string(payload, "scope"),
                act=act,
                cnf=Confirmation.parse(payload["cnf"]) if "cnf" in payload else None,
                authorization_details=Authority.parse(_array(payload["authorization_details"])),
                task=_reference(payload["task"]),
                acr=_named(payload, "acr") if "acr" in payload else None,
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
    return (time - _EPOCH) // timedelta(seconds=1)


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def nested_act(chain: Sequence[SpiffeId]) -> JsonValue:
    """Write a chain of agents, the present actor first, as the claim ``act`` (RFC 8693 §4.1)."""
    value: dict[str, JsonValue] = {}
    for agent in reversed(chain):
        value = {"sub": str(agent), "act": value} if value else {"sub": str(agent)}
    return value


def read_act(value: JsonValue) -> tuple[SpiffeId, ...]:
    """Read a claim ``act``, the present actor first; raises InvalidToken."""
    chain: list[SpiffeId] = []
    while True:
        # NOTE(security): an actor is its ID and its history, nothing that could be taken for a claim (RFC 8693 §4.1).
        if not isinstance(value, dict) or not value.keys() <= {"sub", "act"} or len(chain) == MAX_ACT_DEPTH:
            raise InvalidToken("the claim act is malformed or too deep", code="token_act")
        agent = value.get("sub")
        if not isinstance(agent, str):
            raise InvalidToken("an actor's sub is missing or not text", code="token_act")
        try:
            chain.append(SpiffeId(agent))
        except InvalidSpiffeId as error:
            raise InvalidToken(f"an actor is not a SPIFFE ID: {error.message}", code="token_act") from None
        if "act" not in value:
            return tuple(chain)
        value = value["act"]


def _reference(value: JsonValue) -> TaskReference:
    if not isinstance(value, dict) or not value.keys() <= _TASK_MEMBERS or not value.keys() >= _TASK_REQUIRED:
        raise _invalid("task lacks a member, or has one that is not known")
    use = value.get("use")
    if "use" in value and not (isinstance(use, str) and use in USES):
        raise _invalid("task.use is not known")
    return TaskReference(
        id=_own_id(value["id"], "task.id"),
        root=_own_id(value["root"], "task.root"),
        parent=_own_id(value["parent"], "task.parent") if "parent" in value else None,
        epoch=_count(value["epoch"], "task.epoch", 0, MAX_EPOCH),
        hop=_count(value["hop"], "task.hop", 1, MAX_ACT_DEPTH),
        purpose=_digest(value["purpose"], "task.purpose"),
        authority_hash=_digest(value["authority_hash"], "task.authority_hash"),
        use=use if isinstance(use, str) else None,
    )


def _array(value: JsonValue) -> list[JsonValue]:
    # In a token it is an array: text that holds JSON is what a form parameter is.
    if not isinstance(value, list):
        raise _invalid("authorization_details is not a list")
    return value


def _string(payload: Mapping[str, JsonValue], name: str) -> str:
    value = payload[name]
    if not isinstance(value, str):
        raise _invalid(f"{name} is not text")
    return value


def _named(payload: Mapping[str, JsonValue], name: str) -> str:
    value = _string(payload, name)
    if NAME.fullmatch(value) is None:
        raise _invalid(f"{name} is not short printable text")
    return value


def _own_id(value: JsonValue, name: str) -> str:
    if not isinstance(value, str) or ID.fullmatch(value) is None:
        raise _invalid(f"{name} is not an id")
    return value


def _digest(value: JsonValue, name: str) -> str:
    if not isinstance(value, str) or DIGEST.fullmatch(value) is None:
        raise _invalid(f"{name} is not a hash")
    return value


def _count(value: JsonValue, name: str, least: int, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise _invalid(f"{name} is not a whole number in range")
    return value


def _invalid(what: str) -> InvalidToken:
    return InvalidToken(f"a claim of the token is not valid: {what}", code="token_claim_invalid")
