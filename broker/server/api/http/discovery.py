"""``GET /.well-known/openid-configuration`` and ``/oidc/keys``: JWT-SVIDs for whoever trusts OpenID issuers.

Clouds and vaults read the discovery document and follow its ``jwks_uri``. That set holds the keys of JWT-SVIDs and nothing
else: many of these readers do not look at ``typ``, and a task token must never pass there as an identity. The keys of task
tokens are at ``/keys``, under the OAuth metadata (docs/adr/0024-two-key-sets-under-one-issuer.md).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric import rsa
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from broker.server.api.http import shapes
from broker.server.api.http.description import Answer, Operation, Vocabulary, described
from broker.spiffe import Bundle, jose, strictjson
from broker.spiffe.jose import PublicKey

DOCUMENT: Final = "/.well-known/openid-configuration"
KEYS: Final = "/oidc/keys"
CACHE_SECONDS: Final = 60
"""A key is published hours before its first use; one that is revoked should be gone soon."""

_HEADERS: Final = {"cache-control": f"public, max-age={CACHE_SECONDS}"}
_CURVE_ALGORITHMS: Final = {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512"}


@dataclass(frozen=True, slots=True)
class Discovery:
    """What the documents are made of: the issuer that JWT-SVIDs name, and the bundle with their keys."""

    issuer: str
    bundle: Callable[[], Bundle]

    def routes(self) -> Sequence[Route]:
        """Give the two addresses, below the issuer's path where it has one."""
        below = urlsplit(self.issuer).path.rstrip("/")
        return (
            Route(below + DOCUMENT, self._document, methods=["GET"]),
            Route(below + KEYS, self._keys, methods=["GET"]),
        )

    @described(
        Operation(
            "get_openid_configuration",
            "Discovery for JWT-SVIDs (OpenID Connect Discovery).",
            vocabulary=Vocabulary.NONE,
            answers={200: Answer("the document", {"application/json": shapes.OPENID_CONFIGURATION})},
            public=True,
        )
    )
    async def _document(self, request: Request) -> Response:
        algorithms = {jwk["alg"] for jwk in self._jwks()} or {"ES256"}
        document = {
            "issuer": self.issuer,
            "jwks_uri": self.issuer + KEYS,
            # Nobody logs in here; the member is required (OpenID Connect Discovery §3), so it is there and leads nowhere.
            "authorization_endpoint": "",
            "response_types_supported": ["id_token"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": sorted(algorithms),
        }
        return JSONResponse(document, headers=_HEADERS)

    @described(
        Operation(
            "get_openid_keys",
            "The keys of JWT-SVIDs.",
            vocabulary=Vocabulary.NONE,
            answers={200: Answer("a JWK Set", {"application/jwk-set+json": shapes.KEY_SET})},
            public=True,
        )
    )
    async def _keys(self, request: Request) -> Response:
        body = strictjson.canonical({"keys": self._jwks()})
        return Response(body, media_type="application/jwk-set+json", headers=_HEADERS)

    def _jwks(self) -> list[dict[str, str]]:
        return [_jwk(kid, key) for kid, key in sorted(self.bundle().jwt_authorities.items())]


def _jwk(kid: str, key: PublicKey) -> dict[str, str]:
    jwk = jose.jwk_from_public_key(key)
    algorithm = "RS256" if isinstance(key, rsa.RSAPublicKey) else _CURVE_ALGORITHMS[jwk["crv"]]
    return {**jwk, "kid": kid, "use": "sig", "alg": algorithm}
