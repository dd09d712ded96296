"""RFC 9728: the document names the registered resource and the broker, and its place follows the resource's path."""

import pytest

from broker.errors import Invalid
from broker.sdk.protected_resource import protected_resource, well_known_path

ISSUER = "https://broker.example.org"


def test_the_document() -> None:
    document = protected_resource(ISSUER, "https://TICKETS.example.org/", scopes=("b", "a"))
    assert document["resource"] == "https://tickets.example.org"
    assert document["authorization_servers"] == [ISSUER]
    assert document["scopes_supported"] == ["a", "b"]
    assert document["tls_client_certificate_bound_access_tokens"] is True
    assert "scopes_supported" not in protected_resource(ISSUER, "https://a.example")
    with pytest.raises(Invalid):
        protected_resource(ISSUER, "http://a.example")


@pytest.mark.parametrize(
    ("audience", "path"),
    [
        ("https://a.example", "/.well-known/oauth-protected-resource"),
        ("https://a.example/mcp", "/.well-known/oauth-protected-resource/mcp"),
    ],
)
def test_where_it_belongs(audience: str, path: str) -> None:
    assert well_known_path(audience) == path
