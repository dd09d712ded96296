"""``GET /.well-known/oauth-authorization-server``: what this issuer offers (RFC 8414).

Each endpoint says its own part, in a function ``offered`` beside it: what is not built there cannot be promised here.
"""

from collections.abc import Callable, Mapping
from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from broker.server.api.http import approvals, introspect, revoke, shapes, token
from broker.server.api.http.description import Answer, Operation, Vocabulary, described
from broker.server.api.http.services import HttpServices
from broker.spiffe.strictjson import JsonValue

CACHE_SECONDS: Final = 300
Part = Callable[[HttpServices], Mapping[str, JsonValue]]


def issuer_offers(services: HttpServices) -> Mapping[str, JsonValue]:
    """Give what belongs to no endpoint: who this is, its keys, and where the rest is described."""
    issuer = services.issuer
    return {
        "issuer": issuer,
        "jwks_uri": f"{issuer}/keys",
        # Nobody logs in here: RFC 8414 §2 wants the member, and nothing true can stand in it.
        "response_types_supported": [],
        # Ours: the addresses of tasks and actions, and the whole of this port for programs.
        "tasks_endpoint": f"{issuer}/tasks",
        "actions_endpoint": f"{issuer}/actions",
        "openapi_uri": f"{issuer}/openapi.json",
        # Which policy decides: the hash that stands in decisions and audit records.
        "task_policy": services.tokens.rules.hash,
    }


PARTS: Final[tuple[Part, ...]] = (issuer_offers, token.offered, introspect.offered, revoke.offered, approvals.offered)
"""Who says what. Another endpoint, or another way to authenticate, adds its function here."""


@described(
    Operation(
        "get_metadata",
        "What this authorization server offers (RFC 8414).",
        vocabulary=Vocabulary.NONE,
        answers={200: Answer("the document", {"application/json": shapes.METADATA})},
        public=True,
    )
)
async def metadata(request: Request, services: HttpServices) -> Response:
    """Give the metadata document; its ``issuer`` is the one that tokens bear."""
    document: dict[str, JsonValue] = {}
    for part in PARTS:
        document |= part(services)
    return JSONResponse(document, headers={"cache-control": f"public, max-age={CACHE_SECONDS}"})
