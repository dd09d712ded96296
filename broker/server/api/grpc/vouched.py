"""Whom a node agent speaks for: which process asks is its word, taken only for entries that it may serve."""

from datetime import UTC, datetime
from functools import lru_cache
from typing import Final

from broker._proto.broker.server.v1 import sessions_pb2
from broker.errors import Invalid
from broker.server.api.access import Caller, agent_of
from broker.server.tasks.requests import Actor, Door
from broker.spiffe import SpiffeId
from broker.spiffe.jose import MAX_DATE
from broker.tasks.texts import ID, SERIAL_NUMBER, THUMBPRINT

WORKLOADS_KEPT: Final = 2_048
"""Workloads whose description is not read twice, for each of them says it again with every token: those of a hundred nodes."""
WORKLOAD_BYTES: Final = 1_024
"""Longest description that is kept: usual ones have a third of that."""


def vouched(workload: sessions_pb2.WorkloadSession, caller: Caller) -> Actor:
    """Read whom a node agent speaks for; raises Refused for another caller, Invalid for half a workload."""
    told, agent = workload.SerializeToString(), agent_of(caller).id
    return _known_actor(told, agent) if len(told) <= WORKLOAD_BYTES else _actor(told, agent)


def _actor(told: bytes, agent: SpiffeId) -> Actor:
    """Read an agent's words of a workload; whether they are true, and still, is judged with each request."""
    workload = sessions_pb2.WorkloadSession.FromString(told)
    if ID.fullmatch(workload.id) is None or THUMBPRINT.fullmatch(workload.x5t) is None or not workload.entry_id:
        raise Invalid("the workload's session, entry or certificate is missing or malformed", code="workload_missing")
    if workload.run and ID.fullmatch(workload.run) is None:
        raise Invalid("the run of the agent is malformed", code="invalid_run")
    if SERIAL_NUMBER.fullmatch(workload.serial_number) is None:
        raise Invalid("the certificate's serial number is malformed", code="invalid_serial")
    if not 0 < workload.not_after <= MAX_DATE:
        raise Invalid("the end of the workload's certificate is missing", code="workload_missing")
    return Actor(
        spiffe_id=SpiffeId(workload.spiffe_id),
        x5t=workload.x5t,
        not_after=datetime.fromtimestamp(workload.not_after, UTC),
        door=Door.AGENT,
        session=workload.id,
        entry_id=workload.entry_id,
        agent=agent,
        serial=workload.serial_number,
        run=workload.run,
    )


_known_actor = lru_cache(maxsize=WORKLOADS_KEPT)(_actor)
