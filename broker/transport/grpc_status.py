"""How an error of ours looks to a gRPC caller: the one table, and the details that machines read.

Anything that is not a BrokerError is a defect: the caller sees a reference number, the log the kind and the place.
"""

import secrets
import traceback
from collections.abc import Mapping

import grpc

from broker._proto.google.protobuf import any_pb2
from broker._proto.google.rpc import error_details_pb2, status_pb2
from broker.errors import (
    BrokerError,
    Conflict,
    Invalid,
    NotFound,
    Refused,
    Unavailable,
)
from broker.transport.rpc_errors import NotServed

DOMAIN = "broker"
DETAILS_KEY = "grpc-status-details-bin"
MAX_MESSAGE = 1024  # characters of a message or hint on the wire: it shares a header block of 8 KiB

_TABLE: tuple[tuple[type[BrokerError], grpc.StatusCode], ...] = (
    (Refused, grpc.StatusCode.PERMISSION_DENIED),
    (Invalid, grpc.StatusCode.INVALID_ARGUMENT),
    (NotFound, grpc.StatusCode.NOT_FOUND),
    (NotServed, grpc.StatusCode.UNIMPLEMENTED),
    (Conflict, grpc.StatusCode.ALREADY_EXISTS),
    (Unavailable, grpc.StatusCode.UNAVAILABLE),
)
_BY_REASON: Mapping[str, grpc.StatusCode] = {
    "stale_version": grpc.StatusCode.ABORTED,
    "bundle_in_use": grpc.StatusCode.FAILED_PRECONDITION,
    "upstream_above": grpc.StatusCode.FAILED_PRECONDITION,
    "no_upstream": grpc.StatusCode.FAILED_PRECONDITION,
    "rate_limited": grpc.StatusCode.RESOURCE_EXHAUSTED,
    # SPIRE's agents know these by their status.
    "attestor_unknown": grpc.StatusCode.FAILED_PRECONDITION,
    "join_token_unknown": grpc.StatusCode.INVALID_ARGUMENT,
}
"""What a class alone does not say: the configuration, or the order of things, forbids it to everybody; or SPIRE's own word."""


def status_code(error: BrokerError) -> grpc.StatusCode:
    """Give the gRPC status of an error; the most general one is INTERNAL."""
    by_reason = _BY_REASON.get(error.reason)
    if by_reason is not None:
        return by_reason
    return next((code for kind, code in _TABLE if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


def status_details(error: BrokerError, metadata: Mapping[str, str] | None = None) -> bytes:
    """Encode what :func:`status_of` gives."""
    return status_of(error, metadata).SerializeToString()


def status_of(error: BrokerError, metadata: Mapping[str, str] | None = None) -> status_pb2.Status:
    """Give a google.rpc.Status with one ErrorInfo: reason = our stable code, domain ``broker``, metadata ``hint``.

    ``metadata``: further names for ErrorInfo.
    """
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    if error.hint:
        info.metadata["hint"] = error.hint[:MAX_MESSAGE]
    packed = any_pb2.Any()
    packed.Pack(info)
    number: int = status_code(error).value[0]
    return status_pb2.Status(code=number, message=error.message[:MAX_MESSAGE], details=[packed])


def defect_status(reference: str) -> status_pb2.Status:
    """Give what is told of a defect: a number that joins it with a line of our log."""
    number: int = grpc.StatusCode.INTERNAL.value[0]
    return status_pb2.Status(code=number, message=defect_message(reference))


def defect_message(reference: str) -> str:
    """Give the words that are told of a defect."""
    return f"internal error; reference {reference}"


def new_reference() -> str:
    """Make a number that joins what a caller saw with a line of our log."""
    return secrets.token_hex(6)


def place_of(error: BaseException) -> str:
    """Say what kind of defect happened where, without its text: that may hold a token."""
    steps = traceback.extract_tb(error.__traceback__)[-4:]
    return f"{type(error).__name__} at " + " > ".join(f"{step.name}:{step.lineno}" for step in steps)
