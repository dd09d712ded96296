"""The light client hears what gRPC's own server says: answers are counted, refusals are no answers."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.bench.caller import load_frames

SECONDS = 30.0
PATH = "/any.Service/Method"


class Answering(grpc.GenericRpcHandler):
    """Answers with the request twice, or refuses once it has answered so many."""

    def __init__(self) -> None:
        self.metadata: list[dict[str, Any]] = []
        self.answers = 1_000_000

    def service(self, handler_call_details: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(self._unary)

    async def _unary(self, request: bytes, context: Any) -> bytes:
        if len(self.metadata) >= self.answers:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "no")
        self.metadata.append(dict(context.invocation_metadata()))
        return request * 2


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[tuple[Answering, str]]:
    handler, path = Answering(), str(tmp_path / "echo.sock")
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    yield handler, path
    await server.stop(0)


async def test_each_answer_is_counted_and_each_request_is_the_same(served: tuple[Answering, str]) -> None:
    handler, path = served
    async with asyncio.timeout(SECONDS):
        told = await load_frames(path, PATH, b"a" * 700, 4, 0.2)
    assert (told["calls"], told["size"]) == (len(handler.metadata), 1400)
    assert told["calls"] >= 8
    assert told["rate"] > 0
    assert {tuple(sorted(one.items())) for one in handler.metadata} == {
        (("user-agent", "grpc-python-asyncio/bench"), ("workload.spiffe.io", "true"))
    }


async def test_a_refusal_is_no_answer(served: tuple[Answering, str]) -> None:
    handler, path = served
    handler.answers = 20
    with pytest.raises(RuntimeError, match="a call was refused"):
        async with asyncio.timeout(SECONDS):
            await load_frames(path, PATH, b"a", 4, SECONDS)
    assert len(handler.metadata) == 20
