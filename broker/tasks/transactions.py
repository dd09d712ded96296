"""Transaction tokens: what one call chain inside the trust domain is about (draft-ietf-oauth-transaction-tokens-08).

They travel in the header ``Txn-Token``, never in ``Authorization``, and are no access tokens: another ``typ``, the trust domain
as audience, 15 to 60 seconds. Whoever asks for one is named in ``req_wl``, all who did so far in ``chain_metadata.txn_path``. A
replacement never changes ``txn``, ``sub``, ``act`` or ``aud``, never widens, and ends when what it replaces does.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final, Self

from broker.errors import Invalid, InvalidToken, PolicyDenied, Refused
from broker.spiffe import SpiffeId, TrustDomain
from broker.spiffe.jose import PublicKey, numeric_date, parse_compact, verify_signature
from broker.spiffe.strictjson import JsonValue
from broker.tasks.actors import nested_act, read_act
from broker.tasks.authority import Authority
from broker.tasks.context import NO_CONTEXT, Context, extend, read_context
from broker.tasks.reference import MAX_EPOCH
from broker.tasks.task import MAX_ACT_DEPTH
from broker.tasks.texts import ID, NAME
from broker.tasks.verify import ALGORITHM, LEEWAY

TOKEN_TYPE: Final = "txntoken+jwt"  # noqa: S105 - a media type
MIN_TTL: Final = timedelta(seconds=15)
MAX_TTL: Final = timedelta(seconds=60)
"""Longest life: it is no longer than the call chain, and a bearer of it inside the trust domain is believed so long."""
MAX_PATH: Final = MAX_ACT_DEPTH
"""Most workloads that may ask, one after the other, for one transaction."""

_TYPES: Final = frozenset({TOKEN_TYPE, "application/" + TOKEN_TYPE})
_REQUIRED: Final = frozenset(
    {"iss", "aud", "iat", "exp", "jti", "txn", "sub", "scope", "req_wl", "act", "authorization_details", "task"}
)
_SEAL: Final = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class TransactionClaims:
    """What a transaction token says. Fields bear the claims' names; times are whole seconds since 1970.

    ``txn_path`` are the workloads that asked, the latest last: it is ``req_wl``. ``task``, ``root`` and ``epoch`` are of the task behind it, by
    which the feed ends it.
    """

    iss: str
    aud: TrustDomain
    iat: int
    exp: int
    jti: str
    txn: str
    sub: str
    scope: str
    act: tuple[SpiffeId, ...]
    authorization_details: Authority
    task: str
    root: str
    epoch: int
    txn_path: tuple[SpiffeId, ...]
    tctx: Context = field(default_factory=lambda: NO_CONTEXT)
    rctx: Context = field(default_factory=lambda: NO_CONTEXT)

    def __post_init__(self) -> None:
        if not 1 <= len(self.txn_path) <= MAX_PATH or len(set(self.txn_path)) != len(self.txn_path):
            raise _invalid("the path of requesters is empty, too long, or meets one twice")
        if self.exp <= self.iat:
            raise _invalid("exp is not after iat")
        if self.scope != self.authorization_details.scope():
            raise _invalid("scope does not say what authorization_details say")

    @property
    def req_wl(self) -> SpiffeId:
        """The workload that asked for this very token."""
        return self.txn_path[-1]

    def to_payload(self) -> dict[str, JsonValue]:
        """Give the token's payload; an empty context is left out."""
        payload: dict[str, JsonValue] = {
            "iss": self.iss,
            "aud": self.aud.name,
            "iat": self.iat,
            "exp": self.exp,
            "jti": self.jti,
            "txn": self.txn,
            "sub": self.sub,
            "scope": self.scope,
            "req_wl": str(self.req_wl),
            "act": nested_act(self.act),
            "authorization_details": self.authorization_details.to_json(),
            "task": {"id": self.task, "root": self.root, "epoch": self.epoch},
            "chain_metadata": {
                "hop_count": len(self.txn_path),
                "txn_path": [str(workload) for workload in self.txn_path],
            },
        }
        contexts = {"tctx": self.tctx, "rctx": self.rctx}
        return payload | {name: dict(value) for name, value in contexts.items() if value}

    @classmethod
    def parse(cls, payload: Mapping[str, JsonValue]) -> Self:
        """Read a payload whose signature was checked; raises InvalidToken."""
        if not payload.keys() >= _REQUIRED:
            raise InvalidToken("a claim of the transaction token is missing", code="token_claim_missing")
        path, task = _path(payload), payload["task"]
        if not isinstance(task, dict) or task.keys() != {"id", "root", "epoch"}:
            raise _invalid("task does not have exactly its members")
        details = payload["authorization_details"]
        if not isinstance(details, list):
            raise _invalid("authorization_details is not a list")
        try:
            return cls(
                iss=_text(payload, "iss"),
                aud=TrustDomain(_text(payload, "aud")),
                iat=numeric_date(payload, "iat", required=True),
                exp=numeric_date(payload, "exp", required=True),
                jti=_id(payload, "jti"),
                txn=_id(payload, "txn"),
                sub=_text(payload, "sub"),
                scope=_long(payload, "scope"),
                act=read_act(payload["act"]),
                authorization_details=Authority.parse(details),
                task=_id(task, "id"),
                root=_id(task, "root"),
                epoch=_epoch(task["epoch"]),
                txn_path=path,
                tctx=read_context(payload["tctx"]) if "tctx" in payload else NO_CONTEXT,
                rctx=read_context(payload["rctx"]) if "rctx" in payload else NO_CONTEXT,
            )
        except InvalidToken:
            raise
        except Invalid as error:
            raise InvalidToken(f"a claim of the token: {error.message}", code="token_claim_invalid") from None


