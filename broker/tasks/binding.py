"""The binding of a token to its holder: what ``cnf`` says, and whether a connection's peer satisfies it (RFC 8705 §3).

Responsible for the comparison only. What the peer is must have been verified before: evidence comes from a verified
SVID and from nothing else. Whether a workload session lives is told by the feed, not known here.
"""

from dataclasses import InitVar, dataclass
from enum import StrEnum
from typing import Final, Self

from broker.errors import Invalid, InvalidToken, Refused
from broker.spiffe import SpiffeId
from broker.spiffe.strictjson import JsonValue
from broker.spiffe.x509svid import X509Svid
from broker.tasks.texts import THUMBPRINT, check_id

_SEAL: Final = object()
_MEMBERS: Final = frozenset({"x5t#S256", "spiffe_session", "jkt"})


@dataclass(frozen=True, slots=True)
class Confirmation:
    """The claim ``cnf``: the holder's certificate, and besides it the workload session and a DPoP key; raises Invalid."""

    x5t: str
    session: str | None = None
    jkt: str | None = None

    def __post_init__(self) -> None:
        if THUMBPRINT.fullmatch(self.x5t) is None or (self.jkt is not None and THUMBPRINT.fullmatch(self.jkt) is None):
            raise Invalid("a thumbprint is not a SHA-256 hash in base64url", code="invalid_confirmation")
        if self.session is not None:
            check_id(self.session, "workload session id")

    def to_json(self) -> dict[str, JsonValue]:
        """Give the members that are present."""
        value: dict[str, JsonValue] = {"x5t#S256": self.x5t}
        if self.session is not None:
            value["spiffe_session"] = self.session
        if self.jkt is not None:
            value["jkt"] = self.jkt
        return value

    @classmethod
    def parse(cls, value: JsonValue) -> Self:
        """Read a ``cnf``: a bearer token, or a member that is not known, is InvalidToken."""
        if not isinstance(value, dict) or "x5t#S256" not in value or not value.keys() <= _MEMBERS:
            raise InvalidToken("the claim cnf is missing, or has members that are not known", code="token_cnf")
        x5t = value["x5t#S256"]
        session, jkt = value.get("spiffe_session", ""), value.get("jkt", "")
        if not (isinstance(x5t, str) and isinstance(session, str) and isinstance(jkt, str)):
            raise InvalidToken("a member of the claim cnf is not text", code="token_cnf")
        try:
            # Absent is None; present and empty is refused by the checks above.
            return cls(x5t, session if "spiffe_session" in value else None, jkt if "jkt" in value else None)
        except Invalid as error:
            raise InvalidToken(f"the claim cnf: {error.message}", code="token_cnf") from None


@dataclass(frozen=True, slots=True)
class PeerEvidence:
    """Who is at the other end of this connection. Only :meth:`from_svid` makes one."""

    spiffe_id: SpiffeId
    x5t: str
    session: str | None
    seal: InitVar[object]

    def __post_init__(self, seal: object) -> None:
        if seal is not _SEAL:
            raise TypeError("PeerEvidence comes from a verified SVID only")

    @classmethod
    def from_svid(cls, svid: X509Svid, session: str | None = None) -> Self:
        """Take the evidence of a verified SVID; ``session`` only when the live feed named it for this very leaf."""
        return cls(svid.id, svid.x5t, session, _SEAL)


class BindingMatch(StrEnum):
    """By which member of ``cnf`` the peer was recognised."""

    X5T = "x5t"
    SESSION = "session"


def check_binding(cnf: Confirmation, actor: SpiffeId, evidence: PeerEvidence | None) -> BindingMatch:
    """Compare a token's binding with the peer that presents it.

    Raises Refused: ``binding_missing`` without evidence, ``binding_mismatch`` for another peer.
    """
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
    raise Refused("the token is bound to another holder", code="binding_mismatch")
