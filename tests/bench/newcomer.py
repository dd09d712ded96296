"""New processes, one after the other: each connects, takes the first message of a stream, says how long that took, and ends.

They call with gRPC's own library, or (``bare``) by frames on a plain socket: what the library takes is then not in it.

A program of its own. It loads everything once and forks before gRPC has started anything: each child is a process of its own
to the kernel, and so to the node agent, without a second of imports that would be measured by nobody.
"""

import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

import grpc.aio

from broker.dev.lines import say
from broker.sdk.endpoint import SECURITY_HEADER
from tests.attacks.workload_api.frames import (
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PREFACE,
    frame,
    message,
    request_headers,
    settings,
)

DEADLINE = 10.0


async def first(socket_path: str, path: str) -> Mapping[str, Any]:
    """Connect and take the first message; the library's own start is not measured."""
    grpc.aio.init_grpc_aio()
    began = time.perf_counter()
    async with grpc.aio.insecure_channel(f"unix:{socket_path}") as channel:
        call = channel.unary_stream(path)(b"", metadata=SECURITY_HEADER, timeout=DEADLINE)
        message = await call.read()
        took = time.perf_counter() - began
        call.cancel()
    if message is grpc.aio.EOF:
        raise RuntimeError("the stream ended")
    return {"ms": took * 1000, "size": len(message)}


def request(path: str) -> bytes:
    """Everything that a client says before it has heard anything: preface, settings, and one call with an empty message."""
    opened = frame(HEADERS, END_HEADERS, 1, request_headers(path))
    return PREFACE + settings() + opened + frame(DATA, END_STREAM, 1, message(b""))


def first_by_frames(socket_path: str, said: bytes) -> Mapping[str, Any]:
    """The same call without a library: what is measured is the other side's. Nothing that it says or hears needs an answer."""
    heard = bytearray()
    began = time.perf_counter()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(DEADLINE)
        connection.connect(socket_path)
        connection.sendall(said)
        while (size := message_size(heard)) is None:
            chunk = connection.recv(1 << 16)
            if not chunk:
                raise RuntimeError("the connection ended")
            heard += chunk
        took = time.perf_counter() - began
    return {"ms": took * 1000, "size": size}


def message_size(heard: bytearray) -> int | None:
    """Of the first message that came; None: not yet. Raises RuntimeError where the call ended without."""
    at = 0
    body = bytearray()
    while len(heard) >= at + 9:
        length, kind, flags = int.from_bytes(heard[at : at + 3], "big"), heard[at + 3], heard[at + 4]
        if len(heard) < at + 9 + length:
            break
        if kind == DATA:
            body += heard[at + 9 : at + 9 + length]
        elif kind == HEADERS and flags & END_STREAM:
            raise RuntimeError("the stream ended")
        at += 9 + length
    size = int.from_bytes(body[1:5], "big") if len(body) >= 5 else None
    return size if size is not None and len(body) >= 5 + size else None


def one(socket_path: str, path: str, *, bare: bool) -> Mapping[str, Any]:
    """Do it in a new process."""
    said = request(path)
    answer: Mapping[str, Any]
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = first_by_frames(socket_path, said) if bare else asyncio.run(first(socket_path, path))
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
