"""Whoever keeps a token, or an answer that rests on one, keeps it no longer than the state: a real server, node agent and socket.

The SDK keeps tokens for an agent's next calls, a verifier keeps what it has verified. Each has its token in memory when the end comes
from elsewhere. What goes by itself after a silence is told apart from what an event dropped: only a drop leaves nothing behind.
"""

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass

import grpc.aio
import pytest
from cryptography import x509

from broker._proto.broker.server.v1 import revocations_pb2
from broker.audit.records import Record
from broker.client import dial_socket
from broker.client.delegations import Stops
from broker.client.revocations import Revocations
from broker.client.tasks import Tasks
from broker.errors import BrokerError, Conflict, Refused
from broker.sdk import Task, Workload
from broker.sdk.kept import HEARD_WITHIN
from broker.sdk.task_blocks import TaskBlock
from broker.sdk.verify import TokenVerifier
from broker.server.tasks.signals import LOGOUT_EVENT
from tests.attacks.tasks.outward_rig import DETAILS, SERVICE, TICKETS, TRIAGE, WIKI, Rig, rig
from tests.fakes.running_agent import until

pytestmark = pytest.mark.timeout(180)

BOUND = 5.0
"""Seconds within which an event must have come; here it takes milliseconds."""


@dataclass
class Work:
    """A task in this process, its kept token, and a verifier that has accepted it."""

    house: Rig
    task: Task
    verifier: TokenVerifier
    token: str = ""

    async def shown(self) -> None:
        """Take a token, and show it until the verifier answers from what it keeps."""
        self.token = await self.task.token(TICKETS)
        await until(lambda: self.says() == "alive")
        assert await self.task.token(TICKETS) == self.token
        assert self.task.is_kept(self.token)
        await until(lambda: self.silence() < HEARD_WITHIN)

    def says(self) -> str:
        chain, _, _ = self.house.files[TRIAGE]
        try:
            self.verifier.verify_now(self.token, chain)
        except BrokerError as error:
            return error.reason
        return "alive"

    def silence(self) -> float:
        (kept,) = self.task._kept._kept.values()
        return self.task._workload.watch.silence(kept)

    async def dropped(self, *codes: str) -> None:
        """Wait until nothing is kept and the verifier refuses what it had accepted."""
        began = time.monotonic()
        await until(lambda: len(self.task._kept) == 0, BOUND)
        assert time.monotonic() - began < HEARD_WITHIN, "it went by the silence, not by the event"
        await until(lambda: self.says() != "alive", BOUND)
        assert self.says() in codes

    async def refused(self) -> Refused:
        with pytest.raises(Refused) as caught:
            await self.task.token(TICKETS)
        assert len(self.task._kept) == 0
        return caught.value

    def records(self, event: str) -> list[Record]:
        return [one for one in self.house.records(event) if one.subject == self.task.id]


@pytest.fixture
async def house() -> AsyncIterator[Rig]:
    async with rig(allow_unsupervised=True) as made:
        yield made


@asynccontextmanager
async def working(house: Rig, supervision: str = "", **claims: str) -> AsyncIterator[Work]:
    async with AsyncExitStack() as stack:
        at = f"unix:{house.agent.socket}"
        me = await stack.enter_async_context(Workload.connect(at, spiffe_id=TRIAGE))
        service = await stack.enter_async_context(Workload.connect(at, spiffe_id=SERVICE))
        await me.identity(timeout=30)
        verifier = await TokenVerifier.discover(house.issuer, audience=TICKETS, workload=service, timeout=30)
        await stack.enter_async_context(verifier)
        block = me.task(
            user_token=house.user_token(**claims),
            purpose="triage",
            authorization_details=DETAILS,
            supervision=supervision,
        )
        task = await block.__aenter__()
        stack.push_async_callback(_leave, block)
        work = Work(house, task, verifier)
        await work.shown()
        yield work


async def _leave(block: TaskBlock) -> None:
    # Whose task was ended elsewhere is told so when the block is left.
    with suppress(Conflict, Refused):
        await block.__aexit__(None, None, None)


@asynccontextmanager
async def channel_to(house: Rig) -> AsyncIterator[grpc.aio.Channel]:
    channel = dial_socket(house.estate.directory / "server" / "private" / "api.sock")
    try:
        yield channel
    finally:
        await channel.close()


@asynccontextmanager
async def operator(house: Rig) -> AsyncIterator[tuple[Tasks, Stops]]:
    async with channel_to(house) as channel:
        yield Tasks(channel), Stops(channel)


@pytest.mark.bears("RV23")
@pytest.mark.parametrize("supervision", ["attached", "lease", "none"])
async def test_a_revoked_task_leaves_no_token_at_its_agent(house: Rig, supervision: str) -> None:
    async with working(house, supervision) as work, operator(house) as (tasks, _):
        await tasks.revoke(work.task.id, reason="wrong ticket")
        await work.dropped("task_ended")
        refusal = await work.refused()
        assert (refusal.reason, refusal.message) == ("task_ended", "the task is revoked (operator)")
        (ended,) = work.records("task_ended")
        assert (ended.fields["cause"], ended.fields["reasons"]) == ("operator", ("wrong ticket",))
        assert [one.fields["reason"] for one in work.records("token_refused")] == ["task_ended"]


