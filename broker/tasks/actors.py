"""The claim ``act``: a chain of agents, written and read (RFC 8693 §4.1)."""

from collections.abc import Sequence

from broker.errors import InvalidSpiffeId, InvalidToken
from broker.spiffe import SpiffeId
from broker.spiffe.strictjson import JsonValue
from broker.tasks.task import MAX_ACT_DEPTH


def nested_act(chain: Sequence[SpiffeId]) -> JsonValue:
    """Write a chain of agents, the present actor first, as the claim ``act`` (RFC 8693 §4.1)."""
    value: dict[str, JsonValue] = {}
    for agent in reversed(chain):
        value = {"sub": str(agent), "act": value} if value else {"sub": str(agent)}
    return value


def read_act(value: JsonValue) -> tuple[SpiffeId, ...]:
    """Read a claim ``act``, the present actor first; raises InvalidToken."""
    chain: list[SpiffeId] = []
    while True:
        # NOTE(security): an actor is its ID and its history, nothing that could be taken for a claim (RFC 8693 §4.1).
        if not isinstance(value, dict) or not value.keys() <= {"sub", "act"} or len(chain) == MAX_ACT_DEPTH:
            raise InvalidToken("the claim act is malformed or too deep", code="token_act")
        agent = value.get("sub")
        if not isinstance(agent, str):
            raise InvalidToken("an actor's sub is missing or not text", code="token_act")
        try:
            chain.append(SpiffeId(agent))
        except InvalidSpiffeId as error:
            raise InvalidToken(f"an actor is not a SPIFFE ID: {error.message}", code="token_act") from None
        if "act" not in value:
            return tuple(chain)
        value = value["act"]
