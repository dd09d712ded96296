"""The Workload API by hand, for attackers: one gRPC call on any socket, with the standard library only.

Imported by the harness, and run by whatever executable an attack is about:

    wire.py SOCKET [HOLD]

calls FetchX509SVID once, prints the answer as JSON, and with HOLD waits for the end of its standard input.
"""

import json
import os
import select
import socket
import struct
import sys
import time
from contextlib import suppress

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST, _SETTINGS, _PING, _GOAWAY = 0, 1, 3, 4, 6, 7
_ACK = _END_STREAM = 1
_PADDED_OR_PRIORITY = 0x28
_STATIC = 61  # entries of HPACK's static table (RFC 7541, appendix A)
EMPTY = b"\x00\x00\x00\x00\x00"  # a gRPC message without content

SERVED, STATUS, CLOSED, SILENT = "served", "status", "closed", "silent"


def _literal(name, value):
    return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value


def _headers(path):
    return b"\x83\x86\x04" + bytes([len(path)]) + path + b"\x01\x09localhost" + b"".join(
        _literal(name, value)
        for name, value in (
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
            (b"workload.spiffe.io", b"true"),
        )
    )  # fmt: skip


def frame(kind, flags, stream, payload=b""):
    """One HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def opening():
    """What a client says first."""
    return _PREFACE + frame(_SETTINGS, 0, 0)


def request(stream=1, method="FetchX509SVID", message=EMPTY):
    """One whole unary or server-streaming call; ``method`` is of the Workload API, or a whole path."""
    path = (method if method.startswith("/") else f"/SpiffeWorkloadAPI/{method}").encode()
    return frame(_HEADERS, 4, stream, _headers(path)) + frame(_DATA, _END_STREAM, stream, message)


def response(identity):
    """What a listener of the harness answers with: an X509SVIDResponse that names one identity, and no key."""
    name = identity.encode()
    svid = b"\x0a" + bytes([len(name)]) + name
    message = b"\x0a" + bytes([len(svid)]) + svid
    return frame(_DATA, 0, 1, b"\x00" + struct.pack(">I", len(message)) + message)


def denial():
    """What a listener of the harness refuses with: PERMISSION_DENIED."""
    return frame(_HEADERS, 5, 1, _literal(b"grpc-status", b"7"))


class _Hpack:
    """Reads header blocks as gRPC's C core writes them: without Huffman coding. Names of the static table stay numbers."""

    def __init__(self):
        self._table = []

    def read(self, block):
        at, found = 0, {}
        while at < len(block):
            first = block[at]
            if first & 0x80:
                number, at = _integer(block, at, 7)
                name, value = self._entry(number)
            elif first & 0x20 and not first & 0x40:
                _, at = _integer(block, at, 5)  # a new size of the table
                continue
            else:
                bits = 6 if first & 0x40 else 4
                number, at = _integer(block, at, bits)
                if number:
                    name = self._entry(number)[0]
                else:
                    name, at = _text(block, at)
                value, at = _text(block, at)
                if bits == 6:
                    self._table.insert(0, (name, value))
            found[name] = value
        return found

    def _entry(self, number):
        if number <= _STATIC:
            return number, b""
        return self._table[number - _STATIC - 1]


