"""``/tasks/{id}``: a workload looks at its own task, and says that it is done.

A task that is another's does not exist here: the answer is the same as for one that was never made.
"""

import re
from datetime import UTC, datetime
from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from broker.errors import Invalid, Refused
from broker.server.api.http import shapes
from broker.server.api.http.description import Answer, Operation, Parameter, described
from broker.server.api.http.errors import NO_STORE
from broker.server.api.http.form import read_form
from broker.server.api.http.peers import actor_of, idempotency_key
from broker.server.api.http.services import HttpServices
from broker.server.store.ports import Reader
from broker.server.tasks.admission import identify
from broker.server.tasks.decision import own_task, task_unknown
from broker.server.tasks.requests import Actor
from broker.spiffe.strictjson import JsonValue
from broker.tasks import Task, effective_state
from broker.tasks.texts import ID

_ALLOWED: Final = frozenset({"expected_version"})
_VERSION: Final = re.compile(r"[1-9][0-9]{0,14}")


_SHOWN: Final = {200: Answer("the task", {"application/json": shapes.TASK})}


@described(Operation("get_task", "Look at a task of one's own.", answers=_SHOWN))
async def show(request: Request, services: HttpServices) -> Response:
    """Give one task of the caller's own."""
    actor, task_id = actor_of(request, services), own_task_id(request)
    task = await services.store.read(lambda reader: _own(reader, actor, task_id))
    return JSONResponse(_shown(task, services, services.feed.frame_of(task.id)), headers=NO_STORE)


@described(
    Operation(
        "complete_task",
        "Say that the work of a task of one's own is done: it ends with every token of it.",
        answers=_SHOWN,
        form=(Parameter("expected_version", "only if it still has this version", {"pattern": _VERSION.pattern}),),
        form_optional=True,
        headers=(Parameter("Idempotency-Key", "a repeated request is answered as the first"),),
    )
)
async def complete(request: Request, services: HttpServices) -> Response:
    """End a task of the caller's own; ending it twice is fine."""
    actor, task_id = actor_of(request, services), own_task_id(request)
    form = await read_form(request, allowed=_ALLOWED, body_optional=True)
    over = await services.lifecycle.complete(
        actor,
        task_id,
        expected_version=_expected(form.get("expected_version")),
        idempotency_key=idempotency_key(request),
    )
    frame = over.frame_seq or services.feed.frame_of(task_id)
    return JSONResponse(_shown(over.task, services, frame), headers=NO_STORE)


def _own(reader: Reader, actor: Actor, task_id: str) -> Task:
    try:
        return own_task(reader.lineage(task_id), identify(reader, actor))
    except Refused:
        raise task_unknown() from None


def own_task_id(request: Request) -> str:
    """Give the task that the path names; raises NotFound for what is no id."""
    task_id = request.path_params["task_id"]
    if not isinstance(task_id, str) or ID.fullmatch(task_id) is None:
        raise task_unknown()
    return task_id


def _expected(text: str | None) -> int | None:
    if text is None:
        return None
    if _VERSION.fullmatch(text) is None:
        raise Invalid("expected_version is not a version", code="invalid_version")
    return int(text)


def _shown(task: Task, services: HttpServices, frame_seq: int) -> dict[str, JsonValue]:
    body: dict[str, JsonValue] = {
        "id": task.id,
        "root": task.root,
        "parent": task.parent,
        "depth": task.depth,
        "user": task.user,
        "agent": str(task.agent),
        "purpose": task.purpose,
        "authorization_details": task.authority.to_json(),
        "supervision": task.supervision.value,
        "state": effective_state(task, services.clock.now()).value,
        "version": task.version,
        "cause": None if task.cause is None else task.cause.value,
        "created_at": _time(task.created_at),
        "expires_at": _time(task.expires_at),
        "ended_at": None if task.ended_at is None else _time(task.ended_at),
    }
    if frame_seq:
        delivery = services.feed.delivery(frame_seq)
        body["revocation"] = {
            "state": delivery.outcome.value,
            "seq": frame_seq,
            "expected": delivery.expected,
            "acked": delivery.acked,
            "max_ms": round(delivery.max_seconds * 1000, 3),
        }
    return body


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
