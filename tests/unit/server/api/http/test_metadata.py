"""What the issuer says of itself, to anybody."""

import dataclasses
from urllib.parse import urlsplit

import httpx2
import pytest

from broker.server.api.http.app import create_app
from broker.tasks.keyset import read_keys
from tests.unit.server.api.http.door import HttpDoorway, assert_error
from tests.unit.server.tasks.estate import ISSUER


async def test_metadata_names_this_issuer_and_its_endpoints(door: HttpDoorway) -> None:
    door.come_as(None)
    response = await door.client.get("/.well-known/oauth-authorization-server")
    assert response.status_code == 200
    body = response.json()
    assert body["issuer"] == ISSUER
    assert body["tls_client_certificate_bound_access_tokens"] is True
    assert body["authorization_details_types_supported"] == ["agent_tool", "api"]
    assert body["response_types_supported"] == []
    assert (body["tasks_endpoint"], body["actions_endpoint"]) == (f"{ISSUER}/tasks", f"{ISSUER}/actions")
    assert "spiffe_x509" in body["token_endpoint_auth_methods_supported"]
    for name in ("token_endpoint", "introspection_endpoint", "revocation_endpoint"):
        assert body[name].startswith(ISSUER + "/")
        path = urlsplit(body[name]).path
        assert_error(await door.client.get(path), 405, "method_not_allowed")
        assert_error(await door.post(path, []), 401, "invalid_client")


async def test_keys_verify_what_is_issued(door: HttpDoorway) -> None:
    token = (await door.token()).json()["access_token"]
    door.come_as(None)
    response = await door.client.get("/keys")
    assert response.headers["content-type"] == "application/jwk-set+json"
    assert "max-age" in response.headers["cache-control"]
    keys = read_keys(response.content)
    assert set(keys) == set(door.estate.keys.task_keys())
    assert not set(response.json()["keys"][0]) & {"d", "k", "p", "q"}
    door.estate.verify(token)


@pytest.mark.parametrize("issuer", ["https://broker.example.org/one", "https://broker.example.org/one/two"])
async def test_an_issuer_with_a_path(door: HttpDoorway, issuer: str) -> None:
    services = dataclasses.replace(door.services, issuer=issuer)
    transport = httpx2.ASGITransport(create_app(services))
    async with httpx2.AsyncClient(transport=transport, base_url="https://broker.example.org") as client:
        path = urlsplit(issuer).path
        found = await client.get("/.well-known/oauth-authorization-server" + path)
        assert found.json()["token_endpoint"] == issuer + "/token"
        assert (await client.get(path + "/keys")).status_code == 200
        assert (await client.get("/keys")).status_code == 404
