"""``POST /token``: the exchange over HTTPS (RFC 8693), by the X.509-SVID of the connection (RFC 8705 §2) or with a proof.

Reads the form into a request and writes the answer; what is granted is the exchange's. Two parameters are ours: ``task``
asks for another token of a running task, ``purpose`` says what a new one is for, and ``token_binding=bearer`` asks for a token
that is bound to nobody.
"""

from dataclasses import dataclass
from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from broker.audit.events import Event
from broker.errors import Invalid, InvalidSvid
from broker.server.api.http.clients import PARAMETERS, Endpoint, authenticate, dpop_proof, refuse_second
from broker.server.api.http.errors import DPOP_NONCE, NO_STORE
from broker.server.api.http.form import Form, read_form
from broker.server.api.http.peers import actor_of, idempotency_key, presented
from broker.server.api.http.services import HttpServices
from broker.server.tasks.requests import Actor, IssuedToken, IssueRequest, StartRequest, check_scope
from broker.server.tasks.subjects import SubjectKind
from broker.spiffe import verify_jwt_svid
from broker.tasks import Authority, Resource, ShownProof

GRANT_TYPE: Final = "urn:ietf:params:oauth:grant-type:token-exchange"
TOKEN_TYPES: Final = "urn:ietf:params:oauth:token-type:"  # noqa: S105 - a namespace of the standard
ACCESS_TOKEN: Final = TOKEN_TYPES + "access_token"
JWT: Final = TOKEN_TYPES + "jwt"

_ALLOWED: Final = frozenset(
    {
        "grant_type",
        "resource",
        "audience",
        "scope",
        "requested_token_type",
        "subject_token",
        "subject_token_type",
        "actor_token",
        "actor_token_type",
        "authorization_details",
        "client_id",
        "task",
        "purpose",
        "token_binding",
    }
    | PARAMETERS
)
_REPEATABLE: Final = frozenset({"resource", "audience"})
_SUBJECT_KINDS: Final = {TOKEN_TYPES + kind.value: kind for kind in SubjectKind}


@dataclass(frozen=True, slots=True)
class _Asked:
    """A form, read: a new task with its first token, or another token of a running one."""

    start: StartRequest | None
    issue: IssueRequest
    issued_type: str


async def token(request: Request, services: HttpServices) -> Response:
    """Exchange a user's token for a task token."""
    actor, form, proof = await _client(request, services)
    async with services.refusals.recorded(Event.TOKEN_REFUSED, actor, ""):
        asked = _read(form, actor, idempotency_key(request), services, "" if proof is None else proof.jkt)
    if asked.start is None:
        issued = await services.exchange.issue(actor, asked.issue)
    else:
        issued = await services.exchange.start_and_issue(actor, asked.start, asked.issue)
    answer = _answer(issued, asked.issued_type)
    if proof is not None:
        answer.headers[DPOP_NONCE] = await services.clients.proofs.nonce()
    return answer


async def _client(request: Request, services: HttpServices) -> tuple[Actor, Form, ShownProof | None]:
    """Say who calls, and read its form; a proof that came with it is used up. Every refusal is recorded."""
    async with services.refusals.recorded_stranger(Event.TOKEN_REFUSED):
        by_certificate = presented(request, services) is not None or "authorization" in request.headers
        actor = actor_of(request, services) if by_certificate else None
    if actor is not None:
        async with services.refusals.recorded(Event.TOKEN_REFUSED, actor, ""):
            form = await read_form(request, allowed=_ALLOWED, repeatable=_REPEATABLE)
            refuse_second(request, form)
            proof = await dpop_proof(request, services.clients, _endpoint(services))
            if proof is not None:
                await services.clients.proofs.spend(proof)
            return actor, form, proof
    async with services.refusals.recorded_stranger(Event.TOKEN_REFUSED):
        form = await read_form(request, allowed=_ALLOWED, repeatable=_REPEATABLE)
        shown = await authenticate(request, form, services.clients, _endpoint(services))
    async with services.refusals.recorded(Event.TOKEN_REFUSED, shown.actor, ""):
        await services.clients.proofs.spend(shown.proof, shown.assertion)
    return shown.actor, form, shown.proof


def _endpoint(services: HttpServices) -> Endpoint:
    return Endpoint(services.issuer, Resource(f"{services.issuer}/token"), services.bundles())


