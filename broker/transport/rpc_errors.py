"""A failed call, seen from the client: from gRPC's status back to this product's errors.

The counterpart of the server's table. The stable code travels as ``google.rpc.ErrorInfo.reason``; a peer that sends none
(SPIRE's server, another agent) is judged by the status alone.
"""

import re
from collections.abc import Mapping

import grpc

from broker._proto.google.protobuf import any_pb2
from broker._proto.google.rpc import error_details_pb2, status_pb2
from broker._proto.spire.api.types import status_pb2 as types_pb2
from broker.errors import BrokerError, Conflict, Invalid, NoIdentity, NotFound, Refused, Unavailable

ERROR_DOMAIN = "broker"
NO_IDENTITY_TEXT = "no identity issued"
_DETAILS_KEY = "grpc-status-details-bin"
_DENIAL = re.compile(r"[0-9a-z]{1,32}")


class NotServed(BrokerError):
    """The other side has no such method, as SPIRE's server has none of ours."""

    code = "not_served"


_ELSEWHERE = "what answers there has no such method: --socket and --addr say whom to ask"

_ERRORS: Mapping[grpc.StatusCode, type[BrokerError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: Invalid,
    grpc.StatusCode.PERMISSION_DENIED: Refused,
    grpc.StatusCode.UNAUTHENTICATED: Refused,
    grpc.StatusCode.FAILED_PRECONDITION: Refused,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: Conflict,
    grpc.StatusCode.ABORTED: Conflict,
    grpc.StatusCode.UNIMPLEMENTED: NotServed,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: Unavailable,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Unavailable,
}

_Reason = types_pb2.PermissionDeniedDetails.Reason
_DENIED: Mapping[int, str] = {
    _Reason.Value(name.upper()): name
    for name in ("agent_expired", "agent_not_attested", "agent_not_active", "agent_banned", "agent_must_reattest")
}
"""SPIRE's own detail of a refusal, for servers that send no other."""

_BY_REASON: Mapping[str, type[BrokerError]] = {
    # SPIRE's status for it is that of nonsense; it is a refusal.
    "join_token_unknown": Refused,
}


_CODES: Mapping[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def from_rpc_error(error: grpc.aio.AioRpcError) -> BrokerError:
    """Give the error that the other side meant: its class by the status, its code and hint by the details."""
    return _meant(error.code(), error.details() or "", *_error_info(error))


def from_status(status: status_pb2.Status) -> BrokerError:
    """Do the same for an error that came within a message."""
    return _meant(_CODES.get(status.code, grpc.StatusCode.UNKNOWN), status.message, *_info_of(status))


def _meant(status: grpc.StatusCode, text: str, code: str | None, hint: str) -> BrokerError:
    text = text or status.name
    kind = _ERRORS.get(status, BrokerError)
    if kind is Refused and text == NO_IDENTITY_TEXT:
        kind = NoIdentity
    kind = _BY_REASON.get(code or "", kind)
    if kind is NotServed:
        hint = hint or _ELSEWHERE
    return kind(text, code=code, hint=hint)


def _denial_hint(denial: str) -> str:
    # The caller may not learn why; who runs the node may.
    if _DENIAL.fullmatch(denial) is None:
        return ""
    return f"who runs this node learns why with: broker explain denial {denial}"


def _error_info(error: grpc.aio.AioRpcError) -> tuple[str | None, str]:
    for key, value in error.trailing_metadata() or ():
        if key != _DETAILS_KEY:
            continue
        status = status_pb2.Status()
        try:
            status.ParseFromString(value if isinstance(value, bytes) else value.encode())
        except ValueError:
            return None, ""
        return _info_of(status)
    return None, ""


def _info_of(status: status_pb2.Status) -> tuple[str | None, str]:
    denied = ""
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        is_info = detail.TypeName() == error_details_pb2.ErrorInfo.DESCRIPTOR.full_name
        if is_info and detail.Unpack(info) and info.domain == ERROR_DOMAIN:
            return info.reason, info.metadata.get("hint", "") or _denial_hint(info.metadata.get("denial", ""))
        denied = denied or _denied_agent(detail)
    return denied or None, ""


def _denied_agent(detail: any_pb2.Any) -> str:
    """Give our code for what SPIRE's server says of an agent that it refuses, or ""."""
    said = types_pb2.PermissionDeniedDetails()
    if detail.TypeName() != said.DESCRIPTOR.full_name or not detail.Unpack(said):
        return ""
    return _DENIED.get(said.reason, "")
