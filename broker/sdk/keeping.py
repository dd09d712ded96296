"""Keeps a task alive for as long as this process works on it, by itself, in the background.

Of an attached task it holds the stream to the node agent and answers each beat; of a leased one it sends the heartbeat. It
answers from the event loop of the program: one that does nothing else for longer than the lease is taken for hung, which is what
the lease is for. What the server has stopped, it does not start again.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import grpc

from broker._proto.broker.agent.v1 import tasks_pb2
from broker._proto.broker.server.v1 import tasks_pb2 as server_pb2
from broker._proto.service import ServiceBinding, Stub
from broker.errors import BrokerError, Invalid, NoIdentity, NotFound, Refused
from broker.sdk import background
from broker.sdk.endpoint import CALL_SECONDS, SECURITY_HEADER
from broker.transport.rpc_errors import from_rpc_error

BEATS_IN_LEASE = 3
"""Heartbeats in the time of a lease: two may be lost."""
SHORTEST = 0.2
"""Seconds between two heartbeats at least."""
RETRY_FIRST, RETRY_MOST = 0.05, 2.0
"""Seconds between attempts, doubling: whoever lost the stream has some seconds to come back."""
FIRST_BEAT_SECONDS = 10.0
"""How long the first beat of an attached task may take before the program goes on without it."""

_FINAL = (Refused, NotFound, Invalid, NoIdentity)


class Keeper:
    """Keeps one task, from :meth:`start` to :meth:`stop`; nothing to do for one that nobody supervises."""

    def __init__(self, channel: grpc.aio.Channel, task: server_pb2.Task, spiffe_id: str) -> None:
        """Prepare for a task that was just started."""
        self._api = Stub(channel, ServiceBinding.of(tasks_pb2.DESCRIPTOR, "Tasks"))
        self._task = task
        self._spiffe_id = spiffe_id
        self._running: asyncio.Task[None] | None = None
        self._first = asyncio.Event()
        self._pause = RETRY_FIRST / 2
        self.lost: BrokerError | None = None
        """Why the task cannot be kept any more: it was suspended, or is over."""

    async def start(self) -> None:
        """Begin; of an attached task, once the node agent watches it."""
        if self._task.supervision == "attached":
            self._running = asyncio.create_task(self._keep(self._hold_stream), name="broker-sdk-attached")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FIRST_BEAT_SECONDS):
                    await self._first.wait()
        elif self._task.supervision == "lease":
            self._running = asyncio.create_task(self._keep(self._send_beats), name="broker-sdk-lease")

    async def stop(self) -> None:
        """Let go."""
        if self._running is not None:
            await background.end(self._running)

    async def _keep(self, once: Callable[[], Awaitable[None]]) -> None:
        while True:
            self._pause = min(self._pause * 2, RETRY_MOST)
            try:
                await once()
            except grpc.aio.AioRpcError as error:
                if self._is_final(error):
                    self._first.set()
                    return
            await asyncio.sleep(self._pause)

    def _is_final(self, rpc_error: grpc.aio.AioRpcError) -> bool:
        if rpc_error.code() is grpc.StatusCode.UNIMPLEMENTED:
            # An older node agent: the task hangs on this process alone.
            return True
        error = from_rpc_error(rpc_error)
        if isinstance(error, _FINAL):
            self.lost = error
        return self.lost is not None

    async def _hold_stream(self) -> None:
        call = self._api.Attach(metadata=SECURITY_HEADER)
        try:
            message = tasks_pb2.AttachRequest(task_id=self._task.id, spiffe_id=self._spiffe_id)
            while True:
                # A stream that has ended takes nothing; why it ended is what reading says.
                with contextlib.suppress(asyncio.InvalidStateError):
                    await call.write(message)
                response = await call.read()
                if response is grpc.aio.EOF:
                    return
                message = tasks_pb2.AttachRequest(beat=response.beat)
                self._pause = RETRY_FIRST / 2
                self._first.set()
        finally:
            call.cancel()

    async def _send_beats(self) -> None:
        request = tasks_pb2.RenewLeaseRequest(task_id=self._task.id, spiffe_id=self._spiffe_id)
        every = max(self._task.lease_ttl / BEATS_IN_LEASE, SHORTEST)
        while True:
            # The first at once: after a failure the time is short, and at the start it does no harm.
            lease = await self._api.RenewLease(request, metadata=SECURITY_HEADER, timeout=min(CALL_SECONDS, every * 2))
            every = max(lease.ttl / BEATS_IN_LEASE, SHORTEST)
            self._pause = RETRY_FIRST / 2
            await asyncio.sleep(every)
