"""For services: the metadata by which OAuth clients and MCP clients find the broker (RFC 9728).

Serve :func:`protected_resource` as JSON at :func:`well_known_path`, and name that address in ``WWW-Authenticate: Bearer
resource_metadata="…"`` (RFC 9728 §5.1); :class:`broker.sdk.asgi.RequireToken` does both, given the document.
"""

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from broker.tasks import Resource
from broker.tasks.authority import TYPES

WELL_KNOWN = "/.well-known/oauth-protected-resource"


def protected_resource(issuer: str, audience: str, *, scopes: Sequence[str] = ()) -> dict[str, Any]:
    """Give the document of a service; ``audience`` is its resource as registered. Raises Invalid for one that is none.

    Tokens come in the ``Authorization`` header and are bound to the caller's certificate.
    """
    document: dict[str, Any] = {
        "resource": Resource(audience).text,
        "authorization_servers": [issuer],
        "bearer_methods_supported": ["header"],
        "tls_client_certificate_bound_access_tokens": True,
        "authorization_details_types_supported": sorted(TYPES),
    }
    if scopes:
        document["scopes_supported"] = sorted(scopes)
    return document


def well_known_path(audience: str) -> str:
    """Give where the document belongs: between the host and the path of the resource (RFC 9728 §3.1)."""
    return WELL_KNOWN + urlsplit(Resource(audience).text).path