@dataclass(frozen=True, slots=True)
class VerifiedTransaction:
    """A transaction token whose signature and claims hold. Only :func:`verify_transaction` makes one."""

    claims: TransactionClaims
    seal: InitVar[object]

    def __post_init__(self, seal: object) -> None:
        if seal is not _SEAL:
            raise TypeError("a VerifiedTransaction comes from verify_transaction only")


def verify_transaction(
    token: str, keys: Mapping[str, PublicKey], *, issuer: str, trust_domain: TrustDomain, now: datetime
) -> VerifiedTransaction:
    """Verify a transaction token under the issuer's keys by ``kid``, at an aware time; raises InvalidToken.

    Whether its task still lives is the feed's to say, and who handed it on is the connection's.
    """
    if now.tzinfo is None:
        raise ValueError("now must be an aware datetime")
    jws = parse_compact(token)
    if jws.typ is None or not jws.typ.isascii() or jws.typ.lower() not in _TYPES:
        raise InvalidToken(
            "the token is not a transaction token", code="token_type", hint="its typ is not txntoken+jwt"
        )
    key = keys.get(jws.kid) if jws.kid is not None else None
    if key is None:
        raise InvalidToken("the token's key is not one of the issuer's", code="token_key_unknown")
    verify_signature(jws, key, ALGORITHM)
    claims = TransactionClaims.parse(jws.payload)
    if claims.iss != issuer:
        raise InvalidToken("the token is from another issuer", code="token_issuer")
    if claims.aud != trust_domain:
        raise InvalidToken("the token is for another trust domain", code="token_audience")
    if now.timestamp() > claims.exp + LEEWAY:
        raise InvalidToken("the token has expired", code="token_expired")
    if claims.iat > now.timestamp() + LEEWAY:
        raise InvalidToken("the token is not valid yet", code="token_not_yet_valid")
    return VerifiedTransaction(claims, _SEAL)


