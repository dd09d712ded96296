"""What the doors share at which a person's own application comes, with a token of that person (RFC 6750).

A certificate does not help there: an agent that holds a user's token is not the user.
"""

import re
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Final, Protocol

from starlette.requests import Request

from broker.errors import BrokerError, Invalid, Refused
from broker.server.api.http.form import read_body
from broker.spiffe import strictjson
from broker.spiffe.strictjson import JsonValue
from broker.transport.http import PEER_EXTENSION
from broker.transport.tls import SvidPeer

JSON: Final = "application/json"
USER: Final = ("user",)
"""As OpenAPI calls a caller who is known by a user's token."""
_BEARER: Final = re.compile(r"[Bb][Ee][Aa][Rr][Ee][Rr] +([A-Za-z0-9._~+/-]+=*)")


class Note(Protocol):
    """Writes down that somebody was refused; ``by`` names the workload that came, where known."""

    def __call__(self, error: BrokerError, *, by: str) -> Awaitable[None]:
        """Write it."""
        ...


@asynccontextmanager
async def recorded(request: Request, note: Note) -> AsyncIterator[None]:
    """Around the reading of a request: that it is refused before anything was asked is on record, too."""
    try:
        yield
    except BrokerError as error:
        await note(error, by=brought_by(request))
        raise


def bearer(request: Request, client: str) -> str:
    """Give the token; raises Refused for none. ``client`` says in the hint which one's it must be."""
    sent = request.headers.getlist("authorization")
    match = _BEARER.fullmatch(sent[0]) if len(sent) == 1 else None
    if match is None:
        raise Refused(
            "there is no user's token", code="invalid_client", hint=f"send one as Authorization: Bearer, of {client}"
        )
    return match[1]


def after_of(request: Request) -> str | None:
    """Give the place where a list goes on, None for its beginning: the only parameter there is. Raises Invalid."""
    names = request.query_params.keys()
    if not set(names) <= {"after"} or len(request.query_params.multi_items()) > 1:
        raise Invalid("a parameter is not known here", code="parameter_unknown")
    return request.query_params.get("after")


async def json_of(request: Request, *, optional: bool = False) -> JsonValue:
    """Read the body; an ``optional`` one that is left out is an empty object. Raises Invalid."""
    body = await read_body(request)
    if request.scope.get("query_string"):
        raise Invalid("parameters belong in the body, not in the address", code="parameter_in_query")
    if optional and not body:
        return {}
    types = request.headers.getlist("content-type")
    if len(types) != 1 or types[0].partition(";")[0].strip().lower() != JSON:
        raise Invalid(f"the content type must be {JSON}", code="content_type")
    return strictjson.loads(body)


def brought_by(request: Request) -> str:
    """Name the workload that brings the token, for the record of a refusal: it is not the person. Empty for none."""
    peer = request.scope.get("extensions", {}).get(PEER_EXTENSION)
    return str(peer.svid.id) if isinstance(peer, SvidPeer) else ""


def time_text(moment: datetime) -> str:
    """Write a time: RFC 3339 in UTC, whole seconds."""
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def time_or_none(moment: datetime | None) -> str | None:
    """Write a time that may not have come yet."""
    return None if moment is None else time_text(moment)
