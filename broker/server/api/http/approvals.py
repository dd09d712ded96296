"""``/approvals``: what waits for a person's yes, for that person's own application, with a token of theirs (RFC 6750).

Never shown: a token, or the id of one. Who decides sees what is asked for and by whom, not what was given.
"""

from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from broker.errors import Invalid
from broker.server.api.http import person, shapes
from broker.server.api.http.description import Answer, Operation, described
from broker.server.api.http.errors import NO_STORE
from broker.server.api.http.person import JSON, USER, brought_by, recorded, time_or_none, time_text
from broker.server.api.http.services import HttpServices
from broker.server.tasks.approvals import Saying
from broker.spiffe.strictjson import JsonValue
from broker.tasks.approval import Approval

PAGE: Final = 100
"""Approvals that are looked at for one answer."""

_SHOWN: Final = {200: Answer("the approval", {JSON: shapes.APPROVAL})}
_REASON: Final = frozenset({"reason"})


@described(
    Operation(
        "list_approvals",
        "What this person may decide now, oldest first; ``after`` in the address goes on, also after an empty page.",
        answers={200: Answer("a page", {JSON: shapes.APPROVALS})},
        public=True,
        known_by=USER,
    )
)
async def waiting(request: Request, services: HttpServices) -> Response:
    """Give a page of what waits for this person."""
    async with recorded(request, services.approvals.refused):
        after, token = person.after_of(request), _bearer(request)
    page = await services.approvals.waiting(token, after=after, limit=PAGE, by=brought_by(request))
    now = services.clock.now()
    body: dict[str, JsonValue] = {"approvals": [shown(one, now) for one in page.approvals]}
    if page.next is not None:
        body["next"] = page.next
    return JSONResponse(body, headers=NO_STORE)


@described(
    Operation(
        "get_approval",
        "One approval, for whom it is done for, who decided it and who may.",
        answers=_SHOWN,
        public=True,
        known_by=USER,
    )
)
async def show(request: Request, services: HttpServices) -> Response:
    """Give one."""
    async with recorded(request, services.approvals.refused):
        token = _bearer(request)
    found = await services.approvals.shown(token, _id(request), by=brought_by(request))
    return JSONResponse(shown(found, services.clock.now()), headers=NO_STORE)


@described(
    Operation(
        "approve",
        "Say yes, shortly after signing in; it permits one token, and is never said by whom that is for.",
        answers=_SHOWN,
        body={JSON: shapes.APPROVING},
        form_optional=True,
        public=True,
        known_by=USER,
    )
)
async def approve(request: Request, services: HttpServices) -> Response:
    """Say yes; saying it twice is fine."""
    return await _said(request, services, _REASON | {"use_within"}, services.approvals.approve)


@described(
    Operation(
        "deny",
        "Say no; also whom it is done for may.",
        answers=_SHOWN,
        body={JSON: shapes.SAYING},
        form_optional=True,
        public=True,
        known_by=USER,
    )
)
async def deny(request: Request, services: HttpServices) -> Response:
    """Say no; saying it twice is fine."""
    return await _said(request, services, _REASON, services.approvals.deny)


@described(
    Operation(
        "withdraw_approval",
        "Take back a yes: what it permitted is dead at once.",
        answers=_SHOWN,
        body={JSON: shapes.SAYING},
        form_optional=True,
        public=True,
        known_by=USER,
    )
)
async def withdraw(request: Request, services: HttpServices) -> Response:
    """Take back a yes; doing it twice is fine."""
    return await _said(request, services, _REASON, services.approvals.withdraw)


def offered(services: HttpServices) -> Mapping[str, JsonValue]:
    """Say in the metadata where it is."""
    return {"approvals_endpoint": f"{services.issuer}/approvals"}


def shown(approval: Approval, now: datetime) -> dict[str, JsonValue]:
    """Write one for people and programs; its state is the one that counts ``now``."""
    wanted = approval.wanted
    return {
        "id": approval.id,
        "state": approval.state_at(now).value,
        "task": wanted.task,
        "agent": str(wanted.agent),
        "user": wanted.user,
        "issuer": wanted.issuer,
        "audience": wanted.resource.text,
        "authorization_details": wanted.authority.to_json(),
        "scope": wanted.authority.scope(),
        "purpose": approval.purpose,
        "parameter_digest": wanted.parameter_digest,
        "rules": [*approval.rules],
        "created_at": time_text(approval.created_at),
        "expires_at": time_text(approval.expires_at),
        "decided_at": time_or_none(approval.decided_at),
        "decided_by": approval.decided_by or None,
        "reason": approval.reason or None,
        "approved_until": time_or_none(approval.approved_until),
        "used_at": time_or_none(approval.used_at),
    }


async def _said(
    request: Request,
    services: HttpServices,
    members: frozenset[str],
    act: Callable[..., Awaitable[Approval]],
) -> Response:
    async with recorded(request, services.approvals.refused):
        token = _bearer(request)
        saying = _saying(_id(request), await person.json_of(request, optional=True), members)
    decided = await act(token, saying, by=brought_by(request))
    return JSONResponse(shown(decided, services.clock.now()), headers=NO_STORE)


def _saying(approval_id: str, body: JsonValue, members: frozenset[str]) -> Saying:
    if not isinstance(body, dict) or not body.keys() <= members:
        raise Invalid(
            "the body is not a JSON object of what may be said here",
            code="invalid_approval",
            hint=f"leave it out, or give some of {', '.join(sorted(members))}",
        )
    reason, use_within = body.get("reason", ""), body.get("use_within", 0)
    if not isinstance(reason, str):
        raise Invalid("the reason is not text", code="invalid_approval")
    if not isinstance(use_within, int) or isinstance(use_within, bool):
        raise Invalid("use_within is not a whole number of seconds", code="invalid_approval")
    return Saying(approval_id, reason, use_within)


def _bearer(request: Request) -> str:
    return person.bearer(request, "a client through which people decide")


def _id(request: Request) -> str:
    return str(request.path_params["approval_id"])