def _integer(block, at, bits):
    mask = (1 << bits) - 1
    value, at, shift = block[at] & mask, at + 1, 0
    if value == mask:
        while True:
            byte, at = block[at], at + 1
            value += (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                break
    return value, at


def _text(block, at):
    length, at = _integer(block, at, 7)
    return block[at : at + length], at + length


def _fields(message):
    """The length-delimited fields of a protobuf message, as (number, content)."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag & 7 == 0:
            _, at = _varint(message, at)
            continue
        assert tag & 7 == 2
        length, at = _varint(message, at)
        yield tag >> 3, message[at : at + length]
        at += length


def _varint(message, at):
    value = shift = 0
    while True:
        byte, at = message[at], at + 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return value, at


def identities(message):
    """The SPIFFE IDs in an X509SVIDResponse or a JWTSVIDResponse, sorted."""
    svids = [content for field, content in _fields(message) if field == 1]
    return sorted(content.decode() for svid in svids for field, content in _fields(svid) if field == 1)


class Connection:
    """A client's end of an HTTP/2 connection. Blocking, with deadlines."""

    def __init__(self, connection):
        self.socket = connection
        self._hpack = _Hpack()
        self._seen = b""
        self._next = 1
        self._opened = False
        self._messages = {}
        self._others = set()  # streams of calls that are not the Workload API's

    def send(self, data):
        """Send; a connection that is closed already says so when it is heard."""
        with suppress(OSError):
            self.socket.sendall(data)

    def open(self):
        """Send the preface, once."""
        if not self._opened:
            self._opened = True
            self.send(opening())

    def call(self, method="FetchX509SVID", message=EMPTY):
        """Begin a call; give its stream."""
        self.open()
        stream, self._next = self._next, self._next + 2
        if method.startswith("/"):
            self._others.add(stream)
        self.send(request(stream, method, message))
        return stream

    def wait_accepted(self, seconds):
        """Wait until the other side has said something, which stays unread. Another process may be about to connect this socket."""
        deadline = time.monotonic() + seconds
        while not self._is_connected() and time.monotonic() < deadline:
            time.sleep(0.0005)
        left = max(0.0, deadline - time.monotonic())
        return bool(select.select([self.socket], [], [], left)[0] and self.socket.recv(1, socket.MSG_PEEK))

    def _is_connected(self):
        try:
            self.socket.getpeername()
        except OSError:
            return False
        return True

    def hear(self, stream, seconds):
        """The next message or the end of a call: (kind, detail). Detail: identities, or the number of the status."""
        deadline = time.monotonic() + seconds
        while True:
            while (one := self._frame()) is not None:
                answer = self._answer(one, stream)
                if answer is not None:
                    return answer
            got = self._receive(deadline)
            if got is None:
                return SILENT, None
            if not got:
                return CLOSED, None

    def _receive(self, deadline):
        """True: more came; False: closed; None: nothing until the deadline."""
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([self.socket], [], [], left)[0]:
            return None
        try:
            data = self.socket.recv(65536)
        except OSError:
            return False
        self._seen += data
        return bool(data)

    def _frame(self):
        if len(self._seen) < 9:
            return None
        length = int.from_bytes(self._seen[:3], "big")
        if len(self._seen) < 9 + length:
            return None
        kind, flags, stream = self._seen[3], self._seen[4], int.from_bytes(self._seen[5:9], "big")
        payload, self._seen = self._seen[9 : 9 + length], self._seen[9 + length :]
        return kind, flags, stream, payload

    def _answer(self, one, wanted):
        kind, flags, stream, payload = one
        if kind == _SETTINGS and not flags & _ACK:
            self.send(frame(_SETTINGS, _ACK, 0))
        elif kind == _PING and not flags & _ACK:
            self.send(frame(_PING, _ACK, 0, payload))
        elif kind == _HEADERS:
            assert not flags & _PADDED_OR_PRIORITY
            status = self._hpack.read(payload).get(b"grpc-status")
            if stream == wanted and status is not None:
                return STATUS, int(status)
        elif kind == _DATA and stream == wanted:
            # One message may come in several frames.
            whole = self._messages.pop(stream, b"") + payload
            if len(whole) < 5 or len(whole) - 5 < int.from_bytes(whole[1:5], "big"):
                self._messages[stream] = whole
                return None
            return SERVED, None if stream in self._others else identities(whole[5:])
        elif kind == _RST and stream == wanted:
            return CLOSED, None
        return None


def connected(path):
    """A new connection of this process."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return Connection(connection)


def asked(path, seconds=20.0):
    """One call on a connection of its own: (kind, detail)."""
    try:
        connection = connected(path)
    except OSError:
        return CLOSED, None
    try:
        return connection.hear(connection.call(), seconds)
    finally:
        connection.socket.close()


def main():
    answer = asked(sys.argv[1])
    print(json.dumps({"answer": answer, "exe": os.readlink("/proc/self/exe"), "pid": os.getpid()}), flush=True)
    if sys.argv[2:]:
        sys.stdin.read()


if __name__ == "__main__":
    main()
