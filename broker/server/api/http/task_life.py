"""``/tasks`` and what is done to one of them: start, list, start another below, suspend, resume, complete, revoke, hand off.

For workloads, over mutual TLS. What they may do is decided by the use cases; a task that is another's does not exist here.
"""

import re
from typing import Final
from urllib.parse import parse_qsl

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from broker.audit.events import Event
from broker.errors import Invalid, Refused
from broker.server.api.http import shapes
from broker.server.api.http.body import NONCE, key_of, read_parameters
from broker.server.api.http.description import Answer, Parameter, Schema, described
from broker.server.api.http.description import Operation as Described
from broker.server.api.http.errors import NO_STORE
from broker.server.api.http.form import Form
from broker.server.api.http.peers import known_actor
from broker.server.api.http.services import HttpServices
from broker.server.api.http.tasks import expected_version, shown, task_id_of
from broker.server.api.http.token_formats import DELEGATION, JWT, SUBJECT_KINDS
from broker.server.store.ports import Reader
from broker.server.store.rows import TaskFilter
from broker.server.tasks.admission import identify
from broker.server.tasks.decision import own_task
from broker.server.tasks.requests import Actor, ChangeRequest, ChildRequest, Operation, StartRequest
from broker.server.tasks.subjects import SubjectKind
from broker.spiffe import SpiffeId
from broker.spiffe.strictjson import JsonValue
from broker.tasks import Authority, State, Supervision, Task

PAGE: Final = 100
MAX_PAGE: Final = 500
_TTL: Final = re.compile(r"[1-9][0-9]{0,8}")
_NEW: Final = frozenset({"purpose", "authorization_details", "ttl", "supervision", "limits", NONCE})
_START: Final = _NEW | {"subject_token", "subject_token_type"}
_CHILD: Final = _NEW | {"agent"}
_CHANGE: Final = frozenset({"expected_version", NONCE})
_HAND_OFF: Final = _CHANGE | {"to"}
_LIST: Final = frozenset({"state", "parent", "limit", "page_token"})


_LIMIT: Final = {"pattern": _TTL.pattern}
_KEY: Final = (Parameter("Idempotency-Key", "a repeated request is answered as the first"),)
_ABOUT_NONCE: Final = Parameter(NONCE, "the idempotency key, for who cannot set the header")
_ABOUT_CHANGES: Final = (
    Parameter("expected_version", "only if it still has this version", {"pattern": "[1-9][0-9]{0,14}"}),
    _ABOUT_NONCE,
)
_ABOUT_NEW: Final = (
    Parameter("purpose", "what it is for", required=True),
    Parameter("authorization_details", "what it may do, as JSON (RFC 9396)", required=True),
    Parameter("ttl", "its longest life in seconds", _LIMIT),
    Parameter("supervision", "what keeps it alive", {"enum": [one.value for one in Supervision]}),
    Parameter("limits", "none are metered yet"),
    _ABOUT_NONCE,
)


def _about(name: str, summary: str, form: tuple[Parameter, ...], *, status: int = 200) -> Described:
    """Say the same of the form and of the JSON object."""
    required = sorted(parameter.name for parameter in form if parameter.required)
    properties = {parameter.name: _as_json(parameter) for parameter in form}
    schema = {"type": "object", "required": required, "properties": properties, "additionalProperties": False}
    return Described(
        name,
        summary,
        {status: Answer("the task", {"application/json": shapes.TASK})},
        form=form,
        headers=_KEY,
        body={"application/json": schema},
        form_optional=not required,
    )


def _as_json(parameter: Parameter) -> Schema:
    if parameter.name == "authorization_details":
        return {"oneOf": [shapes.ref("AuthorizationDetails"), {"type": "string"}]}
    whole = {"type": "integer", "minimum": 1}
    return {"oneOf": [whole, dict(parameter.schema)]} if "pattern" in parameter.schema else dict(parameter.schema)


