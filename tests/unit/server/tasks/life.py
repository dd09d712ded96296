"""What the tests of task life share: a chain of agents, each with an entry and a process, and what is done to their tasks."""

from collections.abc import Sequence
from typing import Any

from broker.server.tasks.requests import Actor, ChangeRequest, ChildRequest, IssuedToken, Operation
from broker.spiffe import SpiffeId
from broker.tasks import Task
from tests.unit.server.tasks.estate import AGENT, NEIGHBOUR, OTHER_NODE, X5T_3, Estate, authority, entry

OPERATOR = "operator:uid:0"


def neighbour(estate: Estate, **fields: Any) -> Actor:
    """The other workload, on the other node."""
    other = {"spiffe_id": NEIGHBOUR, "agent": OTHER_NODE, "session": "ws_9", "x5t": X5T_3, "entry_id": "entry-2"}
    return estate.actor(**other | fields)


def hop(estate: Estate, number: int, **fields: Any) -> Actor:
    """The agent at a place of a chain; the first one is the estate's own."""
    if number == 0:
        return estate.actor(**fields)
    mine = {
        "spiffe_id": SpiffeId(f"spiffe://example.org/hop/{number}"),
        "session": f"ws_hop_{number}",
        "x5t": f"{number:0>42}w",
        "entry_id": f"entry-hop-{number}",
    }
    return estate.actor(**mine | fields)


async def register(estate: Estate, number: int) -> None:
    """Let the agent at a place of a chain have tasks."""
    await estate.put_entry(entry(f"entry-hop-{number}", hop(estate, number).spiffe_id))
    await estate.directory.load(estate.store)


async def child(estate: Estate, parent: Task, of: Actor, to: SpiffeId = NEIGHBOUR, **fields: Any) -> Task:
    asked = ChildRequest(**{"parent": parent.id, "agent": to, "purpose": "a part", "authority": authority()} | fields)
    return await estate.changes.start_child(of, asked)


async def change(estate: Estate, actor: Actor | str, task: Task | str, operation: Operation, **fields: Any) -> Any:
    asked = ChangeRequest(task if isinstance(task, str) else task.id, operation, **fields)
    if isinstance(actor, str):
        return await estate.changes.change_as_operator(actor, asked)
    return await estate.changes.change(actor, asked)


async def chain(estate: Estate, length: int) -> list[tuple[Actor, Task]]:
    """Start a task and one below the other, each taken up by its own agent."""
    line = [(estate.actor(), await estate.start())]
    for number in range(1, length):
        await register(estate, number)
        actor = hop(estate, number)
        below = await child(estate, line[-1][1], line[-1][0], actor.spiffe_id)
        line.append((actor, (await change(estate, actor, below, Operation.ATTACH)).task))
    return line


async def is_alive(estate: Estate, tokens: Sequence[IssuedToken], agent: SpiffeId = AGENT) -> list[bool]:
    """Ask the server itself, as the token's own actor."""
    return [await estate.tokens.introspect(each.access_token, agent) is not None for each in tokens]
