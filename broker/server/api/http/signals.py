"""Where identity providers tell of their users: ``/backchannel-logout`` and ``/ssf/events``.

Nobody who calls here is known by a certificate: what is believed is signed by an issuer that is configured. The answer says
that a signal was taken in durably, or why not, and nothing of what it did.
"""

import hmac
import re
from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from broker.errors import BrokerError, Invalid, Refused, Unavailable
from broker.server.api.http import shapes
from broker.server.api.http.description import Answer, Operation, Parameter, Vocabulary, described
from broker.server.api.http.errors import NO_STORE, RETRY_SECONDS
from broker.server.api.http.form import read_body, read_form
from broker.server.api.http.services import HttpServices
from broker.server.tasks.signal_poll import error_of
from broker.server.tasks.signals import Signal

SET: Final = "application/secevent+jwt"
LOGOUT_DOOR: Final = "backchannel_logout"
PUSH_DOOR: Final = "ssf_push"

_BEARER: Final = re.compile(r"[Bb][Ee][Aa][Rr][Ee][Rr] +([A-Za-z0-9._~+/-]+=*)")
_UNFIT: Final = re.compile(r"[^\x20-\x7e]")


@described(
    Operation(
        "end_user_session",
        "Take in that a user has signed out (OpenID Connect Back-Channel Logout 1.0): tasks of the session end.",
        vocabulary=Vocabulary.OAUTH,
        form=(Parameter("logout_token", "signed by a subject issuer; other parameters are ignored", required=True),),
        answers={200: Answer("the session is over, and so is what hung on it")},
        public=True,
    )
)
async def logout(request: Request, services: HttpServices) -> Response:
    """Take in a logout token."""
    try:
        form = await read_form(request, allowed=frozenset({"logout_token"}), ignore_unknown=True)
        signal = await services.logout_tokens.verify(form.require("logout_token"))
        await services.signals.take(signal)
    except BrokerError as error:
        await services.signals.refused(LOGOUT_DOOR, error)
        raise
    return Response(status_code=200, headers=NO_STORE)


@described(
    Operation(
        "push_security_event",
        "Take in a security event of a configured transmitter (RFC 8935, Shared Signals Framework 1.0).",
        vocabulary=Vocabulary.SET,
        body={SET: shapes.JWT},
        answers={202: Answer("it is taken in, durably")},
        public=True,
        known_by=("", "transmitter"),
    )
)
async def event(request: Request, services: HttpServices) -> Response:
    """Take in a pushed security event token."""
    try:
        await services.signals.take(await _pushed(request, services))
    except BrokerError as error:
        await services.signals.refused(PUSH_DOOR, error)
        return _refused(error)
    return Response(status_code=202, headers=NO_STORE)


async def _pushed(request: Request, services: HttpServices) -> Signal:
    body = await read_body(request)
    types = request.headers.getlist("content-type")
    if len(types) != 1 or types[0].partition(";")[0].strip().lower() != SET:
        raise Invalid(f"the content type must be {SET}", code="content_type")
    try:
        token = body.decode("ascii")
    except UnicodeDecodeError:
        raise Invalid("the body is not a token", code="signal_form") from None
    signal = await services.events.verify(token)
    _require_transmitter(request, signal, services)
    return signal


def _require_transmitter(request: Request, signal: Signal, services: HttpServices) -> None:
    """Refuse who does not show the transmitter's bearer token where one is set, and who is to be asked, not heard."""
    (known,) = (one for one in services.events.transmitters if one.issuer == signal.source)
    if known.poll_url:
        raise Refused("this transmitter's events are fetched, not taken", code="ssf_access")
    if not known.token:
        return
    sent = request.headers.getlist("authorization")
    match = _BEARER.fullmatch(sent[0]) if len(sent) == 1 else None
    if match is None or not hmac.compare_digest(match[1].encode(), known.token.encode()):
        raise Refused("the transmitter did not show its token", code="ssf_authentication")


def _refused(error: BrokerError) -> Response:
    headers = {**NO_STORE, "content-language": "en"}
    status = 400
    if isinstance(error, Unavailable):
        status, headers["retry-after"] = 503, RETRY_SECONDS
    elif error.reason == "ssf_authentication":
        status, headers["www-authenticate"] = 401, "Bearer"
    elif error.reason == "ssf_access":
        status = 403
    body = {"err": error_of(error), "description": _UNFIT.sub(" ", error.message)}
    return JSONResponse(body, status_code=status, headers=headers)
