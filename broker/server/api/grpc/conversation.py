"""The two directions of an attestation stream: an attestor that asks, a generator that yields what is asked."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Generic, TypeVar

from broker._proto.spire.api.server.agent.v1 import agent_pb2
from broker.errors import Invalid

T = TypeVar("T")


class Conversation(Generic[T]):
    """Runs a coroutine that may ask the peer; what it asks comes out as bytes, its result last."""

    def __init__(self, requests: AsyncIterator[agent_pb2.AttestAgentRequest]) -> None:
        self._requests = requests
        self._challenges: asyncio.Queue[bytes] = asyncio.Queue()

    async def challenge_with(self, challenge: bytes) -> bytes:
        """Ask the peer and wait for its response; raises Invalid for anything else that comes."""
        self._challenges.put_nowait(challenge)
        answer = await anext(self._requests, None)
        if answer is None or answer.WhichOneof("step") != "challenge_response":
            raise Invalid("a challenge is answered by a response", code="attestation_order")
        response: bytes = answer.challenge_response
        return response

    async def run(self, work: Coroutine[Any, Any, T]) -> AsyncIterator[bytes | T]:
        """Give every challenge, then the result; raises what the work raises. Ends the work when it is left early."""
        task = asyncio.ensure_future(work)
        try:
            while True:
                asked = asyncio.ensure_future(self._challenges.get())
                try:
                    await asyncio.wait({task, asked}, return_when=asyncio.FIRST_COMPLETED)
                    if asked.done():
                        yield asked.result()
                        continue
                finally:
                    asked.cancel()
                yield task.result()
                return
        finally:
            task.cancel()
