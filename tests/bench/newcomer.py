"""New processes, one after the other: each connects, takes the first message of a stream, says how long that took, and ends.

They call with gRPC's own library, or (``bare``) by frames on a plain socket: what the library takes is then not in it.

A program of its own. It loads everything once and forks before gRPC has started anything: each child is a process of its own
to the kernel, and so to the node agent, without a second of imports that would be measured by nobody.
"""

import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import grpc.aio

from broker.dev.lines import say
from broker.sdk.endpoint import SECURITY_HEADER
from tests.attacks.workload_api.frames import Connection

DEADLINE = 10.0


async def first(socket: str, path: str) -> Mapping[str, Any]:
    """Connect and take the first message; the library's own start is not measured."""
    grpc.aio.init_grpc_aio()
    began = time.perf_counter()
    async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
        call = channel.unary_stream(path)(b"", metadata=SECURITY_HEADER, timeout=DEADLINE)
        message = await call.read()
        took = time.perf_counter() - began
        call.cancel()
    if message is grpc.aio.EOF:
        raise RuntimeError("the stream ended")
    return {"ms": took * 1000, "size": len(message)}


def first_by_frames(socket: str, path: str) -> Mapping[str, Any]:
    """The same call without the library: what is measured is the other side's."""
    began = time.perf_counter()
    with Connection(socket, window=False) as connection:
        messages = connection.first(connection.open(path), seconds=DEADLINE)
        took = time.perf_counter() - began
    if not messages:
        raise RuntimeError("the stream ended")
    return {"ms": took * 1000, "size": len(messages[0])}


def one(socket: str, path: str, *, bare: bool) -> Mapping[str, Any]:
    """Do it in a new process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer: Mapping[str, Any] = first_by_frames(socket, path) if bare else asyncio.run(first(socket, path))
        except Exception as error:  # noqa: BLE001 - told to the bench
            answer = {"error": {"code": type(error).__name__, "message": str(error)}}
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        told: Mapping[str, Any] = json.loads(pipe.read() or b'{"error": {"code": "died", "message": "no word"}}')
    os.waitpid(child, 0)
    return told


def main() -> None:
    for line in sys.stdin:
        given = json.loads(line)["with"]
        took: list[float] = []
        answer: Mapping[str, Any] = {}
        for _ in range(given["count"]):
            answer = one(given["socket"], given["path"], bare=given.get("bare", False))
            if "error" in answer:
                break
            took.append(answer["ms"])
            time.sleep(given["pause"])
        say(answer if "error" in answer else {"ms": took, "size": answer["size"]})


if __name__ == "__main__":
    main()