@pytest.mark.bears("RV23")
async def test_a_suspended_task_has_another_token_when_it_goes_on(house: Rig) -> None:
    async with working(house) as work, operator(house) as (tasks, _):
        await tasks.change(work.task.id, "suspend", reason="looks odd")
        await work.dropped("task_suspended")
        assert (await work.refused()).reason == "task_suspended"
        before = work.token
        await tasks.change(work.task.id, "resume")
        await work.shown()
        assert work.token != before
        assert len(work.records("task_suspended")) == len(work.records("task_resumed")) == 1


@pytest.mark.bears("RV23")
async def test_a_revoked_token_is_replaced_and_the_others_stay(house: Rig) -> None:
    async with working(house) as work:
        reading = await work.task.token(TICKETS, scope="ticket.read")
        answer = await house.post("/revoke", [("token", work.token)])
        assert answer.status_code == 200
        await until(lambda: not work.task.is_kept(work.token), BOUND)
        assert work.task.is_kept(reading)
        await until(lambda: work.says() == "token_revoked", BOUND)
        before = work.token
        work.token = await work.task.token(TICKETS)
        assert work.token != before
        assert work.says() == "alive"
        assert [one.actor for one in work.records("token_revoked")] == [str(TRIAGE)]


@pytest.mark.bears("RV23")
async def test_a_user_who_signs_out_or_is_disabled_leaves_no_token(house: Rig) -> None:
    async with working(house, sid="s-1") as work:
        now = int(time.time())
        word = {
            "aud": "broker",
            "iat": now,
            "exp": now + 60,
            "jti": "out-1",
            "sid": "s-1",
            "events": {LOGOUT_EVENT: {}},
        }
        token = house.estate.oidc.token("alice", header={"typ": "logout+jwt"}, **word)
        answer = await house.post("/backchannel-logout", [("logout_token", token)])
        assert answer.status_code == 200, answer.text
        await work.dropped("task_ended")
        assert (await work.refused()).message == "the task is revoked (user_logout)"
        assert [one.fields["cause"] for one in work.records("task_ended")] == ["user_logout"]
    async with working(house, sub="bob") as work, operator(house) as (_, stops):
        await stops.disable("bob", reason="left the company")
        await work.dropped("task_ended")
        assert (await work.refused()).message == "the task is revoked (user_disabled)"
        assert [one.fields["cause"] for one in work.records("task_ended")] == ["user_disabled"]


@pytest.mark.bears("RV23")
async def test_a_workload_session_that_is_over_leaves_no_token(house: Rig) -> None:
    async with working(house) as work:
        (leaf, *_), _, _ = house.files[TRIAGE]
        serial = x509.load_der_x509_certificate(leaf).serial_number
        async with channel_to(house) as channel:
            wanted = revocations_pb2.RevokeSvidsRequest(
                reason=revocations_pb2.REVOCATION_REASON_KEY_COMPROMISE,
                serial=revocations_pb2.SerialNumber(serial_number=f"{serial:x}"),
            )
            assert len((await Revocations(channel).revoke(wanted)).sessions_ended) == 1
        # The session's frame comes first, the task's right behind it.
        await work.dropped("session_ended", "task_ended")
        # The process lives, and is another session from now on: the task was never that one's.
        assert (await work.refused()).reason == "session_mismatch"
        assert [one.fields["cause"] for one in work.records("task_ended")] == ["svid_revoked"]
        assert len(house.records("session_ended")) == 1


@pytest.mark.bears("RV23")
async def test_the_end_of_another_task_drops_nothing(house: Rig) -> None:
    async with working(house) as mine, working(house, sub="bob") as other, operator(house) as (tasks, stops):
        heard = mine.verifier.feed.seq
        await stops.stop(audience=WIKI, reason="down")
        await tasks.revoke(other.task.id)
        await other.dropped("task_ended")
        await until(lambda: mine.verifier.feed.seq > heard)
        await until(lambda: mine.silence() < 0.5)
        assert mine.task.is_kept(mine.token)
        assert await mine.task.token(TICKETS) == mine.token
        assert len(house.records("token_issued")) == 2


@pytest.mark.bears("RV23")
async def test_where_no_event_comes_a_silence_is_no_good_news(house: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node agent that passes nothing on: what is kept is asked about within seconds, and the end is known."""
    async with working(house) as work, operator(house) as (tasks, _):
        monkeypatch.setattr(house.agent.agent.relay, "_ring", lambda frame: None)
        await tasks.revoke(work.task.id)
        began = time.monotonic()
        # Until then nobody here can know it; the agent may go on presenting it, and is refused where it is heard.
        await until(lambda: not work.task.is_kept(work.token))
        assert time.monotonic() - began < HEARD_WITHIN + 1
        assert (await work.refused()).reason == "task_ended"
        assert [one.fields["cause"] for one in work.records("task_ended")] == ["operator"]
