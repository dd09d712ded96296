"""Token requests of all local workloads on one stream to the server: what comes together travels together.

A call of its own for each costs both sides more than what it is for. Each request still stands alone: it is decided, fails,
times out and is given up by itself, and the process behind it is looked at before its request is sent and before its answer is
handed on. What is too large to stand beside others goes alone, and so does everything where the server knows no such stream.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final, Protocol

import grpc.aio

from broker._proto.broker.server.v1 import tasks_pb2
from broker.agent.sessions import WorkloadSession
from broker.agent.turns import Turns
from broker.agent.upstream import RECONNECT_PAUSE, Upstream, answered
from broker.errors import BrokerError, Refused, Unavailable
from broker.transport.grpc_server import log_defect
from broker.transport.grpc_status import new_reference
from broker.transport.rpc_errors import NotServed, from_status

MAX_UNDER_WAY: Final = 256  # as many calls as one connection may have open
SHARE_OF_ONE_USER: Final = 0.75  # of them, as of calls in progress at the socket: the rest is for the others
MAX_ITEMS: Final = 64  # in one message
MESSAGE_BYTES: Final = 256 * 1024  # after which a message is full: a large one would keep the next ones waiting
SEVERAL: Final = 4  # under way at once, from which on others are to be expected
PACE: Final = 0.004  # seconds from one message to the next, at least, while several are: one who asks alone never waits
ITEM_BYTES: Final = 32 * 1024  # of a request: the longest user's token, and as much for all the rest
PATH: Final = "/broker.server.v1.Tasks/IssueTokens"


class Look(Protocol):
    """Looks fully at the process of a session; raises NoIdentity where it is not what was attested."""

    def __call__(self, session: WorkloadSession, /) -> None:
        """Look now."""


class _NoStreamError(Exception):
    """The server knows no such stream, and has begun nothing."""


class _Asked:
    """One request, and who waits for its answer."""

    __slots__ = ("answer", "number", "request", "session")

    def __init__(self, request: tasks_pb2.IssueTokenRequest, session: WorkloadSession) -> None:
        self.request = request
        self.session = session
        self.answer: asyncio.Future[tasks_pb2.IssuedToken] = asyncio.get_running_loop().create_future()
        self.number = 0  # on the stream, once it was sent

    @property
    def user(self) -> int:
        return self.session.process.uid

    def expire(self) -> None:
        self.fail(Unavailable("the server did not answer in time"))

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class TokenStream:
    """Asks the server for tokens. The stream is opened by the first request, and anew by the next one after it was lost."""

    def __init__(self, upstream: Upstream, look: Look) -> None:
        """``look`` is called before a request of a session is sent, and before an answer is handed on."""
        self._upstream = upstream
        self._look = look
        self._turns: Turns[_Asked] = Turns(MAX_UNDER_WAY, SHARE_OF_ONE_USER)
        self._under_way: dict[int, _Asked] = {}
        self._given_up: list[int] = []
        self._number = 0
        self._news = asyncio.Event()
        self._carrying: asyncio.Task[None] | None = None
        self._unserved_since: int | None = None

    async def issue(
        self, request: tasks_pb2.IssueTokenRequest, session: WorkloadSession, seconds: float
    ) -> tasks_pb2.IssuedToken:
        """Ask for one token, for so many seconds; raises the BrokerError that the server means, NoIdentity or Unavailable."""
        if request.ByteSize() > ITEM_BYTES or self._unserved_since == self._upstream.lost():
            return await self._alone(request, session, seconds)
        loop = asyncio.get_running_loop()
        began, asked = loop.time(), _Asked(request, session)
        expiry = loop.call_later(seconds, asked.expire)
        self._turns.put(asked.user, asked)
        self._hurry()
        try:
            return await asked.answer
        except _NoStreamError:
            return await self._alone(request, session, seconds - (loop.time() - began))
        finally:
            expiry.cancel()
            self._let_go(asked)

    async def close(self) -> None:
        """End the stream: whoever waits is told."""
        if self._carrying is not None:
            self._carrying.cancel()
            await asyncio.gather(self._carrying, return_exceptions=True)

    async def _alone(
        self, request: tasks_pb2.IssueTokenRequest, session: WorkloadSession, seconds: float
    ) -> tasks_pb2.IssuedToken:
        self._look(session)
        issued: tasks_pb2.IssuedToken = await answered(self._upstream.tasks.IssueToken(request, timeout=seconds))
        self._look(session)
        return issued

    def _hurry(self, pause: float = 0.0) -> None:
        self._news.set()
        if self._carrying is None:
            self._carrying = asyncio.create_task(self._carry(pause), name="token-stream")

    def _let_go(self, asked: _Asked) -> None:
        if asked.answer.done() and not asked.answer.cancelled():
            asked.answer.exception()  # heard, also where who waited went away in that moment
        if not asked.number:
            self._turns.withdraw(asked.user, asked)
        elif self._under_way.pop(asked.number, None) is not None:
            # Nobody waits for it any more, and nobody shall work for it.
            self._turns.leave(asked.user)
            self._given_up.append(asked.number)
            self._news.set()

    # ---- one stream, from its opening to its end

    async def _carry(self, pause: float) -> None:
        error: BrokerError = Unavailable("the stream has ended")
        has_heard = False
        try:
            await asyncio.sleep(pause)
            async with aclosing(self._messages()) as messages:
                async for message in messages:
                    has_heard = True
                    self._heard(message)
            error = Unavailable("the server has ended the stream")
        except BrokerError as failure:
            error = failure if isinstance(failure, Refused | Unavailable | NotServed) else Unavailable(failure.message)
        finally:
            self._carrying = None
            self._lost(error, has_heard=has_heard)

    async def _messages(self) -> AsyncGenerator[tasks_pb2.IssueTokensResponse, None]:
        """Open a stream, write to it what is asked, and give what comes; raises the BrokerError that ends it."""
        call = self._upstream.tasks.IssueTokens()
        writing = asyncio.create_task(self._write(call), name="token-requests")
        try:
            while (message := await answered(call.read())) is not grpc.aio.EOF:
                yield message
        finally:
            writing.cancel()
            (ended,) = await asyncio.gather(writing, return_exceptions=True)
            if isinstance(ended, Exception):
                log_defect(new_reference(), PATH, ended)
            call.cancel()

    async def _write(self, call: Any) -> None:
        # A stream that is over says why to who reads it; one that nobody writes to is over.
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                while (message := self._next_message()) is not None:
                    await call.write(message)
                    if len(self._under_way) >= SEVERAL:
                        await asyncio.sleep(PACE)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass
        except Exception:
            call.cancel()
            raise

    def _next_message(self) -> tasks_pb2.IssueTokensRequest | None:
        message = tasks_pb2.IssueTokensRequest(given_up=self._given_up)
        self._given_up.clear()
        looks = _Looks(self._look)
        size = 0
        while len(message.items) < MAX_ITEMS and size < MESSAGE_BYTES and (asked := self._turns.take()) is not None:
            if (error := looks.at(asked.session)) is not None or asked.answer.done():
                self._turns.leave(asked.user)
                asked.fail(error or Unavailable("nobody waits for it"))
                continue
            self._number = asked.number = self._number + 1
            self._under_way[asked.number] = asked
            message.items.add(id=asked.number, request=asked.request)
            size += asked.request.ByteSize()
        return message if message.items or message.given_up else None

    def _heard(self, message: tasks_pb2.IssueTokensResponse) -> None:
        looks = _Looks(self._look)
        for item in message.items:
            asked = self._under_way.pop(item.id, None)
            if asked is None:
                continue  # given up
            self._turns.leave(asked.user)
            if asked.answer.done():
                continue
            if item.WhichOneof("answer") != "issued":
                asked.fail(from_status(item.failed))
            elif (error := looks.at(asked.session)) is not None:
                # The answer holds a token: only the process that asked may have it.
                asked.fail(error)
            else:
                asked.answer.set_result(item.issued)
        self._news.set()  # places were given back

    def _lost(self, error: BrokerError, *, has_heard: bool) -> None:
        """Tell those whose requests were sent; those who wait go on with the next stream, unless this one never worked."""
        sent, self._under_way = self._under_way, {}
        for asked in sent.values():
            self._turns.leave(asked.user)
        self._given_up.clear()
        is_unserved = isinstance(error, NotServed)
        if is_unserved:
            self._unserved_since = self._upstream.lost()
        elif has_heard and len(self._turns):
            # Not at once: gRPC may not know yet that its connection is gone.
            self._hurry(RECONNECT_PAUSE)
        waiting = [] if self._carrying else self._turns.drain()
        for asked in (*sent.values(), *waiting):
            asked.fail(_NoStreamError() if is_unserved else _again(error))


class _Looks:
    """What was seen at the processes behind one message: each is looked at once for all that it asks for in it."""

    def __init__(self, look: Look) -> None:
        self._look = look
        self._seen: dict[WorkloadSession, BrokerError | None] = {}

    def at(self, session: WorkloadSession) -> BrokerError | None:
        """Give what is wrong with the process, if anything is."""
        if session not in self._seen:
            try:
                self._look(session)
                self._seen[session] = None
            except BrokerError as error:
                self._seen[session] = error
        seen = self._seen[session]
        return None if seen is None else _again(seen)


def _again(error: BrokerError) -> BrokerError:
    """Make an error anew for each who is told it: one that is raised twice keeps both ways that it went."""
    copy = type(error)(error.message, code=error.reason, hint=error.hint)
    copy.__cause__ = error.__cause__
    return copy
