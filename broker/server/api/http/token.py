"""``POST /token``: the exchange over HTTPS (RFC 8693), by the X.509-SVID of the connection (RFC 8705 §2) or with a proof.

Reads the form into a request and writes the answer; what is granted is the exchange's. Two parameters are ours: ``task``
asks for another token of a running task, ``purpose`` says what a new one is for, and ``token_binding=bearer`` asks for a token
that is bound to nobody. A token of another format than the task token is asked for by ``requested_token_type`` and read in
``token_formats``.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from broker.audit.events import Event
from broker.errors import BrokerError, Invalid, InvalidSvid
from broker.server.api.http import shapes
from broker.server.api.http.clients import JWT_SPIFFE, PARAMETERS, Endpoint, authenticate, dpop_proof, refuse_second
from broker.server.api.http.description import Answer, Operation, Parameter, Schema, Vocabulary, described
from broker.server.api.http.errors import DPOP_NONCE, NO_STORE
from broker.server.api.http.form import Form, read_form
from broker.server.api.http.peers import CLIENT_AUTHENTICATION, actor_of, check_client, idempotency_key, presented
from broker.server.api.http.services import HttpServices
from broker.server.api.http.token_formats import (
    ACCESS_TOKEN,
    DELEGATION,
    GRANT_TYPE,
    ID_JAG,
    JWT,
    SUBJECT_KINDS,
    TOKEN_TYPES,
    TXN_TOKEN,
    assertion_answer,
    read_assertion,
    require_only,
)
from broker.server.tasks.config import MAX_TOKEN_TTL
from broker.server.tasks.requests import Actor, IssuedToken, IssueRequest, StartRequest, check_scope
from broker.server.tasks.subjects import SubjectKind
from broker.spiffe import verify_jwt_svid
from broker.spiffe.strictjson import JsonValue
from broker.tasks import Authority, Resource, ShownProof
from broker.tasks.dpop import ALGORITHM as PROOF_ALGORITHM
from broker.tasks.verify import ALGORITHM

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
        "parameter_digest",
        "request_context",
        "request_details",
    }
    | PARAMETERS
)
# Other grants' own are read, so that who asks for one is told that it is not among ours (RFC 6749 §5.2); nothing looks at them.
_READ: Final = _ALLOWED | {"assertion", "code", "device_code", "password", "refresh_token", "username"}
_WRITER: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_OF_TASK_TOKENS: Final = _ALLOWED - {"request_context", "request_details"}
_REPEATABLE: Final = frozenset({"resource", "audience"})


@dataclass(frozen=True, slots=True)
class _Asked:
    """A form, read: a new task with its first token, or another token of a running one."""

    start: StartRequest | None
    issue: IssueRequest
    issued_type: str


_DETAILS: Final[Schema] = {"type": "string", "contentMediaType": "application/json"}
_OPERATION: Final = Operation(
    "exchange_token",
    "Exchange a user's word for a token of one task, or a task token for a token of another format (RFC 8693).",
    vocabulary=Vocabulary.OAUTH,
    form=(
        Parameter("grant_type", "token exchange", {"const": GRANT_TYPE}, required=True),
        Parameter(
            "subject_token", "the user's token, a task or transaction token, or a delegation's id", required=True
        ),
        Parameter(
            "subject_token_type", "what it is", {"enum": sorted({*SUBJECT_KINDS, TXN_TOKEN, DELEGATION})}, required=True
        ),
        Parameter("requested_token_type", "default: a task token", {"enum": [ACCESS_TOKEN, JWT, TXN_TOKEN, ID_JAG]}),
        Parameter("resource", "the service (RFC 8707)", repeats=True),
        Parameter("audience", "the service, the trust domain, or a remote server's issuer", repeats=True),
        Parameter("scope", "actions"),
        Parameter("authorization_details", "what it may do (RFC 9396), as JSON", _DETAILS),
        Parameter("actor_token", "the caller's own JWT-SVID for this issuer; not needed"),
        Parameter("actor_token_type", "with actor_token", {"const": JWT}),
        Parameter("client_id", "the SPIFFE ID of the connection; not needed"),
        Parameter("task", "another token of this running task"),
        Parameter("purpose", "what a new task is for, in a sentence"),
        Parameter("token_binding", "ask for a token that is bound to nobody", {"const": "bearer"}),
        Parameter("parameter_digest", "ask for a token for one use, for the call whose parameters have this hash"),
        Parameter("client_assertion", "a JWT-SVID for this issuer alone, with a DPoP proof, instead of a certificate"),
        Parameter("client_assertion_type", "with client_assertion", {"const": JWT_SPIFFE}),
        Parameter("request_context", "rctx of a transaction token, as JSON", _DETAILS),
        Parameter("request_details", "tctx of a transaction token, as JSON", _DETAILS),
    ),
    headers=(
        Parameter("Idempotency-Key", "the same request under the same key gives the same token"),
        Parameter(
            "DPoP", "a proof of the key that the token is to be bound to, with a nonce of this server (RFC 9449)"
        ),
        Parameter("Workload-Identity-Token", "instead of a certificate, where the metadata name spiffe_wit"),
        Parameter("Workload-Proof-Token", "with Workload-Identity-Token: the proof of its key"),
    ),
    answers={200: Answer("a token", {"application/json": shapes.TOKEN})},
    # By client_assertion or Workload-Identity-Token, which OpenAPI has no scheme for.
    known_by=("",),
)


@described(_OPERATION)
async def token(request: Request, services: HttpServices) -> Response:
    """Exchange a user's token for a task token."""
    actor, form, proof = await _client(request, services)
    async with services.refusals.recorded(Event.TOKEN_REFUSED, actor, ""):
        _check_grant_type(form)
        check_client(form, actor.spiffe_id)
        key = idempotency_key(request)
        other = read_assertion(form, key, services.assertions.remotes)
        asked = _read(form, actor, key, services, "" if proof is None else proof.jkt) if other is None else None
    if other is not None:
        return await _with_nonce(assertion_answer(await services.assertions.issue(actor, other)), proof, services)
    assert asked is not None
    try:
        if asked.start is None:
            issued = await services.exchange.issue(actor, asked.issue)
        else:
            issued = await services.exchange.start_and_issue(actor, asked.start, asked.issue)
    except BrokerError as error:
        if error.reason == "invalid_authorization_details" and form.get("authorization_details") is None:
            raise _too_wide() from None
        raise
    return await _with_nonce(_answer(issued, asked.issued_type), proof, services)


