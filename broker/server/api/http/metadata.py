"""``GET /.well-known/oauth-authorization-server``: what this issuer offers (RFC 8414)."""

from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from broker.server.api.http.services import HttpServices
from broker.server.api.http.token import GRANT_TYPE
from broker.server.tasks.config import MAX_TOKEN_TTL
from broker.tasks.authority import TYPES
from broker.tasks.dpop import ALGORITHM as PROOF_ALGORITHM
from broker.tasks.verify import ALGORITHM

CACHE_SECONDS: Final = 300
CLIENT_AUTHENTICATION: Final = ["spiffe_x509", "tls_client_auth"]
"""The draft's name for an X.509-SVID over mutual TLS, and the registered one for mutual TLS (RFC 8705 §2.1)."""
AT_TOKEN: Final = [*CLIENT_AUTHENTICATION, "spiffe_jwt"]
"""At the token endpoint also a JWT-SVID, with a DPoP proof."""


async def metadata(request: Request, services: HttpServices) -> Response:
    """Give the metadata document; its ``issuer`` is the one that tokens bear."""
    issuer = services.issuer
    document = {
        "issuer": issuer,
        "token_endpoint": f"{issuer}/token",
        "jwks_uri": f"{issuer}/keys",
        "introspection_endpoint": f"{issuer}/introspect",
        "revocation_endpoint": f"{issuer}/revoke",
        "response_types_supported": [],
        "grant_types_supported": [GRANT_TYPE],
        "token_endpoint_auth_methods_supported": [*AT_TOKEN, *(["spiffe_wit"] if services.clients.wit_keys else [])],
        "introspection_endpoint_auth_methods_supported": CLIENT_AUTHENTICATION,
        "revocation_endpoint_auth_methods_supported": CLIENT_AUTHENTICATION,
        "dpop_signing_alg_values_supported": [PROOF_ALGORITHM],
        "tls_client_certificate_bound_access_tokens": True,
        "authorization_details_types_supported": sorted(TYPES),
        # Ours: the tasks' own address, how tokens are signed, and how long the longest lives.
        "tasks_endpoint": f"{issuer}/tasks",
        "access_token_signing_alg_values_supported": [ALGORITHM],
        "access_token_max_seconds": MAX_TOKEN_TTL,
    }
    return JSONResponse(document, headers={"cache-control": f"public, max-age={CACHE_SECONDS}"})
