"""``POST /revoke``: a workload gives one of its own tokens back (RFC 7009).

The answer is 200 for every token, also one that is unknown, dead or another's: it tells nothing. One parameter is ours: ``end`` with
the value ``task`` ends the token's task as well, where it is the caller's own, also by a token that has expired: tasks live longer.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from broker.audit.events import Event
from broker.errors import Invalid
from broker.server.api.http.description import Answer, Operation, Parameter, Vocabulary, described
from broker.server.api.http.errors import NO_STORE
from broker.server.api.http.form import read_form
from broker.server.api.http.peers import CLIENT_AUTHENTICATION, check_client, known_actor
from broker.server.api.http.services import HttpServices
from broker.server.tasks.requests import Actor
from broker.spiffe import jose
from broker.spiffe.strictjson import JsonValue
from broker.tasks.grants import HEADER_TYPES
from broker.tasks.transactions import verify_transaction

ALLOWED: Final = frozenset({"token", "token_type_hint", "client_id", "end"})
ENDS: Final = ("token", "task")
"""What may end: the token alone, which is the default, or its task with everything below it."""

_OPERATION: Final = Operation(
    "revoke_token",
    "Give a token back (RFC 7009), or its whole task.",
    vocabulary=Vocabulary.OAUTH,
    form=(
        Parameter("token", "the token", required=True),
        Parameter("token_type_hint", "what it may be; not needed"),
        Parameter("client_id", "the SPIFFE ID of the connection; not needed"),
        Parameter("end", "what ends: the token, or its task too", {"enum": list(ENDS)}),
    ),
    answers={200: Answer("it is not in use any more, or never was the caller's")},
)


@described(_OPERATION)
async def revoke(request: Request, services: HttpServices) -> Response:
    """End a token of the caller's own."""
    actor = await known_actor(request, services, Event.TOKEN_REFUSED)
    async with services.refusals.recorded(Event.TOKEN_REFUSED, actor, ""):
        form = await read_form(request, allowed=ALLOWED)
        check_client(form, actor.spiffe_id)
        token, ending = form.require("token"), form.get("end") or ENDS[0]
        if ending not in ENDS:
            raise Invalid("end is not token or task", code="invalid_end")
        jti = _jti_of(token, actor, services, _moment(token, ending, services))
    if jti is not None:
        with_task = actor if ending == "task" else None
        await services.lifecycle.revoke_token(jti, owner=actor.spiffe_id, ending=with_task)
    return Response(status_code=200, headers=NO_STORE)


def offered(services: HttpServices) -> Mapping[str, JsonValue]:
    """Give what the metadata says of this endpoint (RFC 8414 §2)."""
    return {
        "revocation_endpoint": f"{services.issuer}/revoke",
        "revocation_endpoint_auth_methods_supported": list(CLIENT_AUTHENTICATION),
        "revocation_end_values_supported": list(ENDS),
    }


def _moment(token: str, ending: str, services: HttpServices) -> datetime:
    """Give when the token must be good: now; where its task is to end, when it was issued."""
    now = services.clock.now()
    if ending != "task":
        return now
    try:
        issued_at = jose.numeric_date(jose.parse_compact(token).payload, "iat", required=True)
    except Invalid:
        return now
    return min(now, datetime.fromtimestamp(issued_at, UTC))


def _jti_of(token: str, actor: Actor, services: HttpServices, at: datetime) -> str | None:
    """Give the id of a token of ours that may be the caller's, None of anything else; raises Invalid for a grant of ours."""
    try:
        claims = services.tokens.verify(token, at=at)
    except Invalid:
        pass
    else:
        if claims.client_id != actor.spiffe_id:
            services.refusals.prying(Event.TOKEN_REFUSED, actor, claims)
        return claims.jti
    try:
        keys = services.keys.task_keys()
        verified = verify_transaction(token, keys, issuer=services.issuer, trust_domain=services.trust_domain, now=at)
    except Invalid:
        _refuse_grant(token, services)
        return None
    return verified.claims.jti


def _refuse_grant(token: str, services: HttpServices) -> None:
    """Refuse a grant that we signed: it is in another server's hands, and a 200 would be a lie (RFC 7009 §2.2.1)."""
    try:
        jws = jose.parse_compact(token)
    except Invalid:
        return
    key = services.keys.task_keys().get(jws.kid or "")
    if key is None or jws.typ not in HEADER_TYPES.values():
        return
    try:
        jose.verify_signature(jws, key, "ES256")
    except Invalid:
        return
    raise Invalid(
        "a grant for another server cannot be taken back",
        code="unsupported_token_type",
        hint="it ends within minutes by itself; end the task, so that none follows",
    )