def _read(form: Form, actor: Actor, key: str, services: HttpServices, jkt: str) -> _Asked:
    if form.require("grant_type") != GRANT_TYPE:
        raise Invalid("the grant type is not token-exchange", code="unsupported_grant_type")
    _check_client(form, actor)
    subject_token = form.require("subject_token")
    kind = _SUBJECT_KINDS.get(form.require("subject_token_type"))
    if kind is None:
        raise Invalid("the subject token's type is not accepted", code="subject_token_type")
    issued_type = form.get("requested_token_type") or ACCESS_TOKEN
    if issued_type not in (ACCESS_TOKEN, JWT):
        raise Invalid("the requested token type is not issued here", code="requested_token_type")
    _check_actor_token(form, actor, services)
    resource = _target(form)
    scope = form.get("scope") or ""
    check_scope(scope)
    bearer = _wants_bearer(form)
    jkt = "" if bearer else jkt
    details = form.get("authorization_details")
    authority = None if details is None else Authority.parse(details)
    task_id = form.get("task")
    if task_id is not None:
        if form.get("purpose") is not None:
            raise Invalid("the purpose of a running task cannot be changed", code="purpose_fixed")
        issue = IssueRequest(
            resource,
            task_id,
            scope,
            authority,
            user_token=subject_token,
            kind=kind,
            idempotency_key=key,
            jkt=jkt,
            bearer=bearer,
        )
        return _Asked(None, issue, issued_type)
    start = StartRequest(
        subject_token,
        form.get("purpose") or f"access to {resource.text}"[:1024],
        _authority(resource, scope) if authority is None else authority,
        kind=kind,
        idempotency_key=key,
    )
    return _Asked(start, IssueRequest(resource, scope=scope, jkt=jkt, bearer=bearer), issued_type)


def _wants_bearer(form: Form) -> bool:
    wanted = form.get("token_binding")
    if wanted not in (None, "bearer"):
        raise Invalid("the token binding is not known", code="invalid_binding", hint="bearer, or leave it out")
    return wanted is not None


def _check_client(form: Form, actor: Actor) -> None:
    client_id = form.get("client_id")
    if client_id is not None and client_id != str(actor.spiffe_id):
        raise Invalid("client_id is not the SPIFFE ID of the connection", code="client_mismatch")


def _check_actor_token(form: Form, actor: Actor, services: HttpServices) -> None:
    """Refuse an actor token that is anything but the caller's own JWT-SVID for us (RFC 8693 §2.1)."""
    sent, kind = form.get("actor_token"), form.get("actor_token_type")
    if (sent is None) != (kind is None):
        raise Invalid("actor_token and actor_token_type come together", code="actor_token")
    if sent is None:
        return
    if kind != JWT:
        raise Invalid("the actor token's type is not accepted", code="actor_token", hint="send a JWT-SVID, or none")
    try:
        svid = verify_jwt_svid(sent, services.bundles(), audience=services.issuer, now=services.clock.now())
    except InvalidSvid:
        raise Invalid("the actor token is not a valid JWT-SVID for this issuer", code="actor_token") from None
    if svid.id != actor.spiffe_id:
        raise Invalid("the actor token is not the caller's own", code="actor_token")


def _target(form: Form) -> Resource:
    """Give the one resource that is asked for, by whatever name (RFC 8707 §2)."""
    targets = {Resource(text) for text in (*form.all("resource"), *form.all("audience"))}
    if len(targets) != 1:
        raise Invalid(
            "a token is for exactly one resource",
            code="invalid_target",
            hint="send resource once; for another resource ask again",
        )
    return targets.pop()


def _authority(resource: Resource, scope: str) -> Authority:
    if not scope:
        # NOTE(security): a scope that is not there is not one without bounds (TX10).
        raise Invalid(
            "neither scope nor authorization_details say what the token is for",
            code="invalid_scope",
            hint="name the actions",
        )
    try:
        return Authority.parse([{"type": "api", "locations": [resource.text], "actions": list(scope.split(" "))}])
    except Invalid as error:
        raise Invalid(error.message, code="invalid_scope", hint=error.hint) from None


def _answer(issued: IssuedToken, issued_type: str) -> Response:
    body = {
        "access_token": issued.access_token,
        "issued_token_type": issued_type,
        "token_type": issued.token_type,
        "expires_in": int((issued.expires_at - issued.issued_at).total_seconds()),
        "scope": issued.scope,
        "authorization_details": issued.authority.to_json(),
        "task": issued.task_id,
    }
    return JSONResponse(body, headers=NO_STORE)