async def _with_nonce(answer: Response, proof: ShownProof | None, services: HttpServices) -> Response:
    """Give whoever came with a proof the nonce for the next one (RFC 9449 §8.2)."""
    if proof is not None:
        answer.headers[DPOP_NONCE] = await services.clients.proofs.nonce()
    return answer


async def _client(request: Request, services: HttpServices) -> tuple[Actor, Form, ShownProof | None]:
    """Say who calls, and read its form; a proof that came with it is used up. Every refusal is recorded."""
    async with services.refusals.recorded_stranger(Event.TOKEN_REFUSED):
        actor = None if presented(request, services) is None else actor_of(request, services)
    if actor is not None:
        async with services.refusals.recorded(Event.TOKEN_REFUSED, actor, ""):
            form = await read_form(request, allowed=_READ, repeatable=_REPEATABLE)
            refuse_second(request, form)
            proof = await dpop_proof(request, services.clients, _endpoint(services))
            if proof is not None:
                await services.clients.proofs.spend(proof)
                # It has shown the key beside its certificate: what is bound to that key is in its hands.
                actor = replace(actor, jkt=proof.jkt)
            return actor, form, proof
    async with services.refusals.recorded_stranger(Event.TOKEN_REFUSED):
        form = await read_form(request, allowed=_READ, repeatable=_REPEATABLE)
        shown = await authenticate(request, form, services.clients, _endpoint(services))
    async with services.refusals.recorded(Event.TOKEN_REFUSED, shown.actor, ""):
        await services.clients.proofs.spend(shown.proof, shown.assertion)
    return shown.actor, form, shown.proof


def _endpoint(services: HttpServices) -> Endpoint:
    return Endpoint(services.issuer, Resource(f"{services.issuer}/token"), services.bundles())


