"""Who is on the other end of this request: the X.509-SVID of the TLS connection, and nothing that the request says.

No header is looked at, except where the connection's own SVID is a pinned proxy's: it speaks of the client behind it.
"""

from typing import Final

from starlette.requests import Request

from broker.audit.events import Event
from broker.errors import Invalid, Refused
from broker.server.api.http.clients import require_known
from broker.server.api.http.form import Form
from broker.server.api.http.forwarded import forwarded_svid
from broker.server.api.http.services import HttpServices
from broker.server.tasks.requests import Actor, Door, check_key
from broker.spiffe import SpiffeId, X509Svid
from broker.transport.http import PEER_EXTENSION
from broker.transport.tls import SvidPeer

IDEMPOTENCY_KEY = "idempotency-key"
CLIENT_AUTHENTICATION: Final = ("spiffe_x509", "tls_client_auth")
"""The draft's name for an X.509-SVID over mutual TLS, and the registered one for mutual TLS (RFC 8705 §2.1)."""


def presented(request: Request, services: HttpServices) -> X509Svid | None:
    """Give the verified SVID of the connection, or of the client behind a pinned proxy; None where there is none.

    Raises Invalid, InvalidSvid for what a proxy forwards.
    """
    peer = request.scope.get("extensions", {}).get(PEER_EXTENSION)
    if not isinstance(peer, SvidPeer):
        return None
    # NOTE(security): what a proxy forwards is judged like a handshake of our own; from anybody else it is not read.
    if peer.svid.id in services.clients.proxies:
        return forwarded_svid(request, services.bundles(), services.clock.now())
    return peer.svid


def svid_of(request: Request, services: HttpServices) -> X509Svid:
    """Give the verified SVID of the connection (RFC 8705 §2), one of our own trust domain or of a foreign workload that is named.

    Raises Refused(code="invalid_client") without one, and for another of another trust domain: it is who it says it is, and
    has no business here.
    """
    svid = presented(request, services)
    if svid is None:
        raise Refused(
            "the connection has no client certificate",
            code="invalid_client",
            hint="call over mutual TLS with the X.509-SVID of the Workload API",
        )
    if "authorization" in request.headers:
        # RFC 6749 §2.3: one way to authenticate in one request.
        raise Invalid("the client authenticates by its certificate, and by nothing else", code="two_authentications")
    require_known(svid.id, services.clients)
    return svid


def actor_of(request: Request, services: HttpServices) -> Actor:
    """Give the workload that calls; raises Refused(code="invalid_client"), Invalid."""
    svid = svid_of(request, services)
    return Actor(spiffe_id=svid.id, x5t=svid.x5t, not_after=svid.not_after, door=Door.HTTPS, serial=f"{svid.serial:x}")


async def known_actor(request: Request, services: HttpServices, event: Event) -> Actor:
    """Give the workload that calls, as :func:`actor_of`; that nobody is known to call is recorded as ``event``."""
    async with services.refusals.recorded_stranger(event):
        return actor_of(request, services)


def check_client(form: Form, spiffe_id: SpiffeId) -> None:
    """Refuse a ``client_id`` that is not the certificate's (RFC 8705 §2); it may be left out, for the certificate says it."""
    client_id = form.get("client_id")
    if client_id is not None and client_id != str(spiffe_id):
        raise Invalid("client_id is not the SPIFFE ID of the connection", code="client_mismatch")


def idempotency_key(request: Request) -> str:
    """Give the request's idempotency key, empty when there is none; raises Invalid for two of them."""
    keys = request.headers.getlist(IDEMPOTENCY_KEY)
    if len(keys) > 1:
        raise Invalid("the idempotency key was sent more than once", code="invalid_idempotency_key")
    if keys and not keys[0]:
        raise Invalid("the idempotency key is empty", code="invalid_idempotency_key")
    key = keys[0] if keys else ""
    check_key(key)
    return key
