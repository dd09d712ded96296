"""What the server is told of sessions: everything, in order, until it has heard."""

import asyncio
import os

import grpc
import pytest

from broker._proto.broker.server.v1 import sessions_pb2
from broker.agent import reports as module
from broker.agent.reports import SessionReports, session_message
from broker.agent.sessions import Identity
from broker.errors import Unavailable
from broker.tasks.causes import SessionEnd
from tests.fakes.fake_server import entry_message
from tests.fakes.running_agent import estate, until


class Leaf:
    shared = False

    class svid:  # noqa: N801
        serial = 10
        x5t = "x5t"

        class not_after:  # noqa: N801
            @staticmethod
            def timestamp() -> float:
                return 99.5


def identity(number: int, entry) -> Identity:
    return Identity(f"ws_{number}", entry, Leaf())


class Server:
    """Answers, or is away."""

    def __init__(self) -> None:
        self.heard: list[sessions_pb2.ReportSessionsRequest] = []
        self.is_away = False

    @property
    def sessions(self) -> "Server":
        return self

    async def ReportSessions(self, request, timeout):
        if self.is_away:
            raise Unavailable("away")
        self.heard.append(request)
        return sessions_pb2.ReportSessionsResponse()

    async def pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


@pytest.fixture
async def entry():
    async with estate() as agent:
        yield agent.agent.cache.entry("e1")


async def test_what_was_not_heard_is_kept_and_an_end_overtakes_its_beginning(entry) -> None:
    server = Server()
    reports = SessionReports(server)
    one, two = identity(1, entry), identity(2, entry)
    reports.leaf(one)
    reports.leaf(two)
    server.is_away = True
    with pytest.raises(Unavailable):
        await reports.tell()
    reports.ended([one], SessionEnd.PROCESS_CHANGED)
    server.is_away = False
    await reports.tell()
    (request,) = server.heard
    assert [message.id for message in request.current] == ["ws_2"]
    assert list(request.ended) == ["ws_1"]
    assert dict(request.causes) == {"ws_1": sessions_pb2.SESSION_END_PROCESS_CHANGED}
    assert request.current[0] == sessions_pb2.WorkloadSession(
        id="ws_2",
        spiffe_id=str(entry.spiffe_id),
        entry_id="e1",
        x5t="x5t",
        not_after=99,
        serial_number="a",
        run=reports.run_id,
    )
    assert reports.is_settled


async def test_long_reports_are_cut_and_the_untold_is_bounded(entry, monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_REPORT", 2)
    monkeypatch.setattr(module, "MAX_ENDED", 5)
    server = Server()
    reports = SessionReports(server)
    reports.again(identity(n, entry) for n in range(3))
    while not reports.is_settled:
        await reports.tell()
    assert [len(request.current) for request in server.heard] == [2, 1]
    reports.ended((identity(n, entry) for n in range(9)), SessionEnd.PROCESS_EXITED)
    assert list(reports._ended) == [f"ws_{n}" for n in range(4, 9)]


async def test_after_a_reconnection_the_living_are_told_again() -> None:
    async with estate() as agent:
        await agent.x509()
        await until(lambda: len(agent.server.sessions) == 1)
        agent.server.sessions.clear()
        agent.server.drop()
        await until(lambda: len(agent.server.sessions) == 1)


async def test_a_shared_leaf_is_nobodys(entry) -> None:
    shared = Leaf()
    shared.shared = True
    with pytest.raises(ValueError, match="its own"):
        session_message(Identity("ws_1", entry, shared))
    reports = SessionReports(Server())
    reports.again([Identity("ws_1", entry, shared), Identity("ws_2", entry)])
    assert reports.is_settled


@pytest.mark.bears("L03")
async def test_refusals_are_told_in_sum_and_bounded(monkeypatch) -> None:
    monkeypatch.setattr(module, "REFUSALS_EVERY", 0.05)
    monkeypatch.setattr(module, "MAX_REFUSED", 3)
    server = Server()
    reports = SessionReports(server)
    assert reports.is_settled
    for _ in range(100):
        reports.refused("no_identity", 4001)
    for uid in range(5000, 5010):
        reports.refused("no_identity", uid)
    assert reports.is_settled  # nothing that could not wait
    telling = asyncio.create_task(reports.run())
    try:
        server.is_away = True
        await until(lambda: reports._are_refusals_due)
        server.is_away = False
        await until(lambda: server.heard)
        told = [(one.code, one.uid, one.count) for one in server.heard[0].refused]
        assert told == [("no_identity", 4001, 100), ("no_identity", 5000, 1), ("other", -1, 9)]
        assert not reports._refused
        reports.refused("no_identity", 4001)  # and the next ten seconds
        await until(lambda: len(server.heard) == 2)
        assert server.heard[1].refused[0].count == 1
    finally:
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)


@pytest.mark.bears("L03")
async def test_a_refusal_at_the_socket_reaches_the_server(monkeypatch) -> None:
    monkeypatch.setattr(module, "REFUSALS_EVERY", 0.05)
    async with estate(entries=[entry_message("e1", "/x", ["unix:uid:4294967"])]) as agent:
        with pytest.raises(grpc.aio.AioRpcError):
            await agent.x509()
        await until(lambda: agent.server.refused)
        ((_, uid, count),) = agent.server.refused
        assert (uid, count) == (os.geteuid(), 1)
