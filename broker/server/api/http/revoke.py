"""``POST /revoke``: a workload gives one of its own tokens back (RFC 7009).

The answer is 200 for every token, also one that is unknown, dead or another's: it tells nothing.
"""

from starlette.requests import Request
from starlette.responses import Response

from broker.errors import Invalid
from broker.server.api.http.errors import NO_STORE
from broker.server.api.http.form import read_form
from broker.server.api.http.introspect import ALLOWED
from broker.server.api.http.peers import svid_of
from broker.server.api.http.services import HttpServices


async def revoke(request: Request, services: HttpServices) -> Response:
    """End a token of the caller's own."""
    caller = svid_of(request, services)
    form = await read_form(request, allowed=ALLOWED)
    token = form.require("token")
    try:
        claims = services.tokens.verify(token)
    except Invalid:
        return Response(status_code=200, headers=NO_STORE)
    await services.lifecycle.revoke_token(claims.jti, owner=caller.id)
    return Response(status_code=200, headers=NO_STORE)
