"""The socket is looked at before it is dialled; batch statuses become errors; IDs keep their text."""

import os
import socket
import tempfile
from pathlib import Path

import grpc
import pytest

from broker._proto.spire.api.types import status_pb2
from broker.client.calls import require_ok, spiffe_id_message, spiffe_id_text
from broker.client.dial import dial_socket
from broker.errors import BrokerError, Conflict, Invalid, NotFound, Refused, Unavailable
from broker.spiffe import SpiffeId


@pytest.fixture
def short() -> Path:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        yield Path(directory)


def test_nothing_there(short: Path) -> None:
    with pytest.raises(Unavailable) as caught:
        dial_socket(short / "none")
    assert caught.value.reason == "no_socket"
    assert "--socket" in caught.value.hint


def test_no_socket(short: Path) -> None:
    (short / "file").write_text("x")
    with pytest.raises(Unavailable, match="not a socket"):
        dial_socket(short / "file")


def test_nobody_listens(short: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(short / "left"))
    with pytest.raises(Unavailable, match="nobody listens"):
        dial_socket(short / "left")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may use every socket")
def test_forbidden(short: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(short / "theirs"))
        listening.listen()
        (short / "theirs").chmod(0)
        with pytest.raises(Refused) as caught:
            dial_socket(short / "theirs")
    assert caught.value.reason == "socket_forbidden"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, Invalid),
        (grpc.StatusCode.NOT_FOUND, NotFound),
        (grpc.StatusCode.ALREADY_EXISTS, Conflict),
        (grpc.StatusCode.PERMISSION_DENIED, Refused),
        (grpc.StatusCode.UNAVAILABLE, Unavailable),
        (grpc.StatusCode.INTERNAL, BrokerError),
    ],
)
def test_status_of_an_item(code: grpc.StatusCode, kind: type[BrokerError]) -> None:
    with pytest.raises(kind, match="what: because") as caught:
        require_ok(status_pb2.Status(code=code.value[0], message="because"), "what")
    assert type(caught.value) is kind


def test_ok_is_no_error() -> None:
    require_ok(status_pb2.Status(), "what")


@pytest.mark.parametrize("text", ["spiffe://a.test", "spiffe://a.test/b/c"])
def test_ids_both_ways(text: str) -> None:
    assert spiffe_id_text(spiffe_id_message(SpiffeId(text))) == text


def test_no_id_is_no_text() -> None:
    assert spiffe_id_text(spiffe_id_message(SpiffeId("spiffe://a.test")).__class__()) == ""
