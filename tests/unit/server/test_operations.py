import asyncio

import pytest

from broker.errors import Misconfigured
from broker.server import operations
from broker.server.operations import Operations
from broker.telemetry.metrics import Metrics


@pytest.fixture
async def port():
    state = {"server": True}
    one = Operations("127.0.0.1", 0, Metrics("server"), {"server": lambda: state["server"]})
    await one.start()
    one.state = state
    yield one
    await one.stop()


async def ask(port, text):
    reader, writer = await asyncio.open_connection("127.0.0.1", port.port)
    writer.write(text.encode())
    answer = await asyncio.wait_for(reader.read(), 30)
    writer.close()
    await writer.wait_closed()
    head, _, body = answer.decode().partition("\r\n\r\n")
    return head.split("\r\n")[0], body


async def get(port, path):
    return await ask(port, f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n")


async def test_it_says_whether_the_server_lives_and_is_ready(port):
    for path in ("/live", "/livez", "/ready", "/readyz"):
        assert await get(port, path) == ("HTTP/1.1 200 OK", "ok\n")
    port.state["server"] = False
    assert await get(port, "/ready") == ("HTTP/1.1 503 Service Unavailable", "not ready\n")
    assert await get(port, "/ready?verbose") == ("HTTP/1.1 503 Service Unavailable", "server: not ready\nnot ready\n")
    assert (await get(port, "/live"))[0] == "HTTP/1.1 200 OK"


async def test_it_shows_metrics(port):
    status, body = await get(port, "/metrics")
    assert status == "HTTP/1.1 200 OK"
    assert 'component="server"' in body


async def test_it_answers_nothing_else(port):
    assert (await get(port, "/"))[0] == "HTTP/1.1 404 Not Found"
    assert (await ask(port, "POST /ready HTTP/1.1\r\n\r\n"))[0] == "HTTP/1.1 405 Method Not Allowed"


async def test_a_slow_or_endless_request_is_closed(port, monkeypatch):
    monkeypatch.setattr(operations, "HEAD_DEADLINE", 0.05)
    assert await ask(port, "GET /live") == ("", "")
    assert await ask(port, "x" * (operations.MAX_HEAD * 4)) == ("", "")


async def test_an_address_that_is_taken_is_named(port):
    with pytest.raises(Misconfigured) as caught:
        await Operations("127.0.0.1", port.port, Metrics("server"), {}).start()
    assert "bind_port" in caught.value.hint
