"""``/tasks/{id}``: a workload looks at its own task; and what all that is done to one has in common: ids, versions, how it is shown.

A task that is another's does not exist here: the answer is the same as for one that was never made.
"""

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from broker.audit.events import Event
from broker.errors import Invalid, Refused
from broker.server.api.http import shapes
from broker.server.api.http.description import Answer, Operation, described
from broker.server.api.http.errors import NO_STORE
from broker.server.api.http.peers import known_actor
from broker.server.api.http.services import HttpServices
from broker.server.store.ports import Reader
from broker.server.tasks.admission import identify
from broker.server.tasks.decision import own_task, task_unknown
from broker.server.tasks.requests import Actor
from broker.spiffe.strictjson import JsonValue
from broker.tasks import State, Task, effective_state, lineage_state
from broker.tasks.texts import ID

_VERSION: Final = re.compile(r"[1-9][0-9]{0,14}")


_SHOWN: Final = {200: Answer("the task", {"application/json": shapes.TASK})}


@described(Operation("get_task", "Look at a task of one's own.", answers=_SHOWN))
async def show(request: Request, services: HttpServices) -> Response:
    """Give one task of the caller's own."""
    actor, task_id = await known_actor(request, services, Event.TASK_REFUSED), task_id_of(request)
    async with services.refusals.recorded(Event.TASK_REFUSED, actor, task_id):
        lineage = await services.store.read(lambda reader: _own(reader, actor, task_id))
    return JSONResponse(shown(lineage[-1], services, ancestors=lineage[-2::-1]), headers=NO_STORE)


def _own(reader: Reader, actor: Actor, task_id: str) -> tuple[Task, ...]:
    """Give the task and its ancestors, root first; to the agents above it, too: they started it."""
    lineage = reader.lineage(task_id)
    try:
        caller = identify(reader, actor)
        own_task([each for each in lineage if each.agent == caller.actor.spiffe_id], caller)
    except Refused:
        raise task_unknown() from None
    return lineage


def task_id_of(request: Request) -> str:
    """Give the id in the address; raises NotFound for what cannot be one."""
    task_id = request.path_params["task_id"]
    if not isinstance(task_id, str) or ID.fullmatch(task_id) is None:
        raise task_unknown()
    return task_id


def expected_version(text: str | None) -> int | None:
    """Read the version that a change expects; None for any; raises Invalid."""
    if text is None:
        return None
    if _VERSION.fullmatch(text) is None:
        raise Invalid("expected_version is not a version", code="invalid_version")
    return int(text)


def shown(
    task: Task, services: HttpServices, frame_seq: int = 0, *, ancestors: Sequence[Task] = ()
) -> dict[str, JsonValue]:
    """Show a task, and how far the frame has come that told of its end or suspension; with its ancestors as they stand."""
    now = services.clock.now()
    state = lineage_state(task, ancestors, now) if ancestors else effective_state(task, now)
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
        "state": state.value,
        "version": task.version,
        "cause": None if task.cause is None else task.cause.value,
        "created_at": _time(task.created_at),
        "expires_at": _time(task.expires_at),
        "ended_at": None if task.ended_at is None else _time(task.ended_at),
    }
    if task.supersedes is not None:
        body["supersedes"] = task.supersedes
    frame_seq = frame_seq or (0 if task.state is State.ACTIVE else services.feed.frame_of(task.id))
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
