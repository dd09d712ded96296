"""Attacks on what a node's token requests share: one stream to the server. Through the agent's real socket and the real TLS port.

Who asks beside others gets what is its own, is refused for what is its own, and leaves the same records as alone.
"""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from broker._proto.broker.agent.v1 import tasks_pb2
from broker.audit.events import Event
from broker.clock import SystemClock
from broker.spiffe import jose
from broker.tasks import Resource, verify_task_token
from broker.transport.rpc_errors import from_rpc_error
from tests.attacks.tasks.outward_rig import (
    DETAILS,
    NEIGHBOUR,
    TICKETS,
    TRIAGE,
    WIKI,
    Rig,
    by_socket,
    rig,
    started,
)
from tests.fakes.running_agent import HEADER, until

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
async def house() -> AsyncIterator[Rig]:
    async with rig() as made:
        yield made


async def outcome(made: Rig, **fields: Any) -> Any:
    """A token, or the stable code of what was said instead."""
    try:
        return await by_socket(made, **fields)
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error).reason


async def test_in_a_crowd_each_gets_what_it_would_get_alone(house: Rig) -> None:
    task = await started(house)
    over = await started(house)
    await house.socket.CompleteTask(
        tasks_pb2.CompleteTaskRequest(task_id=over.id, spiffe_id=str(TRIAGE)), metadata=HEADER, timeout=20
    )
    mine = {"spiffe_id": str(TRIAGE), "task_id": task.id, "resource": TICKETS}
    wanted: list[tuple[dict[str, Any], str]] = [
        (mine, "issued"),
        (mine | {"scope": "ticket.read"}, "issued"),
        (mine | {"idempotency_key": "again"}, "issued"),
        (mine | {"scope": "ticket.delete"}, "invalid_scope"),
        (mine | {"resource": WIKI}, "invalid_target"),
        (mine | {"spiffe_id": str(NEIGHBOUR)}, "task_unknown"),
        (mine | {"task_id": over.id}, "task_ended"),
        (
            mine | {"authorization_details": json.dumps([DETAILS[0] | {"actions": ["ticket.delete"]}])},
            "invalid_authorization_details",
        ),
        (mine | {"resource": "no resource"}, "invalid_target"),
    ]
    alone = [await outcome(house, **fields) for fields, _ in wanted]
    for answer, (fields, code) in zip(alone, wanted, strict=True):
        assert (answer if isinstance(answer, str) else "issued") == code, fields
    before = Counter(record.event for record in house.records())
    crowd = [(fields, code) for _ in range(8) for fields, code in wanted]
    answers = await asyncio.gather(*(outcome(house, **fields) for fields, _ in crowd))
    ids: list[str] = []
    keys = await house.keys()
    for answer, (fields, code) in zip(answers, crowd, strict=True):
        if isinstance(answer, str):
            assert answer == code, fields
            continue
        assert code == "issued", fields
        verified = verify_task_token(
            answer.access_token,
            keys,
            issuer=house.issuer,
            audience=Resource(TICKETS),
            now=SystemClock().now(),
        )
        assert (verified.claims.client_id, verified.claims.task.id) == (TRIAGE, task.id)
        assert answer.scope == (fields.get("scope") or verified.claims.scope)
        ids.append(verified.claims.jti)
    # The same idempotency key is the same token, as it was alone; every other one is a token of its own.
    again = jose.parse_compact(alone[2].access_token).payload["jti"]
    assert Counter(ids)[again] == 8
    assert len(set(ids)) == 1 + 16
    written = Counter(record.event for record in house.records()) - before
    assert written[Event.TOKEN_ISSUED] == 16
    assert written[Event.TOKEN_REFUSED] == sum(code != "issued" for _, code in crowd)
    assert house.agent.agent._tokens._number >= len(crowd)  # all of it went by the stream


async def test_a_ban_ends_what_is_asked_for_and_nothing_is_issued_after_it(house: Rig) -> None:
    task = await started(house)
    is_over = False
    answers: list[Any] = []

    async def asking() -> None:
        while not is_over:
            answers.append(await outcome(house, spiffe_id=str(TRIAGE), task_id=task.id, resource=TICKETS))

    callers = [asyncio.create_task(asking()) for _ in range(8)]
    await until(lambda: len(answers) >= 40)
    assert not [one for one in answers if isinstance(one, str)]
    await house.estate.nodes.ban(house.agent.agent.node.id)
    banned_at = len(house.records(Event.TOKEN_ISSUED))
    await until(lambda: sum(isinstance(one, str) for one in answers) >= 8)
    is_over = True
    await asyncio.gather(*callers)
    assert len(house.records(Event.TOKEN_ISSUED)) == banned_at
    assert {one for one in answers if isinstance(one, str)} <= {
        "agent_banned",
        "agent_unidentified",
        "unavailable",
        "server_away",
        "no_identity_issued",
        "not_synced",
    }
