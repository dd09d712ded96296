"""What an error looks like over HTTP: one table for the token endpoints (RFC 6749 §5.2), one for everything else.

Always JSON, never a stack, never what the caller sent. Anything that is not ours is logged under a reference number, and only
the number is shown.
"""

import functools
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, TypeAlias

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route

from broker.errors import (
    BrokerError,
    Conflict,
    Invalid,
    InvalidToken,
    NotFound,
    PolicyDenied,
    Refused,
    Unavailable,
)
from broker.tasks import NonceWanted
from broker.tasks.approval import POLL_SECONDS, ApprovalPending
from broker.telemetry.log import get_logger
from broker.transport.grpc_status import new_reference, place_of

Handler: TypeAlias = Callable[[Request], Awaitable[Response]]
_Answer: TypeAlias = tuple[int, str]

NO_STORE: Final[Mapping[str, str]] = {"cache-control": "no-store", "pragma": "no-cache"}
"""On everything that is about one token or one task (RFC 6749 §5.1)."""
DPOP_NONCE: Final = "dpop-nonce"
"""The nonce for the next proof (RFC 9449 §8)."""
RETRY_SECONDS: Final = "1"
_SCHEMES: Final = frozenset({"basic", "bearer", "dpop"})
_CERTIFICATE: Final = "ClientCertificate"
"""Named in a 401 to who sent no ``Authorization``: no scheme is registered for mutual TLS, and RFC 9110 §15.5.2 demands one."""

# RFC 6749 §5.2 allows these characters in a description.
_UNFIT: Final = re.compile(r"[^\x20-\x21\x23-\x5b\x5d-\x7e]")

_OAUTH_CODES: Final[Mapping[str, _Answer]] = {
    "invalid_client": (401, "invalid_client"),
    "unsupported_grant_type": (400, "unsupported_grant_type"),
    "invalid_target": (400, "invalid_target"),
    "invalid_scope": (400, "invalid_scope"),
    "invalid_authorization_details": (400, "invalid_authorization_details"),
    "dpop_not_accepted": (400, "invalid_target"),
    "dpop_required": (400, "invalid_target"),
    "bearer_not_allowed": (400, "invalid_target"),
    "dpop_missing": (401, "invalid_client"),
    # RFC 8705 §2: a certificate that is not the one expected for the client_id.
    "client_mismatch": (401, "invalid_client"),
    "assertion_replayed": (401, "invalid_client"),
    "invalid_wit": (401, "invalid_client"),
    "invalid_wpt": (401, "invalid_client"),
    "invalid_dpop_proof": (400, "invalid_dpop_proof"),
    "proof_replayed": (400, "invalid_dpop_proof"),
    "use_dpop_nonce": (400, "use_dpop_nonce"),
    "tasks_not_allowed": (400, "unauthorized_client"),
    # RFC 8693 §2.2.2: a subject token that is unacceptable is a matter of the request, not of a grant.
    "subject_mismatch": (400, "invalid_request"),
    "unmetered_limit": (400, "invalid_request"),
    "subject_over": (400, "invalid_request"),
    "txn_path_cycle": (400, "invalid_request"),
    "txn_path_depth": (400, "invalid_request"),
    "txn_context_changed": (400, "invalid_request"),
    "txn_expired": (400, "invalid_request"),
    "subject_not_held": (400, "unauthorized_client"),
    "unsupported_token_type": (400, "unsupported_token_type"),
    # The same section: "unacceptable based on policy".
    "policy_denied": (400, "invalid_request"),
    "approval_required": (400, "invalid_request"),
    # CIBA Core §11: what who waits for a person is told.
    "approval_pending": (400, "authorization_pending"),
    "slow_down": (400, "slow_down"),
    "approval_denied": (400, "access_denied"),
    "too_many_approvals": (400, "access_denied"),
}
_OAUTH: Final[tuple[tuple[type[BrokerError], _Answer], ...]] = (
    (Refused, (400, "invalid_grant")),
    (NotFound, (400, "invalid_grant")),
    (Conflict, (409, "invalid_request")),
    (Unavailable, (503, "temporarily_unavailable")),
    (Invalid, (400, "invalid_request")),
)
_BEARER_CODES: Final[Mapping[str, str]] = {
    "invalid_client": "",  # no token at all
    "insufficient_user_authentication": "insufficient_user_authentication",
}
_PLAIN: Final[tuple[tuple[type[BrokerError], int], ...]] = (
    (PolicyDenied, 403),
    (Refused, 403),
    (NotFound, 404),
    (Conflict, 409),
    (Unavailable, 503),
    (Invalid, 400),
)