@described(
    _about(
        "start_task",
        "Start a task on a user's word; its tokens are asked for at the token endpoint.",
        (
            Parameter("subject_token", "the user's token, or a delegation's id", required=True),
            Parameter("subject_token_type", "its type (RFC 8693 §3)", {"enum": sorted({*SUBJECT_KINDS, DELEGATION})}),
            *_ABOUT_NEW,
        ),
        status=201,
    )
)
async def start(request: Request, services: HttpServices) -> Response:
    """Start a task on a user's word; its tokens are asked for at ``/token``."""
    actor = await known_actor(request, services, Event.TASK_REFUSED)
    async with services.refusals.recorded(Event.TASK_REFUSED, actor, ""):
        form = await read_parameters(request, allowed=_START)
        sent_kind, subject = form.get("subject_token_type") or JWT, form.require("subject_token")
        kind = SubjectKind.ANY if sent_kind == DELEGATION else SUBJECT_KINDS.get(sent_kind)
        if kind is None:
            raise Invalid("the subject token's type is not accepted", code="subject_token_type")
        asked = StartRequest(
            "" if sent_kind == DELEGATION else subject,
            form.require("purpose"),
            Authority.parse(form.require("authorization_details")),
            ttl=_ttl(form),
            supervision=_supervision(form),
            limits=form.get("limits") or "",
            kind=kind,
            idempotency_key=key_of(request, form),
            delegation_id=subject if sent_kind == DELEGATION else "",
        )
    task = await services.exchange.start(actor, asked)
    return _made(task, services)


@described(
    Described(
        "list_tasks",
        "List one's own tasks, oldest first.",
        {200: Answer("a page of tasks", {"application/json": shapes.TASKS})},
        query=(
            Parameter("state", "live, or the name of a state"),
            Parameter("parent", "only those directly below this task"),
            Parameter("limit", "most tasks of one page", _LIMIT),
            Parameter("page_token", "of the page before"),
        ),
    )
)
async def list_own(request: Request, services: HttpServices) -> Response:
    """List the caller's own tasks, oldest first, a page at a time."""
    actor = await known_actor(request, services, Event.TASK_REFUSED)
    wanted, after, limit = _listed(request, actor)

    def query(reader: Reader) -> tuple[list[Task], str | None]:
        caller = identify(reader, actor)
        page = reader.list_tasks(wanted, after=after, limit=limit)
        mine = []
        for task in page.tasks:
            try:
                mine.append(own_task((task,), caller))
            except Refused:
                # Another process's of the same workload.
                continue
        return mine, page.next

    tasks, following = await services.store.read(query)
    body: dict[str, JsonValue] = {"tasks": [shown(task, services) for task in tasks]}
    if following is not None:
        body["next_page_token"] = following
    return JSONResponse(body, headers=NO_STORE)


@described(
    _about(
        "start_child_task",
        "Start a task below one of one's own, for another workload, which fetches its own tokens.",
        (Parameter("agent", "SPIFFE ID of that workload", required=True), *_ABOUT_NEW),
        status=201,
    )
)
async def start_child(request: Request, services: HttpServices) -> Response:
    """Start a task below one of the caller's own, for another workload, which fetches its own tokens."""
    actor, parent = await known_actor(request, services, Event.TASK_REFUSED), task_id_of(request)
    async with services.refusals.recorded(Event.TASK_REFUSED, actor, parent):
        form = await read_parameters(request, allowed=_CHILD)
        asked = ChildRequest(
            parent,
            SpiffeId(form.require("agent")),
            form.require("purpose"),
            Authority.parse(form.require("authorization_details")),
            ttl=_ttl(form),
            supervision=_supervision(form),
            limits=form.get("limits") or "",
            idempotency_key=key_of(request, form),
        )
    child = await services.changes.start_child(actor, asked)
    return _made(child, services)


@described(_about("suspend_task", "Stop a task for a while: every token of it and below it dies.", _ABOUT_CHANGES))
async def suspend(request: Request, services: HttpServices) -> Response:
    """Stop a task for a while: its tokens die."""
    return await _changed(request, services, Operation.SUSPEND)


@described(_about("resume_task", "Let a suspended task go on: its tokens are asked for anew.", _ABOUT_CHANGES))
async def resume(request: Request, services: HttpServices) -> Response:
    """Let a suspended task go on: new tokens may be asked for."""
    return await _changed(request, services, Operation.RESUME)


