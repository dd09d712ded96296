"""The binding of a token to its holder: what ``cnf`` says, and whether whoever presents it satisfies it.

Responsible for the comparison only. Who the peer is must have been verified before: evidence comes from a verified SVID
or a verified proof and from nothing else. Whether a workload session lives is told by the feed, not known here. Sources:
RFC 8705 §3 (``x5t#S256``), RFC 9449 §6 (``jkt``), RFC 7800 §3.1 (a member that is not understood refuses).
"""

from dataclasses import InitVar, dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final, Self

from broker.errors import Invalid, InvalidToken, Refused
from broker.spiffe import SpiffeId
from broker.spiffe.strictjson import JsonValue
from broker.spiffe.x509svid import X509Svid
from broker.tasks.dpop import ShownProof
from broker.tasks.texts import THUMBPRINT, check_id

WINDOW_SKEW: Final = timedelta(seconds=30)
"""How far the clocks of two authorities may differ where a leaf's beginning is compared with a token's."""
_SEAL: Final = object()
_WINDOW: Final = "window"
_MEMBERS: Final = frozenset({"x5t#S256", "spiffe_session", "jkt", "bind"})


@dataclass(frozen=True, slots=True)
class Confirmation:
    """The claim ``cnf``: the holder's certificate or key, and the workload session; raises Invalid.

    With ``x5t`` alone, exactly that certificate holds the token; with ``session`` every leaf of that session; with ``window``
    (for issuers that tell of no sessions) every leaf of the same SPIFFE ID that began within the token's life. With ``jkt`` a
    proof by that key is needed.
    """

    x5t: str | None = None
    session: str | None = None
    jkt: str | None = None
    window: bool = False

    def __post_init__(self) -> None:
        if self.x5t is None and self.jkt is None:
            raise Invalid("neither a certificate nor a key is named", code="invalid_confirmation")
        for thumbprint in (self.x5t, self.jkt):
            if thumbprint is not None and THUMBPRINT.fullmatch(thumbprint) is None:
                raise Invalid("a thumbprint is not a SHA-256 hash in base64url", code="invalid_confirmation")
        if self.session is not None:
            check_id(self.session, "workload session id")
        if self.window and (self.x5t is None or self.session is not None):
            raise Invalid("a window is for a certificate without a session", code="invalid_confirmation")

    def to_json(self) -> dict[str, JsonValue]:
        """Give the members that are present."""
        members = {"x5t#S256": self.x5t, "spiffe_session": self.session, "jkt": self.jkt}
        value: dict[str, JsonValue] = {name: text for name, text in members.items() if text is not None}
        if self.window:
            value["bind"] = _WINDOW
        return value

    @classmethod
    def parse(cls, value: JsonValue) -> Self:
        """Read a ``cnf``: one without a certificate or key, or with a member that is not known, is InvalidToken."""
        if not isinstance(value, dict) or not value or not value.keys() <= _MEMBERS:
            raise InvalidToken("the claim cnf is missing, or has members that are not known", code="token_cnf")
        x5t, session, jkt, bind = (value.get(name, "") for name in ("x5t#S256", "spiffe_session", "jkt", "bind"))
        if not (isinstance(x5t, str) and isinstance(session, str) and isinstance(jkt, str)):
            raise InvalidToken("a member of the claim cnf is not text", code="token_cnf")
        if "bind" in value and bind != _WINDOW:
            raise InvalidToken("the claim cnf binds in a way that is not known", code="token_cnf")
        try:
            # Absent is None; present and empty is refused by the checks above.
            return cls(
                x5t if "x5t#S256" in value else None,
                session if "spiffe_session" in value else None,
                jkt if "jkt" in value else None,
                "bind" in value,
            )
        except Invalid as error:
            raise InvalidToken(f"the claim cnf: {error.message}", code="token_cnf") from None


