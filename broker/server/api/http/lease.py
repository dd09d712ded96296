"""``/tasks/{id}/lease``: the heartbeat of a task that lives by one (supervision ``lease``)."""

from collections.abc import Mapping
from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from broker.audit.events import Event
from broker.server.api.http.body import read_parameters
from broker.server.api.http.description import Answer, Operation, described
from broker.server.api.http.errors import NO_STORE
from broker.server.api.http.peers import known_actor
from broker.server.api.http.services import HttpServices
from broker.server.api.http.tasks import task_id_of

_LEASE: Final[Mapping[str, object]] = {
    "type": "object",
    "required": ["id", "ttl", "expires_in"],
    "properties": {
        "id": {"type": "string", "description": "of the task"},
        "ttl": {"type": "number", "description": "seconds that a heartbeat may be missed"},
        "expires_in": {"type": "number", "description": "seconds until it is, by the server's steady clock"},
    },
}


@described(
    Operation(
        "renew_task_lease",
        "Send the heartbeat of a task of one's own whose supervision is lease. One that is missed suspends the task.",
        answers={200: Answer("how long the task lives without another", {"application/json": _LEASE})},
    )
)
async def renew(request: Request, services: HttpServices) -> Response:
    """Take a heartbeat in and say how long the task lives without another: durations, so that no wall clock matters."""
    actor, task_id = await known_actor(request, services, Event.TASK_REFUSED), task_id_of(request)
    async with services.refusals.recorded(Event.TASK_REFUSED, actor, task_id):
        await read_parameters(request, allowed=frozenset())
        lease = await services.supervisor.renew(actor, task_id)
    return JSONResponse({"id": task_id, "ttl": lease.ttl, "expires_in": lease.left}, headers=NO_STORE)