log = get_logger("http")


def oauth(handler: Handler) -> Handler:
    """Answer this endpoint's errors in the words of RFC 6749 §5.2 and RFC 8693 §2.2.2."""
    return _guarded(handler, _oauth_answer)


def plain(handler: Handler) -> Handler:
    """Answer this endpoint's errors with their own code, by the status that fits."""
    return _guarded(handler, _plain_answer)


def bearer(handler: Handler) -> Handler:
    """Answer as :func:`plain` where a user's token opens the door, with the challenge of RFC 6750 §3 and RFC 9470 §3."""

    @functools.wraps(handler)
    async def challenged(request: Request) -> Response:
        try:
            return await handler(request)
        except BrokerError as error:
            lacking = _BEARER_CODES.get(error.reason, "invalid_token" if isinstance(error, InvalidToken) else None)
            if lacking is None:
                raise
            answer = _shown(request, error, 401, error.reason)
            answer.headers["www-authenticate"] = f'Bearer error="{lacking}"' if lacking else "Bearer"
            return answer

    return plain(challenged)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Answer what the router refuses: an unknown path, another method."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    headers = {**NO_STORE, **(error.headers or {})}
    if error.status_code == 405:
        headers["Allow"] = ", ".join(_methods(request))
    return JSONResponse({"error": code}, status_code=error.status_code, headers=headers)


def _methods(request: Request) -> Sequence[str]:
    """Give what may be asked at an address, of every route that leads there (RFC 9110 §15.5.6)."""
    routes = [
        one for one in request.app.routes if isinstance(one, Route) and one.matches(request.scope)[0] != Match.NONE
    ]
    return sorted({method for route in routes for method in route.methods or ()})


def _guarded(handler: Handler, answer: Callable[[BrokerError], _Answer]) -> Handler:
    @functools.wraps(handler)
    async def guarded(request: Request) -> Response:
        try:
            return await handler(request)
        except BrokerError as error:
            return _shown(request, error, *answer(error))
        except Exception as error:  # noqa: BLE001 - the edge: a defect is shown as a number and nothing else
            reference = new_reference()
            log.error(  # noqa: TRY400 - a traceback may show what the caller sent
                "defect", reference=reference, path=request.url.path, error=place_of(error)
            )
            body = {"error": "server_error", "error_description": f"internal error, reference {reference}"}
            return JSONResponse(body, status_code=500, headers=NO_STORE)

    return guarded


def _oauth_answer(error: BrokerError) -> _Answer:
    known = _OAUTH_CODES.get(error.reason)
    if known is not None:
        return known
    return next((answer for kind, answer in _OAUTH if isinstance(error, kind)), (500, "server_error"))


def _plain_answer(error: BrokerError) -> _Answer:
    if error.reason == "invalid_client":
        return 401, error.reason
    return next((status for kind, status in _PLAIN if isinstance(error, kind)), 500), error.reason


def _challenge(request: Request) -> str:
    """Name how to authenticate: by the scheme that the client tried (RFC 6749 §5.2), else by a certificate."""
    tried = request.headers.get("authorization", "").partition(" ")[0]
    return f'{tried if tried.lower() in _SCHEMES else _CERTIFICATE} realm="broker"'


def _shown(request: Request, error: BrokerError, status: int, code: str) -> Response:
    body = {"error": code, "error_description": _UNFIT.sub(" ", error.message), "error_code": error.reason}
    if error.hint:
        body["hint"] = error.hint
    headers = dict(NO_STORE)
    if isinstance(error, NonceWanted):
        headers[DPOP_NONCE] = error.nonce
    if isinstance(error, ApprovalPending):
        body["approval"] = error.approval_id
        headers["retry-after"] = str(POLL_SECONDS)
    if status == 401:
        headers["www-authenticate"] = _challenge(request)
    if status == 503:
        headers["retry-after"] = RETRY_SECONDS
    return JSONResponse(body, status_code=status, headers=headers)
