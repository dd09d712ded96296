"""``POST /introspect``: is this token alive (RFC 7662), for those who may know.

Who may not know, and whoever asks about a token that is dead, foreign or unknown, gets the same ``{"active": false}``.
"""

from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from broker.server.api.http.errors import NO_STORE
from broker.server.api.http.form import read_form
from broker.server.api.http.peers import svid_of
from broker.server.api.http.services import HttpServices
from broker.server.tasks.bindings import token_type

ALLOWED: Final = frozenset({"token", "token_type_hint"})


async def introspect(request: Request, services: HttpServices) -> Response:
    """Tell whether a token is alive, and what it says."""
    caller = svid_of(request, services)
    form = await read_form(request, allowed=ALLOWED)
    live = await services.tokens.introspect(form.require("token"), caller.id)
    if live is None:
        return JSONResponse({"active": False}, headers=NO_STORE)
    # The claims have the members' own names, act among them (RFC 8693 §4.1, RFC 9396 §9.2).
    return JSONResponse(
        {"active": True, "token_type": token_type(live.claims.cnf), **live.claims.to_payload()}, headers=NO_STORE
    )