def replace_transaction(
    earlier: TransactionClaims,
    requester: SpiffeId,
    *,
    authority: Authority | None,
    scope: str,
    tctx: Context,
    rctx: Context,
    jti: str,
    now: datetime,
    ends: Iterable[datetime] = (),
) -> TransactionClaims:
    """Give the claims of a replacement, for the next workload of the chain; raises PolicyDenied, Refused.

    It ends when the earlier one does, or at the earliest of ``ends``, and an expired one is not replaced, whatever the leeway of verifiers.
    """
    if now.timestamp() >= earlier.exp:
        raise Refused("the transaction token has expired", code="txn_expired", hint="start the transaction again")
    if requester in earlier.txn_path:
        raise PolicyDenied("this workload is in the transaction's path already", code="txn_path_cycle")
    if len(earlier.txn_path) >= MAX_PATH:
        raise PolicyDenied("the transaction was handed on too often", code="txn_path_depth")
    granted = earlier.authorization_details
    if authority is not None:
        granted = granted.narrow(authority)
    if scope:
        granted = granted.for_scope(scope)
    iat, exp = lifetime(now, MAX_TTL, (datetime.fromtimestamp(earlier.exp, UTC), *ends))
    return TransactionClaims(
        iss=earlier.iss,
        aud=earlier.aud,
        iat=iat,
        exp=exp,
        jti=jti,
        txn=earlier.txn,
        sub=earlier.sub,
        scope=granted.scope(),
        act=earlier.act,
        authorization_details=granted,
        task=earlier.task,
        root=earlier.root,
        epoch=earlier.epoch,
        txn_path=(*earlier.txn_path, requester),
        tctx=extend(earlier.tctx, tctx),
        rctx=extend(earlier.rctx, rctx),
    )


def lifetime(now: datetime, ttl: timedelta, ends: Iterable[datetime]) -> tuple[int, int]:
    """Give ``iat`` and ``exp``: the earliest of all ends, down to whole seconds; raises Refused when nothing is left."""
    iat, exp = whole_seconds(now), whole_seconds(min((now + ttl, *ends)))
    if exp <= iat:
        raise Refused("less than a second is left for a token", code="no_lifetime_left")
    return iat, exp


def whole_seconds(moment: datetime) -> int:
    """Give the whole seconds since 1970, down, in integers."""
    return (moment - _EPOCH) // timedelta(seconds=1)


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def _path(payload: Mapping[str, JsonValue]) -> tuple[SpiffeId, ...]:
    chain = payload.get("chain_metadata")
    listed = chain.get("txn_path") if isinstance(chain, dict) else None
    if not isinstance(chain, dict) or not isinstance(listed, list) or len(listed) > MAX_PATH:
        raise _invalid("the path of requesters is missing or too long")
    path = _ids(listed)
    if chain.get("hop_count") != len(path) or not path or payload["req_wl"] != str(path[-1]):
        raise _invalid("req_wl, hop_count and txn_path do not fit each other")
    return path


def _ids(listed: Sequence[JsonValue]) -> tuple[SpiffeId, ...]:
    texts = [each for each in listed if isinstance(each, str)]
    if len(texts) != len(listed):
        raise _invalid("a requester is not text")
    try:
        return tuple(map(SpiffeId, texts))
    except Invalid as error:
        raise _invalid(f"a requester: {error.message}") from None


def _text(payload: Mapping[str, JsonValue], name: str) -> str:
    value = payload[name]
    if not isinstance(value, str) or NAME.fullmatch(value) is None:
        raise _invalid(f"{name} is not short printable text")
    return value


def _long(payload: Mapping[str, JsonValue], name: str) -> str:
    value = payload[name]
    if not isinstance(value, str):
        raise _invalid(f"{name} is not text")
    return value


def _id(payload: Mapping[str, JsonValue], name: str) -> str:
    value = payload[name]
    if not isinstance(value, str) or ID.fullmatch(value) is None:
        raise _invalid(f"{name} is not an id")
    return value


def _epoch(value: JsonValue) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_EPOCH:
        raise _invalid("task.epoch is not a whole number in range")
    return value


def _invalid(what: str) -> InvalidToken:
    return InvalidToken(f"a claim of the token is not valid: {what}", code="token_claim_invalid")
