"""How a client authenticates at the token endpoint: exactly one way in each request (RFC 6749 §2.3).

An X.509-SVID over mutual TLS; a JWT-SVID as client assertion, only together with a DPoP proof; or, where keys for it are
configured, a WIT with its proof. SVIDs of other trust domains are judged under their own bundles, and let in by name only.
"""

from dataclasses import dataclass, field
from typing import Final

from starlette.requests import Request

from broker.errors import Invalid, InvalidSvid, InvalidToken, Refused
from broker.server.api.http.form import Form
from broker.server.tasks.foreign import ForeignStarters
from broker.server.tasks.proofs import Proofs
from broker.server.tasks.requests import Actor, Door
from broker.spiffe import BundleSet, JwtSvid, SpiffeId, verify_jwt_svid
from broker.tasks import Expected, Resource, ShownProof
from broker.tasks.wit import WitKeys, verify_wit

JWT_SPIFFE: Final = "urn:ietf:params:oauth:client-assertion-type:jwt-spiffe"
DPOP_HEADER: Final = "dpop"
WIT_HEADER: Final = "workload-identity-token"
WPT_HEADER: Final = "workload-proof-token"
PARAMETERS: Final = frozenset({"client_assertion", "client_assertion_type"})
_HOW: Final = "call over mutual TLS with the X.509-SVID of the Workload API, or with a JWT-SVID and a DPoP proof"


@dataclass(frozen=True, slots=True)
class Clients:
    """Who may come, and how: ``wit_keys`` empty takes no WITs; ``proxies`` may forward their clients' certificates."""

    proofs: Proofs
    foreign: ForeignStarters
    wit_keys: WitKeys = field(default_factory=dict)
    proxies: frozenset[SpiffeId] = frozenset()


@dataclass(frozen=True, slots=True)
class Shown:
    """A client without a certificate: who it is, the proof that it holds its key, and the JWT-SVID that said so."""

    actor: Actor
    proof: ShownProof
    assertion: JwtSvid | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What proofs and assertions must be for: this issuer, at its configured address, whatever Host says."""

    issuer: str
    address: Resource
    bundles: BundleSet


def has_wit(request: Request) -> bool:
    """Tell whether a request brings a WIT or its proof."""
    return WIT_HEADER in request.headers or WPT_HEADER in request.headers


def refuse_second(request: Request, form: Form) -> None:
    """Refuse whatever else would say who calls, where a certificate has said it already; raises Invalid."""
    if has_wit(request) or any(form.get(name) is not None for name in PARAMETERS):
        raise Invalid("the client authenticates in more than one way", code="two_authentications")


async def dpop_proof(request: Request, clients: Clients, endpoint: Endpoint) -> ShownProof | None:
    """Verify the request's DPoP proof; None where it has none. Raises InvalidToken, NonceWanted."""
    headers = request.headers.getlist(DPOP_HEADER)
    if not headers:
        return None
    return await clients.proofs.verify(headers, Expected(request.method, endpoint.address))


async def authenticate(request: Request, form: Form, clients: Clients, endpoint: Endpoint) -> Shown:
    """Authenticate a client that showed no certificate; nothing is spent yet.

    Raises Refused(code="invalid_client") without a way or for an unknown client, Invalid for two ways, InvalidToken for a bad
    proof, NonceWanted.
    """
    asserted = any(form.get(name) is not None for name in PARAMETERS)
    if "authorization" in request.headers:
        if asserted or has_wit(request):
            raise Invalid("the client authenticates in more than one way", code="two_authentications")
        raise Refused("no secret and no token authenticates a client here", code="invalid_client", hint=_HOW)
    if has_wit(request):
        if asserted or DPOP_HEADER in request.headers:
            raise Invalid("the client authenticates in more than one way", code="two_authentications")
        return _by_wit(request, clients, endpoint)
    if asserted:
        return await _by_assertion(request, form, clients, endpoint)
    raise Refused(
        "the connection has no client certificate",
        code="invalid_client",
        hint=_HOW,
    )


async def _by_assertion(request: Request, form: Form, clients: Clients, endpoint: Endpoint) -> Shown:
    if form.get("client_assertion_type") != JWT_SPIFFE or form.get("client_assertion") is None:
        raise Refused(
            "the client assertion is not of a kind that is taken", code="invalid_client", hint=f"send a {JWT_SPIFFE}"
        )
    now = clients.proofs.now()
    try:
        svid = verify_jwt_svid(form.require("client_assertion"), endpoint.bundles, audience=endpoint.issuer, now=now)
    except InvalidSvid as error:
        raise Refused(f"the client assertion: {error.message}", code="invalid_client", hint=error.hint) from None
    # NOTE(security): for us alone: one that is for others, too, can be sent here by them (SP06).
    if svid.audience != (endpoint.issuer,):
        raise Refused(
            "the client assertion is not for this issuer alone", code="invalid_client", hint=f"aud is {endpoint.issuer}"
        )
    require_known(svid.id, clients)
    proof = await dpop_proof(request, clients, endpoint)
    if proof is None:
        raise Refused(
            "a JWT-SVID authenticates together with a DPoP proof only",
            code="dpop_missing",
            hint="whoever sees a JWT-SVID could send it: prove a key in the same request (RFC 9449)",
        )
    actor = Actor(svid.id, "", svid.expires_at, Door.HTTPS, jkt=proof.jkt)
    return Shown(actor, proof, svid)


def _by_wit(request: Request, clients: Clients, endpoint: Endpoint) -> Shown:
    wits, wpts = request.headers.getlist(WIT_HEADER), request.headers.getlist(WPT_HEADER)
    if not clients.wit_keys:
        raise Refused(
            "workload identity tokens are not taken here",
            code="invalid_client",
            hint="an operator turns them on with [[server.tasks.wit_issuers]]",
        )
    if len(wits) != 1 or len(wpts) != 1:
        raise InvalidToken("there is not exactly one WIT with one proof", code="invalid_wit")
    found = verify_wit(wits[0], wpts[0], clients.wit_keys, address=endpoint.address, now=clients.proofs.now())
    require_known(found.id, clients)
    return Shown(Actor(found.id, "", found.expires_at, Door.HTTPS, jkt=found.proof.jkt), found.proof)


def require_known(spiffe_id: SpiffeId, clients: Clients) -> None:
    """Refuse a workload of another trust domain that is not named; raises Refused(code="invalid_client")."""
    if clients.foreign.is_foreign(spiffe_id) and not clients.foreign.permits(spiffe_id):
        raise Refused(
            "the caller is of another trust domain",
            code="invalid_client",
            hint="an operator names it in foreign_starters under [server.tasks]",
        )
