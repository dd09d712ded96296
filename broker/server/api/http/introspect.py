"""``POST /introspect``: is this token alive (RFC 7662), for those who may know.

Who may not know, and whoever asks about a token that is dead, foreign or unknown, gets the same ``{"active": false}``. Whoever accepts
``application/token-introspection+jwt`` gets the answer signed, for itself (RFC 9701), the inactive one too.
"""

from collections.abc import Mapping
from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from broker.audit.events import Event
from broker.server.api.http import shapes
from broker.server.api.http.description import Answer, Operation, Parameter, Vocabulary, described
from broker.server.api.http.errors import NO_STORE
from broker.server.api.http.form import read_form
from broker.server.api.http.peers import CLIENT_AUTHENTICATION, check_client, known_actor
from broker.server.api.http.services import HttpServices
from broker.server.tasks.bindings import token_type
from broker.spiffe import SpiffeId, jose
from broker.spiffe.strictjson import JsonValue
from broker.tasks.verify import ALGORITHM

ALLOWED: Final = frozenset({"token", "token_type_hint", "client_id"})
SIGNED: Final = "application/token-introspection+jwt"
SIGNED_TYPE: Final = "token-introspection+jwt"

_OPERATION: Final = Operation(
    "introspect_token",
    "Ask whether a token is alive (RFC 7662): it, its task, every ancestor, the user's word and the workload's session.",
    vocabulary=Vocabulary.OAUTH,
    form=(
        Parameter("token", "the token", required=True),
        Parameter("token_type_hint", "what it may be; not needed"),
        Parameter("client_id", "the SPIFFE ID of the connection; not needed"),
    ),
    answers={
        200: Answer(
            "alive, with what it says; or not, and nothing else",
            {"application/json": shapes.INTROSPECTION, SIGNED: shapes.JWT},
        )
    },
)


@described(_OPERATION)
async def introspect(request: Request, services: HttpServices) -> Response:
    """Tell whether a token is alive, and what it says."""
    actor = await known_actor(request, services, Event.TOKEN_REFUSED)
    caller = actor.spiffe_id
    async with services.refusals.recorded(Event.TOKEN_REFUSED, actor, ""):
        form = await read_form(request, allowed=ALLOWED)
        check_client(form, caller)
        token = form.require("token")
    live = await services.tokens.introspect(
        token, caller, strange=lambda claims: services.refusals.prying(Event.TOKEN_INTROSPECTED, actor, claims)
    )
    body: dict[str, JsonValue] = {"active": False}
    if live is not None:
        # The claims have the members' own names, act among them (RFC 8693 §4.1, RFC 9396 §9.2).
        body = {"active": True, "token_type": token_type(live.claims.cnf), **live.claims.to_payload()}
    if _wants_signed(request):
        return Response(_signed(body, caller, services), media_type=SIGNED, headers=NO_STORE)
    return JSONResponse(body, headers=NO_STORE)


def offered(services: HttpServices) -> Mapping[str, JsonValue]:
    """Give what the metadata says of this endpoint (RFC 8414 §2, RFC 9701 §7)."""
    return {
        "introspection_endpoint": f"{services.issuer}/introspect",
        "introspection_endpoint_auth_methods_supported": list(CLIENT_AUTHENTICATION),
        "introspection_signing_alg_values_supported": [ALGORITHM],
    }


def _wants_signed(request: Request) -> bool:
    """Tell whether the caller names the signed form: a wildcard does not (RFC 9701 §4)."""
    for accepted in ",".join(request.headers.getlist("accept")).split(","):
        kind, *parameters = (part.strip() for part in accepted.split(";"))
        if kind.isascii() and kind.lower() == SIGNED:
            return not any(part.replace(" ", "") in {"q=0", "q=0.0", "q=0.00", "q=0.000"} for part in parameters)
    return False


def _signed(body: Mapping[str, JsonValue], caller: SpiffeId, services: HttpServices) -> str:
    signer = services.keys.task_signer()
    # NOTE(security): nothing of the token stands beside token_introspection, where it could pass for the token (RFC 9701 §5, §8.1).
    payload: dict[str, JsonValue] = {
        "iss": services.issuer,
        "aud": str(caller),
        "iat": int(services.clock.now().timestamp()),
        "token_introspection": dict(body),
    }
    return jose.sign_compact({"alg": signer.algorithm, "kid": signer.id, "typ": SIGNED_TYPE}, payload, signer.sign)
