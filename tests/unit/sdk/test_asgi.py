"""The ASGI adapter: what a refusal says of how to come back, and the one document that needs no token."""

import json
from typing import Any

import pytest

from broker.sdk.asgi import RequireToken
from broker.sdk.protected_resource import protected_resource
from tests.unit.sdk.world import World, snapshot
from tests.unit.tasks.world import ISSUER

DOCUMENT = protected_resource(ISSUER, "https://tickets.example.org/mcp")
PATH = "/.well-known/oauth-protected-resource/mcp"
ADDRESS = "https://tickets.example.org" + PATH


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


async def ask(service: RequireToken, path: str, *headers: tuple[bytes, bytes], method: str = "GET") -> Any:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": list(headers)}
    await service(scope, None, send)  # type: ignore[arg-type]
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1].get("body", b"")


@pytest.fixture
def world() -> World:
    made = World()
    made.hear(snapshot(made.key))
    return made


@pytest.mark.parametrize(
    ("headers", "challenge"),
    [
        ((), "Bearer"),
        (((b"authorization", b"Bearer x"),), 'Bearer error="invalid_token"'),
        (((b"authorization", b"DPoP x"),), 'Bearer error="invalid_token"'),
    ],
)
async def test_a_refusal_names_where_the_metadata_is(world: World, headers: Any, challenge: str) -> None:
    status, said, _ = await ask(RequireToken(app, world.verifier), "/mcp", *headers)
    assert (status, said[b"www-authenticate"].decode()) == (401, challenge)
    status, said, _ = await ask(RequireToken(app, world.verifier, metadata=DOCUMENT), "/mcp", *headers)
    comma = "," if "=" in challenge else ""
    assert (status, said[b"www-authenticate"].decode()) == (401, f'{challenge}{comma} resource_metadata="{ADDRESS}"')


async def test_the_metadata_is_for_everybody_and_nothing_else_is(world: World) -> None:
    service = RequireToken(app, world.verifier, metadata=DOCUMENT)
    status, said, body = await ask(service, PATH)
    assert (status, said[b"content-type"], json.loads(body)) == (200, b"application/json", DOCUMENT)
    assert (await ask(service, PATH, method="HEAD"))[0] == 200  # servers leave out the body of an answer to HEAD
    for path, method in ((PATH, "POST"), (PATH + "/", "GET"), ("/mcp", "GET")):
        assert (await ask(service, path, method=method))[0] == 401
    assert (await ask(RequireToken(app, world.verifier), PATH))[0] == 401
