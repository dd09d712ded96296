"""Security events that are fetched (RFC 8936): asked for again and again, each acknowledged once it is committed.

Invariants: an event is acknowledged only after the commit that took it in; one that was taken in before is acknowledged again
and changes nothing; one that is refused is reported as such, so that it does not come back for ever. What could not be judged
now (keys, store) is left to come again, after a pause: whatever a transmitter answers, it is asked at once only when something new was
settled. Only https, no redirect, a bounded answer, and one request at a time.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from itertools import islice
from typing import Final

import httpx2

from broker.errors import BrokerError, Invalid, InvalidJson, Unavailable
from broker.server.tasks.config import Transmitter
from broker.server.tasks.issuer_keys import FETCH_SECONDS, trust_of
from broker.server.tasks.signals import SecurityEvents, Signals
from broker.spiffe import strictjson
from broker.spiffe.strictjson import JsonValue
from broker.telemetry.log import get_logger
from broker.transport.dialling import dialling

MAX_EVENTS: Final = 100
"""Events of one answer: some hundred milliseconds of work."""
MAX_ANSWER: Final = 1024 * 1024
"""Bytes of one answer: a hundred events of 8 KiB fit."""
DOOR: Final = "ssf_poll"
SECONDS_AT_MOST: Final = 60.0
"""Between two attempts at a transmitter that does not answer."""

log = get_logger("signals")


class Poller:
    """Fetches the events of one transmitter. Close it with :meth:`aclose`."""

    def __init__(
        self,
        transmitter: Transmitter,
        events: SecurityEvents,
        signals: Signals,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Prepare the client; ``sleep`` waits between two fetches. Raises Misconfigured for an unreadable ``ca_path``."""
        self._sleep = sleep
        self._transmitter = transmitter
        self._events = events
        self._signals = signals
        headers = {"accept": "application/json", "accept-encoding": "identity"}
        if transmitter.token:
            headers["authorization"] = f"Bearer {transmitter.token}"
        self._client = httpx2.AsyncClient(
            verify=trust_of(transmitter),
            follow_redirects=False,
            trust_env=False,
            timeout=FETCH_SECONDS,
            headers=headers,
        )
        self._acks: list[str] = []
        self._errors: dict[str, dict[str, str]] = {}

    async def aclose(self) -> None:
        """Close the connection."""
        await self._client.aclose()

    async def run(self) -> None:
        """Fetch until cancelled."""
        pause = self._transmitter.poll_every
        while True:
            try:
                while await self.fetch():
                    pass
                pause = self._transmitter.poll_every
            except BrokerError as error:
                log.warning("events_not_fetched", transmitter=self._transmitter.issuer, code=error.reason)
                pause = min(2 * pause, max(SECONDS_AT_MOST, self._transmitter.poll_every))
            await self._sleep(pause)

    async def fetch(self) -> bool:
        """Ask once, take in what comes, and tell whether to ask again at once; raises Unavailable."""
        asked = {
            "maxEvents": MAX_EVENTS,
            "returnImmediately": True,
            "ack": self._acks,
            **({"setErrs": self._errors} if self._errors else {}),
        }
        answer = await self._ask(strictjson.canonical(asked))
        # They were heard: the same are not told again.
        told = {*self._acks, *self._errors}
        self._acks, self._errors = [], {}
        events = answer.get("sets")
        if not isinstance(events, dict):
            raise Unavailable("the transmitter's answer holds no list of events", code="ssf_answer")
        # Of more than were asked for (RFC 8936 §2.2 lets it) the rest comes again: it is not acknowledged.
        for jti, event in islice(events.items(), MAX_EVENTS):
            await self._take(jti, event)
        # Acknowledgements leave at once, not with the next poll: otherwise the same events would be there again. Where nothing came
        # of this round, nothing comes of another: events that cannot be judged now, and those that were told of and are there still.
        return not told.issuperset((*self._acks, *self._errors))

    async def _take(self, jti: str, event: JsonValue) -> None:
        try:
            if not isinstance(event, str):
                raise Invalid("an event is not text", code="signal_type")
            signal = await self._events.verify(event, only=self._transmitter.issuer)
            if signal.jti != jti:
                raise Invalid("an event has another jti than it is listed under", code="signal_jti")
            await self._signals.take(signal)
        except Unavailable as error:
            log.warning("event_left", transmitter=self._transmitter.issuer, code=error.reason)
            return
        except BrokerError as error:
            if error.reason != "signal_replayed":
                await self._signals.refused(DOOR, error, self._transmitter.issuer)
                self._errors[jti] = {"err": error_of(error), "description": error.message}
                return
        self._acks.append(jti)

    async def _ask(self, body: bytes) -> Mapping[str, JsonValue]:
        try:
            return await self._answer(body)
        except (httpx2.HTTPError, httpx2.InvalidURL, TimeoutError, InvalidJson, OSError):
            raise Unavailable("the transmitter cannot be reached", code="ssf_unreachable") from None

    async def _answer(self, body: bytes) -> Mapping[str, JsonValue]:
        read = bytearray()
        url = self._transmitter.poll_url
        # The language of the descriptions under setErrs (RFC 8936 §2.4.4).
        headers = {"content-type": "application/json", "content-language": "en"}
        async with (
            asyncio.timeout(FETCH_SECONDS),
            dialling() as trace,
            self._client.stream("POST", url, content=body, headers=headers, extensions={"trace": trace}) as response,
        ):
            if response.status_code != httpx2.codes.OK:
                raise Unavailable(f"the transmitter answered {response.status_code}", code="ssf_status")
            async for chunk in response.aiter_raw():
                read += chunk
                if len(read) > MAX_ANSWER:
                    raise Unavailable("the transmitter's answer is too large", code="ssf_too_large")
        answer = strictjson.loads(bytes(read), max_bytes=MAX_ANSWER)
        if not isinstance(answer, dict):
            raise Unavailable("the transmitter's answer is not a JSON object", code="ssf_answer")
        return answer


_ERRORS: Final[Mapping[str, str]] = {
    "signal_issuer": "invalid_issuer",
    "signal_audience": "invalid_audience",
    "signal_key": "invalid_key",
    "ssf_authentication": "authentication_failed",
    "ssf_access": "access_denied",
}


def error_of(error: BrokerError) -> str:
    """Give the error's name in RFC 8935 §2.4."""
    return _ERRORS.get(error.reason, "invalid_request")
