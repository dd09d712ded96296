"""``/actions``: a service claims what it does once for a task, and settles it; over mutual TLS, with its X.509-SVID.

For services without a node agent beside them; the others ask at their socket. Whether a service may is decided by the use case.
"""

from datetime import UTC, datetime
from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from broker.audit.events import Event
from broker.errors import Invalid
from broker.server.api.http import shapes
from broker.server.api.http.body import read_object
from broker.server.api.http.description import Answer, Operation, Parameter, described
from broker.server.api.http.errors import NO_STORE
from broker.server.api.http.peers import idempotency_key, known_actor
from broker.server.api.http.services import HttpServices
from broker.server.tasks.actions import ClaimRequest, SettleRequest
from broker.spiffe import strictjson
from broker.spiffe.strictjson import JsonValue
from broker.tasks.action import ActionRecord, Claimed, effective_action_state

_JSON: Final = "application/json"
_CLAIM: Final = frozenset({"token", "action", "step", "identifier", "parameter_digest", "enforced"})
_SETTLE: Final = frozenset({"state", "outcome"})


@described(
    Operation(
        "claim_action",
        "Ask before something is done that must be done once: may it be done now, or was it done?",
        answers={
            201: Answer("do it now, and settle it afterwards", {_JSON: shapes.CLAIMED_ACTION}),
            200: Answer("it was done before: here is the outcome", {_JSON: shapes.CLAIMED_ACTION}),
        },
        headers=(Parameter("Idempotency-Key", "a repeated request is answered as the first"),),
        body={_JSON: shapes.NEW_ACTION},
    )
)
async def claim(request: Request, services: HttpServices) -> Response:
    """Let a service do something once, or tell it that it was done."""
    actor = await known_actor(request, services, Event.ACTION_REFUSED)
    async with services.refusals.recorded(Event.ACTION_REFUSED, actor, ""):
        sent = await read_object(request, allowed=_CLAIM)
        asked = ClaimRequest(
            token=_text(sent, "token") or "",
            action=_text(sent, "action") or "",
            step=_text(sent, "step") or "",
            identifier=_text(sent, "identifier"),
            parameter_digest=_text(sent, "parameter_digest"),
            enforced=_names(sent, "enforced"),
            idempotency_key=idempotency_key(request),
        )
    answer = await services.actions.claim(actor, asked)
    body = {"result": answer.result.value, **shown(answer.record, services)}
    if answer.result is Claimed.DUPLICATE:
        return JSONResponse(body, headers=NO_STORE)
    headers = {**NO_STORE, "location": f"{services.issuer}/actions/{answer.record.id}"}
    return JSONResponse(body, status_code=201, headers=headers)


@described(
    Operation(
        "settle_action",
        "Say what became of an action, also of one in doubt: that it was done, with its outcome, or that it was not.",
        answers={200: Answer("as it stands now", {_JSON: shapes.ACTION})},
        body={_JSON: shapes.SETTLEMENT},
    )
)
async def settle(request: Request, services: HttpServices) -> Response:
    """Take down what became of an action; to say the same twice is fine."""
    actor = await known_actor(request, services, Event.ACTION_REFUSED)
    async with services.refusals.recorded(Event.ACTION_REFUSED, actor, ""):
        sent = await read_object(request, allowed=_SETTLE)
        outcome = strictjson.canonical(sent["outcome"]).decode() if "outcome" in sent else ""
        asked = SettleRequest.parse(str(request.path_params["action_id"]), _text(sent, "state") or "", outcome)
    return JSONResponse(shown(await services.actions.settle(actor, asked), services), headers=NO_STORE)


def shown(record: ActionRecord, services: HttpServices) -> dict[str, JsonValue]:
    """Write one for programs; ``outcome`` is there where there is one, be it null."""
    body: dict[str, JsonValue] = {
        "id": record.id,
        "task": record.task,
        "state": effective_action_state(record, services.clock.now()).value,
        "claimed_at": _time(record.claimed_at),
        "settle_by": _time(record.settle_by),
        "settled_at": None if record.settled_at is None else _time(record.settled_at),
    }
    if record.outcome is not None:
        body["outcome"] = strictjson.loads(record.outcome.encode())
    return body


def _text(sent: dict[str, JsonValue], name: str) -> str | None:
    if name not in sent:
        return None
    value = sent[name]
    if not isinstance(value, str) or not value:
        raise Invalid(f"the member {name} is no text, or is empty", code="parameter_kind")
    return value


def _names(sent: dict[str, JsonValue], name: str) -> frozenset[str]:
    value = sent.get(name, [])
    names = [one for one in value if isinstance(one, str)] if isinstance(value, list) else []
    if not isinstance(value, list) or len(names) != len(value):
        raise Invalid(f"the member {name} is not a list of texts", code="parameter_kind")
    return frozenset(names)


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
