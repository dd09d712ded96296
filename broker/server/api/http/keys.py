"""``GET /keys``: the public keys under which task tokens verify (RFC 7517)."""

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from broker.server.api.http import shapes
from broker.server.api.http.description import Answer, Operation, Vocabulary, described
from broker.server.api.http.services import HttpServices
from broker.tasks.keyset import write_keys

CACHE_SECONDS: Final = 60
"""A key is published long before its first use; whoever follows the feed hears of it at once."""


@described(
    Operation(
        "get_keys",
        "The keys of task tokens, transaction tokens and grants.",
        vocabulary=Vocabulary.NONE,
        answers={200: Answer("a JWK Set", {"application/jwk-set+json": shapes.KEY_SET})},
        public=True,
    )
)
async def keys(request: Request, services: HttpServices) -> Response:
    """Give the key set."""
    body = write_keys(services.keys.task_keys())
    headers = {"cache-control": f"public, max-age={CACHE_SECONDS}"}
    return Response(body, media_type="application/jwk-set+json", headers=headers)