@dataclass(frozen=True, slots=True)
class PeerEvidence:
    """Who is at the other end of this connection. Only :meth:`from_svid` makes one."""

    spiffe_id: SpiffeId
    x5t: str
    not_before: datetime
    session: str | None
    seal: InitVar[object]

    def __post_init__(self, seal: object) -> None:
        if seal is not _SEAL:
            raise TypeError("PeerEvidence comes from a verified SVID only")

    @classmethod
    def from_svid(cls, svid: X509Svid, session: str | None = None) -> Self:
        """Take the evidence of a verified SVID; ``session`` only when it is known to hold this very leaf."""
        return cls(svid.id, svid.x5t, svid.not_before, session, _SEAL)

    def of_session(self, session: str) -> "PeerEvidence":
        """Give the same evidence of a leaf that this session is known to hold."""
        return PeerEvidence(self.spiffe_id, self.x5t, self.not_before, session, _SEAL)


class BindingMatch(StrEnum):
    """By which member of ``cnf`` the holder was recognised."""

    X5T = "x5t"
    SESSION = "session"
    WINDOW = "window"
    DPOP = "dpop"
    BEARER = "bearer"


def bound_by(cnf: Confirmation | None) -> BindingMatch:
    """Name the loosest way in which a token's holder is recognised: what it is worth."""
    if cnf is None:
        return BindingMatch.BEARER
    if cnf.jkt is not None:
        return BindingMatch.DPOP
    if cnf.session is not None:
        return BindingMatch.SESSION
    return BindingMatch.WINDOW if cnf.window else BindingMatch.X5T


@dataclass(frozen=True, slots=True)
class Accepted:
    """What a verifier takes beyond what every one takes; nothing unless its audience was published so."""

    window: bool = False
    bearer: bool = False


NOTHING_MORE: Final = Accepted()


def check_binding(
    cnf: Confirmation | None,
    actor: SpiffeId,
    evidence: PeerEvidence | None,
    *,
    proof: ShownProof | None = None,
    life: tuple[datetime, datetime] | None = None,
    accepted: Accepted = NOTHING_MORE,
) -> BindingMatch:
    """Compare a token's binding with whoever presents it. ``life`` is from the token's ``iat`` to its ``exp``.

    Raises Refused: ``binding_missing`` without evidence, ``binding_mismatch`` for another holder, ``dpop_required`` where a
    key is named and no proof was shown, ``dpop_unexpected`` where a proof was shown and no key is named.
    """
    if cnf is None:
        if not accepted.bearer:
            raise Refused("the token is bound to nobody", code="binding_missing")
        _no_proof(proof)
        return BindingMatch.BEARER
    if cnf.jkt is None:
        _no_proof(proof)
        return _check_certificate(cnf, actor, evidence, life, accepted)
    if proof is None:
        raise Refused(
            "the token is bound to a key, and came without a proof by it",
            code="dpop_required",
            hint="send it as Authorization: DPoP, with a proof (RFC 9449 §7.1)",
        )
    if proof.jkt != cnf.jkt:
        raise _mismatch()
    if cnf.x5t is not None:
        _check_certificate(cnf, actor, evidence, life, accepted)
    return BindingMatch.DPOP


def _check_certificate(
    cnf: Confirmation,
    actor: SpiffeId,
    evidence: PeerEvidence | None,
    life: tuple[datetime, datetime] | None,
    accepted: Accepted,
) -> BindingMatch:
    if evidence is None:
        raise Refused(
            "the token is bound to a certificate, and the connection has none",
            code="binding_missing",
            hint="call over mutual TLS with the SVID that asked for the token",
        )
    # NOTE(security): the ID is asked even where the thumbprint agrees, so that no path skips it.
    if evidence.spiffe_id == actor:
        if evidence.x5t == cnf.x5t:
            return BindingMatch.X5T
        if cnf.session is not None and evidence.session == cnf.session:
            return BindingMatch.SESSION
        if cnf.window and accepted.window and life is not None and _is_within(evidence.not_before, life):
            return BindingMatch.WINDOW
    raise _mismatch()


def _is_within(moment: datetime, life: tuple[datetime, datetime]) -> bool:
    return life[0] - WINDOW_SKEW <= moment <= life[1]


def _no_proof(proof: ShownProof | None) -> None:
    if proof is not None:
        raise Refused(
            "the token is not bound to a key", code="dpop_unexpected", hint="send it as Authorization: Bearer"
        )


def _mismatch() -> Refused:
    return Refused("the token is bound to another holder", code="binding_mismatch")
