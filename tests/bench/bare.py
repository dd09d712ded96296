"""The bare servers: what the machine can do when nothing is decided, kept or signed. A program of its own.

``echo`` answers any gRPC method over a Unix socket with so many bytes; ``relay`` passes any unary call on to another socket;
``form`` reads a form and answers with JSON over TLS.
"""

import argparse
import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import grpc
import grpc.aio
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from broker.dev.lines import say, stdin_closed


class Echo(grpc.GenericRpcHandler):
    """Answers every method; one that is named as a stream (``Fetch…SVID`` of X.509) as a stream that stays open."""

    def __init__(self, answer: bytes, *, streams: bool) -> None:
        self._answer = answer
        self._streams = streams

    def service(self, handler_call_details: Any) -> Any:
        if self._streams:
            return grpc.unary_stream_rpc_method_handler(self._stream)
        return grpc.unary_unary_rpc_method_handler(self._unary)

    async def _unary(self, request: bytes, context: Any) -> bytes:
        return self._answer

    async def _stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield self._answer
        await asyncio.Event().wait()


class Relay(grpc.GenericRpcHandler):
    """Passes every unary call on, and its answer back."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._calls: dict[str, Any] = {}

    def service(self, handler_call_details: Any) -> Any:
        path = handler_call_details.method
        call = self._calls.setdefault(path, self._channel.unary_unary(path))

        async def unary(request: bytes, context: Any) -> bytes:
            return await call(request)

        return grpc.unary_unary_rpc_method_handler(unary)


async def serve_grpc(path: Path, handler: grpc.GenericRpcHandler) -> None:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    say({"ready": True})
    await stdin_closed()
    await server.stop(0)


async def relay(path: Path, to: Path) -> None:
    async with grpc.aio.insecure_channel(f"unix:{to}") as channel:
        await serve_grpc(path, Relay(channel))


async def serve_form(certificate: Path, key: Path, answer: int) -> None:
    async def endpoint(request: Request) -> JSONResponse:
        dict(parse_qsl((await request.body()).decode()))
        return JSONResponse({"answer": "a" * answer})

    app = Starlette(routes=[Route("/token", endpoint, methods=["POST"])])
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, lifespan="off", ws="none", http="httptools", loop="asyncio",
        log_config=None, access_log=False, ssl_certfile=certificate, ssl_keyfile=key,
    )  # fmt: skip
    config.load()
    assert config.ssl is not None
    config.ssl.minimum_version = ssl.TLSVersion.TLSv1_3
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    say({"ready": True, "port": server.servers[0].sockets[0].getsockname()[1]})
    await stdin_closed()
    server.should_exit = True
    await serving


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["echo", "stream", "relay", "form"])
    parser.add_argument("--socket", type=Path)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--answer", type=int, default=0, help="bytes of one answer")
    parser.add_argument("--files", type=json.loads, default={}, help="certificate and key, as JSON")
    given = parser.parse_args()
    if given.kind == "relay":
        asyncio.run(relay(given.socket, given.to))
    elif given.kind == "form":
        asyncio.run(serve_form(given.files["certificate"], given.files["key"], given.answer))
    else:
        asyncio.run(serve_grpc(given.socket, Echo(b"a" * given.answer, streams=given.kind == "stream")))


if __name__ == "__main__":
    main()
