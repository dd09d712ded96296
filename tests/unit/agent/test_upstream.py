"""Calls to the server: errors of our own kind, and a second attempt where a connection went."""

import grpc
import pytest

from broker.agent import upstream as module
from broker.agent.upstream import answered, answered_once_more
from broker.errors import BrokerError, Refused, Unavailable
from broker.transport.grpc_status import DETAILS_KEY, status_code, status_details


def failure(code: grpc.StatusCode, *told: tuple[str, bytes]):
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*told), details="words")


def failure_of(error: BrokerError):
    return failure(status_code(error), (DETAILS_KEY, status_details(error)))


class Calls:
    def __init__(self, *outcomes) -> None:
        self.outcomes, self.made = list(outcomes), 0

    async def __call__(self):
        self.made += 1
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


async def test_errors_are_ours() -> None:
    assert await answered(Calls(1)()) == 1
    for code, kind in [
        (grpc.StatusCode.UNAVAILABLE, Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Unavailable),
        (grpc.StatusCode.PERMISSION_DENIED, Refused),
    ]:
        with pytest.raises(kind, match="words"):
            await answered(Calls(failure(code))())


async def test_who_is_no_agent_to_the_server_has_no_identity_at_this_moment() -> None:
    with pytest.raises(Unavailable, match="no identity") as away:
        await answered(Calls(failure_of(Refused("the caller may not", code="access_denied")))())
    assert (away.value.reason, bool(away.value.hint)) == ("agent_unidentified", True)
    with pytest.raises(Refused) as banned:
        await answered(Calls(failure_of(Refused("banned", code="agent_banned")))())
    assert banned.value.reason == "agent_banned"


async def test_once_more_and_not_twice(monkeypatch) -> None:
    away = failure(grpc.StatusCode.UNAVAILABLE)
    calls = Calls(away, 7)
    assert await answered_once_more(calls) == 7
    with pytest.raises(Unavailable):
        await answered_once_more(Calls(away, away, 7))
    refused = Calls(failure(grpc.StatusCode.PERMISSION_DENIED), 7)
    with pytest.raises(Refused):
        await answered_once_more(refused)
    assert refused.made == 1
    # What took long was no mere change of connections.
    monkeypatch.setattr(module, "QUICK_FAILURE", -1.0)
    slow = Calls(away, 7)
    with pytest.raises(Unavailable):
        await answered_once_more(slow)
    assert slow.made == 1


async def test_while_connections_go_the_call_is_made_again_a_few_times(monkeypatch) -> None:
    monkeypatch.setattr(module, "QUICK_FAILURE", -1.0)
    away, lost = failure(grpc.StatusCode.UNAVAILABLE), []

    def gone(*outcomes):
        calls = Calls(*outcomes)

        async def call():
            lost.append(1)
            return await calls()

        return call

    assert await answered_once_more(gone(away, away, away, 7), lambda: len(lost)) == 7
    with pytest.raises(Unavailable):
        await answered_once_more(gone(*[away] * module.MAX_ATTEMPTS, 7), lambda: len(lost))
