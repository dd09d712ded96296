"""``/delegations``: what a user leaves standing, made and withdrawn with a token of the user's own (RFC 6750).

The caller is the user's application. A certificate does not help: an agent that holds a user's token is not the user.
"""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from broker.errors import BrokerError, Invalid, Refused
from broker.server.api.http import shapes
from broker.server.api.http.description import Answer, Operation, Parameter, described
from broker.server.api.http.errors import NO_STORE
from broker.server.api.http.form import read_body
from broker.server.api.http.peers import idempotency_key
from broker.server.api.http.services import HttpServices
from broker.server.tasks.delegations import Terms
from broker.spiffe import strictjson
from broker.spiffe.strictjson import JsonValue
from broker.tasks.standing import StandingDelegation
from broker.transport.http import PEER_EXTENSION
from broker.transport.tls import SvidPeer

PAGE: Final = 100
"""Delegations in one answer: as many as one user may have standing."""

_JSON: Final = "application/json"
_BEARER: Final = re.compile(r"[Bb][Ee][Aa][Rr][Ee][Rr] +([A-Za-z0-9._~+/-]+=*)")
USER: Final = ("user",)
"""As OpenAPI calls a caller who is known by a user's token."""
_SHOWN: Final = {200: Answer("the delegation", {_JSON: shapes.DELEGATION})}


@described(
    Operation(
        "create_delegation",
        "Leave a delegation standing: agents that it names may start tasks within it while the user is away.",
        answers={201: Answer("it stands", {_JSON: shapes.DELEGATION})},
        headers=(Parameter("Idempotency-Key", "the same request under the same key makes one"),),
        body={_JSON: shapes.NEW_DELEGATION},
        public=True,
        known_by=USER,
    )
)
async def create(request: Request, services: HttpServices) -> Response:
    """Make one."""
    async with _recorded(request, services):
        token, terms, key = _bearer(request), Terms.parse(await _json(request)), idempotency_key(request)
    made = await services.delegations.create(token, terms, by=_by(request), key=key)
    headers = {**NO_STORE, "location": f"{services.issuer}/delegations/{made.id}"}
    return JSONResponse(shown(made, services.clock.now()), status_code=201, headers=headers)


@described(
    Operation(
        "list_delegations",
        "The user's own delegations, oldest first; ``after`` in the address goes on.",
        answers={200: Answer("a page", {_JSON: shapes.DELEGATIONS})},
        public=True,
        known_by=USER,
    )
)
async def list_own(request: Request, services: HttpServices) -> Response:
    """Give a page of the user's own."""
    async with _recorded(request, services):
        names = request.query_params.keys()
        if not set(names) <= {"after"} or len(request.query_params.multi_items()) > 1:
            raise Invalid("a parameter is not known here", code="parameter_unknown")
        token, after = _bearer(request), request.query_params.get("after")
    page = await services.delegations.list_own(token, after=after, limit=PAGE, by=_by(request))
    now = services.clock.now()
    body: dict[str, JsonValue] = {"delegations": [shown(one, now) for one in page.delegations]}
    if page.next is not None:
        body["next"] = page.next
    return JSONResponse(body, headers=NO_STORE)


@described(
    Operation("get_delegation", "One of the user's own delegations.", answers=_SHOWN, public=True, known_by=USER)
)
async def show(request: Request, services: HttpServices) -> Response:
    """Give one."""
    async with _recorded(request, services):
        token = _bearer(request)
    found = await services.delegations.own(token, _id(request), by=_by(request))
    return JSONResponse(shown(found, services.clock.now()), headers=NO_STORE)


@described(
    Operation(
        "withdraw_delegation",
        "End one of the user's own delegations, with every task that was started on it.",
        answers=_SHOWN,
        public=True,
        known_by=USER,
    )
)
async def withdraw(request: Request, services: HttpServices) -> Response:
    """End one; ending it twice is fine."""
    async with _recorded(request, services):
        token = _bearer(request)
    ended = await services.delegations.withdraw(token, _id(request), by=_by(request))
    return JSONResponse(shown(ended, services.clock.now()), headers=NO_STORE)


def shown(delegation: StandingDelegation, now: datetime) -> dict[str, JsonValue]:
    """Write one for people and programs."""
    return {
        "id": delegation.id,
        "user": delegation.user,
        "issuer": delegation.issuer,
        "client": delegation.client,
        "state": delegation.state(now),
        "agents": [pattern.text for pattern in delegation.agents],
        "authorization_details": delegation.authority.to_json(),
        "purpose": delegation.purpose,
        "max_task_ttl": delegation.max_task_ttl,
        "max_hops": delegation.max_hops,
        "created_at": _time(delegation.created_at),
        "expires_at": _time(delegation.expires_at),
        "ended_at": None if delegation.ended_at is None else _time(delegation.ended_at),
        "cause": None if delegation.cause is None else delegation.cause.value,
    }


@asynccontextmanager
async def _recorded(request: Request, services: HttpServices) -> AsyncIterator[None]:
    """Around the reading of a request: that it is refused before anything was asked is on record, too."""
    try:
        yield
    except BrokerError as error:
        await services.delegations.refused(error, by=_by(request))
        raise


def _bearer(request: Request) -> str:
    sent = request.headers.getlist("authorization")
    match = _BEARER.fullmatch(sent[0]) if len(sent) == 1 else None
    if match is None:
        raise Refused(
            "there is no user's token",
            code="invalid_client",
            hint="send one as Authorization: Bearer, of a client that makes delegations",
        )
    return match[1]


async def _json(request: Request) -> JsonValue:
    body = await read_body(request)
    if request.scope.get("query_string"):
        raise Invalid("parameters belong in the body, not in the address", code="parameter_in_query")
    types = request.headers.getlist("content-type")
    if len(types) != 1 or types[0].partition(";")[0].strip().lower() != _JSON:
        raise Invalid(f"the content type must be {_JSON}", code="content_type")
    return strictjson.loads(body)


def _by(request: Request) -> str:
    """Name the workload that brings the token, for the record of a refusal: it is not the user."""
    peer = request.scope.get("extensions", {}).get(PEER_EXTENSION)
    return str(peer.svid.id) if isinstance(peer, SvidPeer) else ""


def _id(request: Request) -> str:
    return str(request.path_params["delegation_id"])


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
