"""``/delegations``: what a user leaves standing, made and withdrawn with a token of the user's own (RFC 6750).

The caller is the user's application. A certificate does not help: an agent that holds a user's token is not the user.
"""

from datetime import datetime
from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from broker.server.api.http import person, shapes
from broker.server.api.http.description import Answer, Operation, Parameter, described
from broker.server.api.http.errors import NO_STORE
from broker.server.api.http.peers import idempotency_key
from broker.server.api.http.person import JSON, USER, brought_by, recorded, time_or_none, time_text
from broker.server.api.http.services import HttpServices
from broker.server.tasks.delegations import Terms
from broker.spiffe.strictjson import JsonValue
from broker.tasks.standing import StandingDelegation

PAGE: Final = 100
"""Delegations in one answer: as many as one user may have standing."""

_SHOWN: Final = {200: Answer("the delegation", {JSON: shapes.DELEGATION})}


@described(
    Operation(
        "create_delegation",
        "Leave a delegation standing: agents that it names may start tasks within it while the user is away.",
        answers={201: Answer("it stands", {JSON: shapes.DELEGATION})},
        headers=(Parameter("Idempotency-Key", "the same request under the same key makes one"),),
        body={JSON: shapes.NEW_DELEGATION},
        public=True,
        known_by=USER,
    )
)
async def create(request: Request, services: HttpServices) -> Response:
    """Make one."""
    async with recorded(request, services.delegations.refused):
        token, terms, key = _bearer(request), Terms.parse(await person.json_of(request)), idempotency_key(request)
    made = await services.delegations.create(token, terms, by=brought_by(request), key=key)
    headers = {**NO_STORE, "location": f"{services.issuer}/delegations/{made.id}"}
    return JSONResponse(shown(made, services.clock.now()), status_code=201, headers=headers)


@described(
    Operation(
        "list_delegations",
        "The user's own delegations, oldest first; ``after`` in the address goes on.",
        answers={200: Answer("a page", {JSON: shapes.DELEGATIONS})},
        public=True,
        known_by=USER,
    )
)
async def list_own(request: Request, services: HttpServices) -> Response:
    """Give a page of the user's own."""
    async with recorded(request, services.delegations.refused):
        after, token = person.after_of(request), _bearer(request)
    page = await services.delegations.list_own(token, after=after, limit=PAGE, by=brought_by(request))
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
    async with recorded(request, services.delegations.refused):
        token = _bearer(request)
    found = await services.delegations.own(token, _id(request), by=brought_by(request))
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
    async with recorded(request, services.delegations.refused):
        token = _bearer(request)
    ended = await services.delegations.withdraw(token, _id(request), by=brought_by(request))
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
        "created_at": time_text(delegation.created_at),
        "expires_at": time_text(delegation.expires_at),
        "ended_at": time_or_none(delegation.ended_at),
        "cause": None if delegation.cause is None else delegation.cause.value,
    }


def _bearer(request: Request) -> str:
    return person.bearer(request, "a client that makes delegations")


def _id(request: Request) -> str:
    return str(request.path_params["delegation_id"])
