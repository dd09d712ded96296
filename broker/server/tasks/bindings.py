"""What a token is bound to: the certificate, the session or the key of whoever asks, as far as its audience takes it.

Pure. The strongest that fits wins; less is given only where the audience was configured so, and bound to nobody only where
server, audience and caller all say so (RFC 8705 §3, RFC 9449 §5).
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from broker.errors import PolicyDenied
from broker.server.tasks.admission import Admitted
from broker.server.tasks.config import MAX_BEARER_TTL, MAX_TOKEN_TTL, Audience
from broker.server.tasks.requests import IssueRequest
from broker.tasks import Confirmation

_CERTIFICATE: Final = frozenset({"x5t", "session", "window"})


@dataclass(frozen=True, slots=True)
class Bound:
    """A token's ``cnf``, None for a bearer's; whether it ends with the SVID that asked; and how long it may live."""

    cnf: Confirmation | None
    ends_with_svid: bool
    longest: timedelta = timedelta(seconds=MAX_TOKEN_TTL)


def bind(audience: Audience, admitted: Admitted, request: IssueRequest, *, allow_bearer: bool) -> Bound:
    """Decide what a token is bound to; raises PolicyDenied where the audience takes nothing that the caller has."""
    actor, session = admitted.actor, admitted.session
    if request.bearer:
        return _bearer(audience, allow_bearer=allow_bearer)
    if request.jkt:
        if "dpop" not in audience.binding:
            raise PolicyDenied(
                "the resource takes no tokens that are bound to a key",
                code="dpop_not_accepted",
                hint="ask over mutual TLS and without a DPoP proof; an operator sets the binding of an audience",
            )
        # The session says when the process is gone; to hold the token its key is needed, whatever the certificate.
        return Bound(Confirmation(session=session, jkt=request.jkt), ends_with_svid=session is None)
    if not actor.x5t or not audience.binding & _CERTIFICATE:
        raise PolicyDenied(
            "the resource takes tokens that are bound to a key only", code="dpop_required", hint="send a DPoP proof"
        )
    if session is not None and audience.session_bound:
        return Bound(Confirmation(actor.x5t, session), ends_with_svid=False)
    if session is None and "window" in audience.binding:
        return Bound(Confirmation(actor.x5t, window=True), ends_with_svid=False)
    # Bound to this certificate alone: beyond its end nobody can use the token.
    return Bound(Confirmation(actor.x5t), ends_with_svid=True)


def token_type(cnf: Confirmation | None) -> str:
    """Give how a token is sent (RFC 9449 §5): one that is bound to a key never as ``Bearer``."""
    return "DPoP" if cnf is not None and cnf.jkt is not None else "Bearer"


def _bearer(audience: Audience, *, allow_bearer: bool) -> Bound:
    if not allow_bearer or not audience.takes_bearer:
        raise PolicyDenied(
            "tokens that are bound to nobody are not issued for this resource",
            code="bearer_not_allowed",
            hint='an operator sets allow_bearer under [server.tasks] and "bearer" in the binding of the audience',
        )
    return Bound(None, ends_with_svid=True, longest=timedelta(seconds=MAX_BEARER_TTL))
