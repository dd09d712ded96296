"""A channel to a program's Unix socket, and plain words when there is none. Imports little: credential helpers use it."""

import errno
import os
import socket
import stat
from pathlib import Path

import grpc.aio

from broker.errors import Refused, Unavailable

MAX_MESSAGE = 4 << 20
"""Bytes: what the programs send and take at the most."""


def dial_socket(path: Path) -> grpc.aio.Channel:
    """Give a channel to a Unix socket that is there.

    Raises:
        Unavailable: nothing is there, or nobody listens.
        Refused: this user may not use it.
    """
    try:
        # stat says more than connect: gRPC alone would answer "failed to connect" to each of these.
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise Unavailable(f"{path} is not a socket", code="no_socket", hint="name another one with --socket")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(os.fspath(path))
    except PermissionError:
        raise Refused(
            f"this user may not use {path}", code="socket_forbidden", hint="run this as the user who runs the program"
        ) from None
    except FileNotFoundError:
        raise Unavailable(
            f"nothing is at {path}", code="no_socket", hint="is the program running? --socket names another path"
        ) from None
    except OSError as error:
        reason = "nobody listens there" if error.errno == errno.ECONNREFUSED else (error.strerror or "no answer")
        raise Unavailable(f"{path}: {reason}", code="no_socket", hint="start the program that serves it") from None
    return grpc.aio.insecure_channel(f"unix:{path}", options=(("grpc.max_receive_message_length", MAX_MESSAGE),))
