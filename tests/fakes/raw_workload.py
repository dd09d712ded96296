"""Callers of the Workload API that speak HTTP/2 by hand, so that thousands of processes cost little. Standard library only.

    raw_workload.py die STAGE COUNT SOCKET        COUNT connections, each of which dies at STAGE
    raw_workload.py crowd FIRST COUNT SECONDS SOCKET
        COUNT processes of the users FIRST, FIRST + 1 … with several connections each, and many streams on each, for so long

Stages: ``connected``, ``preface`` (connections of one process), ``attesting``, ``streaming`` (a process for each). ``crowd``
prints a line of JSON for each process: its user, how often it asked, how many answers it got, and every identity in them that is
not its own.
"""

import base64
import json
import os
import re
import socket
import struct
import sys
import time

CONNECTIONS, STREAMS = 3, 8  # of one process of the crowd
AT_ONCE = 32  # processes that die at the same time
ID = re.compile(rb"spiffe://example\.org/wl/([0-9]+)/x")  # with an end: a certificate goes on with any byte
TOKEN = re.compile(rb"eyJ[A-Za-z0-9_-]+\.([A-Za-z0-9_-]+)\.[A-Za-z0-9_-]+")
DATA, HEADERS, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
BIG = 2**30


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def field(name: bytes, value: bytes) -> bytes:
    return b"\0" + bytes((len(name),)) + name + bytes((len(value),)) + value


PREFACE = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, BIG))
    + frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", BIG))
)


def call(stream: int, method: bytes, message: bytes) -> bytes:
    head = b"\x83\x86" + field(b":path", b"/SpiffeWorkloadAPI/" + method) + field(b":authority", b"localhost")
    head += field(b"content-type", b"application/grpc") + field(b"te", b"trailers")
    head += field(b"workload.spiffe.io", b"true")
    body = b"\0" + struct.pack(">I", len(message)) + message
    return frame(HEADERS, END_HEADERS, stream, head) + frame(DATA, END_STREAM, stream, body)


X509 = (b"FetchX509SVID", b"")


def jwt(audience: bytes) -> "tuple[bytes, bytes]":
    return b"FetchJWTSVID", b"\x0a" + bytes((len(audience),)) + audience


class Connection:
    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.buffer = b""
        self.next = 1
        self.socket.sendall(PREFACE)

    def send(self, method: bytes, message: bytes) -> int:
        stream, self.next = self.next, self.next + 2
        self.socket.sendall(call(stream, method, message))
        return stream

    def frames(self):
        while True:
            while len(self.buffer) >= 9:
                length = int.from_bytes(self.buffer[:3], "big")
                if len(self.buffer) < 9 + length:
                    break
                kind, flags, stream = self.buffer[3], self.buffer[4], int.from_bytes(self.buffer[5:9], "big")
                payload, self.buffer = self.buffer[9 : 9 + length], self.buffer[9 + length :]
                if kind == SETTINGS and not flags & ACK:
                    self.socket.sendall(frame(SETTINGS, ACK, 0))
                elif kind == PING and not flags & ACK:
                    self.socket.sendall(frame(PING, ACK, 0, payload))
                elif kind == GOAWAY:
                    raise ConnectionError(payload)
                else:
                    yield kind, flags, stream, payload
            more = self.socket.recv(65536)
            if not more:
                raise ConnectionError("closed")
            self.buffer += more

    def answers(self, endless: set, ending: set) -> dict:
        """What comes on these streams: until their end, or until the first message of an endless one."""
        got = dict.fromkeys(endless | ending, b"")
        waiting = endless | ending
        for kind, flags, stream, payload in self.frames():
            if kind == DATA and stream in got:
                got[stream] += payload
            if flags & END_STREAM or (stream in endless and _is_whole(got[stream])):
                waiting.discard(stream)
            if not waiting:
                return got
        return got


def _is_whole(data: bytes) -> bool:
    return len(data) >= 5 and len(data) >= 5 + struct.unpack(">I", data[1:5])[0]


def foreign(data: bytes, own: int) -> list:
    """Every identity in an answer that is not this one: in its fields and certificates, and in its tokens."""
    found = [int(number) for number in ID.findall(data)]
    for payload in TOKEN.findall(data):
        subject = json.loads(base64.urlsafe_b64decode(payload + b"=" * (-len(payload) % 4)))["sub"]
        found += [int(number) for number in ID.findall(subject.encode())]
    return [number for number in found if number != own]


def crowd_member(uid: int, seconds: float, path: str) -> dict:
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    asked_for, answers, strangers = 0, 0, []
    until = time.monotonic() + seconds
    while not asked_for or time.monotonic() < until:
        asked_for += CONNECTIONS * (STREAMS + 1)
        connections = [Connection(path) for _ in range(CONNECTIONS)]
        asked = []
        for one in connections:
            streams = {one.send(*jwt(b"aud-%d" % (n % 2))) for n in range(STREAMS)}
            asked.append((one, {one.send(*X509)}, streams))
        for one, endless, ending in asked:
            for data in one.answers(endless, ending).values():
                answers += bool(ID.search(data))
                strangers += foreign(data, uid)
            one.socket.close()
    return {"uid": uid, "asked": asked_for, "answers": answers, "foreign": strangers}


def crowd(first: int, count: int, seconds: float, path: str) -> None:
    children = []
    for uid in range(first, first + count):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                said = crowd_member(uid, seconds, path)
            except (OSError, ValueError) as error:
                said = {"uid": uid, "answers": 0, "foreign": [], "error": repr(error)}
            os.write(writing, json.dumps(said).encode())
            os._exit(0)
        os.close(writing)
        children.append((pid, reading))
    for pid, reading in children:
        with os.fdopen(reading, "rb") as said:
            print(said.read().decode(), flush=True)
        os.waitpid(pid, 0)


def dying(stage: str, path: str) -> None:
    if stage in {"attesting", "streaming"}:
        one = Connection(path)
        stream = one.send(*X509)
        if stage == "streaming":
            one.answers({stream}, set())
        os._exit(0)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        if stage == "preface":
            connection.sendall(PREFACE)


def die(stage: str, count: int, path: str) -> None:
    children: list[int] = []
    for _ in range(count):
        if stage in {"connected", "preface"}:
            dying(stage, path)
            continue
        pid = os.fork()
        if pid == 0:
            try:
                dying(stage, path)
            finally:
                os._exit(1)
        children.append(pid)
        if len(children) >= AT_ONCE:
            assert os.waitpid(children.pop(0), 0)[1] == 0
    for pid in children:
        assert os.waitpid(pid, 0)[1] == 0
    print("done", flush=True)


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "die":
        die(arguments[0], int(arguments[1]), arguments[2])
    else:
        crowd(int(arguments[0]), int(arguments[1]), float(arguments[2]), arguments[3])
