"""The short way: forms go straight to their endpoint, everything else to the router, and both give the same answers."""

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from broker.server.api.http.direct import DirectApp
from tests.unit.server.api.http.door import HttpDoorway, assert_error

pytestmark = pytest.mark.asyncio


class Broken(Starlette):
    """A router that must not be asked."""

    async def __call__(self, scope: object, receive: object, send: object) -> None:
        raise AssertionError(scope)


async def _hello(request: Request) -> Response:
    return PlainTextResponse((await request.body()).decode())


async def test_a_form_does_not_meet_the_router() -> None:
    app = DirectApp(Broken(routes=[Route("/form", _hello, methods=["POST"])]))
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="https://localhost") as client:
        answer = await client.post("/form", content=b"a=b")
        assert (answer.status_code, answer.text) == (200, "a=b")
        for method, path in (("GET", "/form"), ("POST", "/form/"), ("POST", "/Form"), ("POST", "//form")):
            with pytest.raises(AssertionError):
                await client.request(method, path)


async def test_an_address_with_a_variable_part_is_the_routers() -> None:
    app = DirectApp(Starlette(routes=[Route("/tasks/{task_id}", _hello, methods=["POST"])]))
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="https://localhost") as client:
        assert (await client.post("/tasks/one", content=b"x")).text == "x"
        assert (await client.post("/tasks/{task_id}", content=b"y")).text == "y"


async def test_errors_and_other_methods_are_answered_as_ever(door: HttpDoorway) -> None:
    assert_error(await door.token(resource=None), 400, "invalid_target")
    assert_error(await door.client.get("/token"), 405, "method_not_allowed")
    assert_error(await door.client.post("/token/"), 404, "not_found")
    assert (await door.token()).status_code == 200