def _read(form: Form, actor: Actor, key: str, services: HttpServices, jkt: str) -> _Asked:
    require_only(form, _OF_TASK_TOKENS)
    subject_token = form.require("subject_token")
    sent_kind = form.require("subject_token_type")
    kind = SubjectKind.ANY if sent_kind == DELEGATION else SUBJECT_KINDS.get(sent_kind)
    user_token, delegation_id = ("", subject_token) if sent_kind == DELEGATION else (subject_token, "")
    if kind is None:
        raise Invalid("the subject token's type is not accepted", code="subject_token_type")
    issued_type = form.get("requested_token_type") or ACCESS_TOKEN
    if issued_type not in (ACCESS_TOKEN, JWT):
        raise Invalid("the requested token type is not issued here", code="requested_token_type")
    _check_actor_token(form, actor, services)
    if form.get("actor_token") is None and services.exchange.names_actor(subject_token):
        # NOTE(security): judged by content. A token that names its actor is exchanged by that actor's own word (TX03).
        raise Invalid(
            "the subject token names its actor in may_act, and no actor token was sent",
            code="actor_token_required",
            hint="send your JWT-SVID for this issuer as actor_token",
        )
    resource = _target(form)
    scope = form.get("scope") or ""
    check_scope(scope)
    bearer = _wants_bearer(form)
    jkt = "" if bearer else jkt
    details = form.get("authorization_details")
    authority = None if details is None else Authority.parse(details)
    task_id = form.get("task")
    if task_id is not None or services.exchange.is_own(subject_token):
        # A token of ours leads to the task behind it, or to one below: never to a new chain.
        if form.get("purpose") is not None:
            raise Invalid("the purpose of a running task cannot be changed", code="purpose_fixed")
        issue = IssueRequest(
            resource,
            task_id or "",
            scope,
            authority,
            user_token=user_token,
            kind=kind,
            idempotency_key=key,
            delegation_id=delegation_id,
            jkt=jkt,
            bearer=bearer,
            parameter_digest=form.get("parameter_digest") or "",
        )
        return _Asked(None, issue, issued_type)
    start = StartRequest(
        user_token,
        form.get("purpose") or f"access to {resource.text}"[:1024],
        _authority(resource, scope) if authority is None else authority,
        kind=kind,
        idempotency_key=key,
        delegation_id=delegation_id,
    )
    digest = form.get("parameter_digest") or ""
    issue = IssueRequest(resource, scope=scope, jkt=jkt, bearer=bearer, parameter_digest=digest)
    return _Asked(start, issue, issued_type)


def _wants_bearer(form: Form) -> bool:
    wanted = form.get("token_binding")
    if wanted not in (None, "bearer"):
        raise Invalid("the token binding is not known", code="invalid_binding", hint="bearer, or leave it out")
    return wanted is not None


def offered(services: HttpServices) -> Mapping[str, JsonValue]:
    """Give what the metadata says of this endpoint (RFC 8414 §2, RFC 8705 §3.3, RFC 9396 §10)."""
    formats = [ACCESS_TOKEN, JWT]
    if any(audience.transactions for audience in services.audiences):
        formats.append(TXN_TOKEN)
    outward = sorted({TOKEN_TYPES + one.value for server in services.assertions.remotes for one in server.formats})
    members: dict[str, JsonValue] = {
        "token_endpoint": f"{services.issuer}/token",
        "grant_types_supported": [GRANT_TYPE],
        # A JWT-SVID with a DPoP proof authenticates here alone, a WIT where keys for it are configured.
        "token_endpoint_auth_methods_supported": [
            *CLIENT_AUTHENTICATION,
            "spiffe_jwt",
            *(["spiffe_wit"] if services.clients.wit_keys else []),
        ],
        "dpop_signing_alg_values_supported": [PROOF_ALGORITHM],
        "tls_client_certificate_bound_access_tokens": True,
        "authorization_details_types_supported": [*sorted(services.detail_types.names)],
        # Ours: what may be asked for, how tokens are signed, and how long the longest lives.
        "requested_token_types_supported": [*formats, *(one for one in outward if one not in formats)],
        "access_token_signing_alg_values_supported": [ALGORITHM],
        "access_token_max_seconds": MAX_TOKEN_TTL,
        "delegations_endpoint": f"{services.issuer}/delegations",
        "backchannel_logout_uri": f"{services.issuer}/backchannel-logout",
        "security_events_endpoint": f"{services.issuer}/ssf/events",
    }
    if outward:
        # draft-ietf-oauth-identity-chaining, "Authorization Server Metadata".
        members["identity_chaining_requested_token_types_supported"] = list(outward)
    return members


def _check_grant_type(form: Form) -> None:
    if form.require("grant_type") != GRANT_TYPE:
        raise Invalid("the grant type is not token-exchange", code="unsupported_grant_type")


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
    # For us alone, as a client assertion (SP06).
    if svid.id != actor.spiffe_id or svid.audience != (services.issuer,):
        raise Invalid("the actor token is not the caller's own for this issuer alone", code="actor_token")


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


def _too_wide() -> Invalid:
    """Say in the words of the parameter that was sent what the details that stand for it would be refused for."""
    return Invalid(
        "the scope goes beyond what may be given for this resource",
        code="invalid_scope",
        hint="ask for actions that are registered, and inside those of the user's token",
    )


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
    return Response(_WRITER.encode(body), headers=NO_STORE, media_type="application/json")
