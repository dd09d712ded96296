"""Follows the server's Watch stream: a snapshot, then deltas, resumed by cursor after every interruption.

A server that has no such stream is asked by SPIRE's methods. Only a whole snapshot is applied. A number that goes back, another store, or a page that cannot be read makes the next
attempt ask for a snapshot. A stream that says nothing for too long is taken for dead.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final

import grpc.aio

from broker._proto.broker.server.v1 import entries_pb2, watch_pb2
from broker._proto.spire.api.types import bundle_pb2
from broker.agent import wire
from broker.agent.backoff import Backoff
from broker.agent.cache import EstateCache
from broker.agent.polling import POLL_EVERY, Answer, Polling
from broker.agent.upstream import Upstream
from broker.errors import BrokerError, Invalid, Unavailable
from broker.registry import Entry
from broker.spiffe import TrustDomain
from broker.telemetry.log import get_logger
from broker.transport.rpc_errors import NotServed, from_rpc_error

SILENCE: Final = (
    16.0  # seconds without a message, of which a server sends one every five, before the stream is given up
)
MAX_SNAPSHOT_PAGES: Final = 10_000  # some 40 GiB at gRPC's limit: a server that never ends is broken

_log = get_logger("agent.sync")


class GapError(Invalid):
    """The stream does not continue what this agent holds: it must begin anew."""

    code = "watch_gap"


class Sync:
    """Keeps the cache equal to the server's word. ``on_online`` is called when a stream speaks its first message."""

    def __init__(
        self,
        upstream: Upstream,
        cache: EstateCache,
        *,
        on_online: Callable[[], None],
        on_bundle: Callable[[wire.ToldBundle], None],
        on_refused: Callable[[BrokerError], None],
        on_heard: Callable[[], None],
        silence: float = SILENCE,
    ) -> None:
        """``silence`` in seconds. ``on_heard`` is called at each message while what is held is what the server says."""
        self._upstream = upstream
        self._cache = cache
        self._on_online = on_online
        self._on_bundle = on_bundle
        self._on_refused = on_refused
        self._on_heard = on_heard
        self._silence = silence
        self._cursor = 0
        self._store = ""
        self._entries: list[Entry] = []
        self._bundles: list[wire.ToldBundle] = []
        self._crls: list[bytes] = []
        self._told: wire.ToldBundle | None = None
        self._pages = 0
        self._hurried = asyncio.Event()
        self._is_polling = False
        self.is_online = False

    def hurry(self) -> None:
        """Try at once if the stream waits out its back-off: what it failed of may have changed, or there is a connection."""
        self._hurried.set()

    async def run(self) -> None:
        """Follow for ever; runs until cancelled."""
        backoff = Backoff()
        while True:
            self._hurried.clear()
            try:
                await self._follow_or_poll(backoff)
            except BrokerError as error:
                if isinstance(error, Invalid):
                    self.begin_anew()
                self._on_refused(error)
                _log.warning("watch_interrupted", code=error.reason, reason=error.message, cursor=self._cursor)
            finally:
                self.is_online = False
            # Not wait_for, which in Python 3.11 forgets a cancellation that comes together with the event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(backoff.next()):
                    await self._hurried.wait()

    async def _follow_or_poll(self, backoff: Backoff) -> None:
        try:
            await self._follow(backoff)
        except NotServed:
            if not self._is_polling:
                _log.info("estate_polled", seconds=POLL_EVERY, reason="the server is SPIRE's: it has no Watch")
            self._is_polling = True
            await self._poll(backoff)

    async def _poll(self, backoff: Backoff) -> None:
        """Ask by SPIRE's methods for as long as the server answers."""
        polling = Polling(self._upstream)
        is_first = True
        while True:
            self._take_answer(await polling.ask(), is_first=is_first)
            is_first = False
            backoff.reset()
            self._heard()
            await asyncio.sleep(POLL_EVERY)

    def _take_answer(self, answer: Answer, *, is_first: bool) -> None:
        told = [entries_pb2.RegisteredEntry(entry=one) for one in answer.changed]
        readable = self._readable(told)
        bundles = [self._bundle(one) for one in answer.bundles]
        own = next((one for one in bundles if one.bundle.trust_domain == self._cache.trust_domain), None)
        if own is None:
            raise GapError("the server is of another trust domain", code="watch_no_bundle")
        if is_first:
            self._cache.replace(readable, bundles)
            _log.info("estate_synced", entries=len(self._cache))
        else:
            unread = {one.entry.id for one in told} - {entry.id for entry in readable}
            kept = {one.bundle.trust_domain for one in bundles}
            self._cache.apply(
                upserted=readable,
                deleted=[*answer.gone, *unread],
                bundles=bundles,
                deleted_bundles=[
                    one.trust_domain for one in self._cache.bundles.values() if one.trust_domain not in kept
                ],
            )
        if own != self._told:
            self._tell_own(own)

    async def _follow(self, backoff: Backoff) -> None:
        call = self._upstream.watch.Watch(watch_pb2.WatchRequest(cursor=self._cursor, store=self._store))
        self._entries, self._bundles, self._crls, self._pages = [], [], [], 0
        try:
            while True:
                async with asyncio.timeout(self._silence):
                    response = await call.read()
                if response is grpc.aio.EOF:
                    raise Unavailable("the server ended the stream", code="watch_ended")
                self._take(response)
                backoff.reset()
                # By the store's name and not by the cache, which may hold what an earlier run was told.
                if self._store:
                    self._heard()
        except TimeoutError:
            raise Unavailable("the server has fallen silent", code="watch_silent") from None
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        finally:
            call.cancel()

    def _heard(self) -> None:
        self._on_heard()
        if not self.is_online:
            self.is_online = True
            self._on_online()

    def _take(self, response: watch_pb2.WatchResponse) -> None:
        kind = response.WhichOneof("kind")
        if kind == "snapshot":
            self._take_page(response)
        elif kind == "delta":
            self._take_delta(response)
        elif kind == "heartbeat" and response.store != self._store:
            raise GapError("the server's store is another one")

    def _take_page(self, response: watch_pb2.WatchResponse) -> None:
        page = response.snapshot
        self._pages += 1
        if self._pages > MAX_SNAPSHOT_PAGES:
            raise GapError("the snapshot does not end")
        self._entries += self._readable(page.entries)
        self._bundles += [self._bundle(one) for one in page.bundles]
        self._crls += page.crls.crls
        if page.more:
            return
        own = [told for told in self._bundles if told.bundle.trust_domain == self._cache.trust_domain]
        if len(own) != 1 or not own[0].bundle.x509_authorities:
            raise GapError("the snapshot lacks the bundle of its trust domain", code="watch_no_bundle")
        self._cache.replace(self._entries, self._bundles, self._crls)
        self._entries, self._bundles, self._crls, self._pages = [], [], [], 0
        self._advance(response)
        self._tell_own(own[0])
        _log.info("estate_synced", entries=len(self._cache), cursor=self._cursor, store=self._store)

    def _take_delta(self, response: watch_pb2.WatchResponse) -> None:
        if not self._store or response.store != self._store or response.seq < self._cursor:
            raise GapError("the delta does not follow what is held")
        delta = response.delta
        bundles = [self._bundle(one) for one in delta.bundles]
        readable = self._readable(delta.upserted)
        # An entry that cannot be read must not stay as it was: it may have been narrowed.
        unread = {one.entry.id for one in delta.upserted} - {entry.id for entry in readable}
        self._cache.apply(
            upserted=readable,
            deleted=[*delta.deleted_ids, *unread],
            bundles=bundles,
            deleted_bundles=[TrustDomain(name) for name in delta.deleted_bundles],
            crls=delta.crls.crls if delta.HasField("crls") else None,
        )
        self._advance(response)
        known = self._told if delta.HasField("crls") else None
        own = next((told for told in bundles if told.bundle.trust_domain == self._cache.trust_domain), known)
        if own is not None:
            self._tell_own(own)

    def _tell_own(self, told: wire.ToldBundle) -> None:
        # With what it took back: the server is judged by it, too.
        self._told = told
        own = self._cache.own_bundle
        self._on_bundle(told if own is None else replace(told, bundle=own))

    def _readable(self, messages: Iterable[entries_pb2.RegisteredEntry]) -> list[Entry]:
        entries: list[Entry] = []
        for message in messages:
            try:
                entries.append(wire.entry(message, self._cache.trust_domain))
            except Invalid as error:
                # One bad entry must not take the others with it; it is served to nobody.
                _log.error("entry_unreadable", entry=message.entry.id, code=error.reason, reason=error.message)
        return entries

    def _bundle(self, message: bundle_pb2.Bundle) -> wire.ToldBundle:
        told = wire.bundle(message)
        if told.bundle.trust_domain == self._cache.trust_domain and not told.bundle.x509_authorities:
            raise GapError("the trust domain's bundle is empty", code="watch_no_bundle")
        return told

    def _advance(self, response: watch_pb2.WatchResponse) -> None:
        self._cursor, self._store = response.seq, response.store

    def begin_anew(self) -> None:
        """Ask for a snapshot at the next attempt: what is held is not what this agent was told."""
        self._cursor, self._store = 0, ""