@described(
    _about(
        "complete_task",
        "Say that the work of a task of one's own is done: it ends with every token of it.",
        _ABOUT_CHANGES,
    )
)
async def complete(request: Request, services: HttpServices) -> Response:
    """End a task of the caller's own; ending it twice is fine."""
    actor, task_id = await known_actor(request, services, Event.TASK_REFUSED), task_id_of(request)
    async with services.refusals.recorded(Event.TASK_REFUSED, actor, task_id):
        form = await read_parameters(request, allowed=_CHANGE)
        over = await services.lifecycle.complete(
            actor,
            task_id,
            expected_version=expected_version(form.get("expected_version")),
            idempotency_key=key_of(request, form),
        )
    return JSONResponse(shown(over.task, services, over.frame_seq), headers=NO_STORE)


@described(_about("revoke_task", "End a task unfinished, and all below it.", _ABOUT_CHANGES))
async def revoke(request: Request, services: HttpServices) -> Response:
    """End a task unfinished, and all below it."""
    return await _changed(request, services, Operation.REVOKE)


@described(
    _about(
        "hand_off_task",
        "Give the work to another workload: this task ends with all below it, its successor waits for that workload.",
        (Parameter("to", "SPIFFE ID of that workload", required=True), *_ABOUT_CHANGES),
    )
)
async def hand_off(request: Request, services: HttpServices) -> Response:
    """Give the work to another workload: the task ends, and its successor waits for that workload."""
    return await _changed(request, services, Operation.HAND_OFF)


def _made(task: Task, services: HttpServices) -> Response:
    headers = {**NO_STORE, "location": f"{services.issuer}/tasks/{task.id}"}
    return JSONResponse(shown(task, services), status_code=201, headers=headers)


async def _changed(request: Request, services: HttpServices, operation: Operation) -> Response:
    actor, task_id = await known_actor(request, services, Event.TASK_REFUSED), task_id_of(request)
    is_hand_off = operation is Operation.HAND_OFF
    async with services.refusals.recorded(Event.TASK_REFUSED, actor, task_id):
        form = await read_parameters(request, allowed=_HAND_OFF if is_hand_off else _CHANGE)
        asked = ChangeRequest(
            task_id,
            operation,
            to=SpiffeId(form.require("to")) if is_hand_off else None,
            expected_version=expected_version(form.get("expected_version")),
            idempotency_key=key_of(request, form),
        )
    changed = await services.changes.change(actor, asked)
    body = shown(changed.task, services, changed.frame_seq)
    if changed.successor is not None:
        body["successor"] = shown(changed.successor, services)
    return JSONResponse(body, headers=NO_STORE)


def _ttl(form: Form) -> int:
    text = form.get("ttl")
    if text is None:
        return 0
    if _TTL.fullmatch(text) is None:
        raise Invalid("the ttl is not a number of seconds", code="invalid_ttl")
    return int(text)


def _supervision(form: Form) -> Supervision | None:
    text = form.get("supervision")
    try:
        return None if text is None else Supervision(text)
    except ValueError:
        raise Invalid("there is no such supervision", code="invalid_supervision") from None


def _listed(request: Request, actor: Actor) -> tuple[TaskFilter, str | None, int]:
    """Read what a list is of, from the address: it holds nothing secret."""
    pairs = parse_qsl(request.scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True)
    asked = dict(pairs)
    if len(asked) != len(pairs) or not asked.keys() <= _LIST or "" in asked.values():
        raise Invalid("a parameter is not known here, empty, or there twice", code="parameter_unknown")
    state, limit = asked.get("state", ""), asked.get("limit", str(PAGE))
    if _TTL.fullmatch(limit) is None:
        raise Invalid("the limit is not a number from 1", code="invalid_page_size")
    try:
        only = State(state) if state not in {"", "live"} else None
    except ValueError:
        raise Invalid("there is no such state", code="invalid_state", hint="live, or the name of a state") from None
    wanted = TaskFilter(live=state == "live", state=only, agent=actor.spiffe_id, parent=asked.get("parent"))
    return wanted, asked.get("page_token"), min(int(limit), MAX_PAGE)
