"""The agent, put together: every object is made here, every loop runs under one task group, and nothing else decides.

The socket listens before the server has been reached, so that workloads are told UNAVAILABLE rather than nothing.
"""

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

import grpc.aio

from broker.agent import at_rest
from broker.agent.attachments import Attachments
from broker.agent.bootstrap import Condition, NodeIdentity, join
from broker.agent.cache import EstateCache
from broker.agent.clock_watch import ClockWatch
from broker.agent.doors import Doors, Inside
from broker.agent.estate_file import EstateFile
from broker.agent.feed import FeedRelay
from broker.agent.identity_file import IdentityFile
from broker.agent.introduction import Introduction
from broker.agent.keeping import Keeping
from broker.agent.listener import CONNECTION, IDENTITY
from broker.agent.offline import Offline
from broker.agent.rebootstrap import Rebootstrap
from broker.agent.reports import SessionReports
from broker.agent.rounds import Rounds
from broker.agent.sessions import Identity, Sessions
from broker.agent.settings import AgentSettings
from broker.agent.signing import Signing
from broker.agent.svids import SvidKeeper
from broker.agent.sync import Sync
from broker.agent.token_stream import TokenStream
from broker.agent.trust import read_trust_bundle
from broker.agent.upstream import Upstream
from broker.agent.wire import ToldBundle
from broker.agent.workloads import Freshness, Workloads
from broker.attestation.catalogue import Catalogue
from broker.attestation.contract import WorkloadAttestor
from broker.attestation.process import require_procfs
from broker.attestation.strength import Strengths
from broker.clock import Clock, SystemClock
from broker.errors import BrokerError, Misconfigured
from broker.spiffe import Bundle, SpiffeId
from broker.tasks.causes import SessionEnd
from broker.telemetry.log import get_logger
from broker.transport.dialer import SpiffeDialer

SERVER_PATH: Final = "/spire/server"
NEXT_CONNECTION: Final = 2.0  # seconds; after that whoever calls is told why there is none
FAREWELL: Final = 1.0  # seconds to tell the server of the end
GRACE: Final = 3.0  # seconds for calls in progress at the end; all of it stays below the ten that operators expect

_log = get_logger("agent.app")


class Agent:
    """A node agent: ``async with Agent(settings) as agent: await agent.serve(stop)``."""

    def __init__(
        self, settings: AgentSettings, *, catalogue: Catalogue | None = None, clock: Clock | None = None
    ) -> None:
        """Read nothing and open nothing yet."""
        self._settings = settings
        self._clock = clock or SystemClock()
        self._catalogue = catalogue or Catalogue(frozenset(settings.attestors.trusted_distributions))
        self._chance = random.SystemRandom()
        self._known_as: SpiffeId | None = None
        self._estate_of: SpiffeId | None = None

    @property
    def is_ready(self) -> bool:
        """Whether workloads can be answered: told the estate, now or before a restart, and not too long ago."""
        return self.cache.is_synced and self.node.condition is not Condition.LOST

    async def __aenter__(self) -> Self:
        """Make everything and listen; raises Misconfigured."""
        settings = self._settings
        require_procfs()
        named = None if settings.at_rest_key_path is None else at_rest.named_key(settings.at_rest_key_path)
        self._store = store = IdentityFile(settings.private_dir, named)
        store.prepare()
        try:
            self._at_rest = at_rest.chosen(named, settings.private_dir)
            return await self._start(store)
        except BaseException:
            store.release()
            raise

    async def _start(self, store: IdentityFile) -> Self:
        settings = self._settings
        attestors = self._attestors()
        strengths = Strengths.of_attestors(attestors)
        self.cache = EstateCache(settings.trust_domain, vouched=strengths.is_vouched)
        self.node = self._node(store)
        self.node.load()
        self._known_as = self.node.last_id
        if self._known_as is not None and self.node.bundle is not None:
            self.cache.start_with(self.node.bundle)
        elif self.node.bundle is None and not settings.insecure_bootstrap:
            raise Misconfigured(
                "the agent does not know which server to trust",
                code="no_trust_bundle",
                hint="set trust_bundle_path; or, for a trial, insecure_bootstrap = true",
            )
        self._dialer = self._dial()
        channel = await self._dialer.__aenter__()
        try:
            self._assemble(channel, attestors, strengths)
            await self.doors.open()
        except BaseException:
            await self._dialer.__aexit__(None, None, None)
            raise
        _log.info("agent_listening", socket=str(settings.socket_path), trust_domain=str(settings.trust_domain))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop serving and let go of everything, within a few seconds."""
        await self.doors.close(GRACE)
        self.sessions.end_all()
        self.attachments.close()
        await self._tokens.close()
        await self._farewell()
        await self.node.settle()
        await self.svids.close()
        await self._signing.close()
        await self._dialer.__aexit__(kind, error, trace)
        self._store.release()
        _log.info("agent_stopped")

    async def serve(self, stop: asyncio.Event) -> None:
        """Join, sync and serve until ``stop``; raises the BrokerError that forbids to join."""
        async with asyncio.TaskGroup() as group:
            loops = [
                group.create_task(self._live(), name="live"),
                group.create_task(self.svids.spares.maintain(), name="spares"),
                group.create_task(
                    ClockWatch(self._clock, self.cache.ring_all, self._dialer.reconnect).run(), name="clock"
                ),
                group.create_task(self.upstream.watch_connection(self._connected), name="connection"),
                group.create_task(self.rounds.run(), name="rounds"),
                group.create_task(self.offline.run(), name="offline"),
                group.create_task(self.keeping.run(), name="keeping"),
                group.create_task(self._rebootstrap.run(), name="rebootstrap"),
            ]
            await stop.wait()
            for loop in loops:
                loop.cancel()

    async def _live(self) -> None:
        had = self.node.tls
        try:
            await join(self.node, self.upstream, self.offline.unheard)
        except BrokerError as error:
            # Whoever is still served by what was kept is served to the end of it; the node may join again any time.
            if not self.offline.has_something:
                raise
            self.node.not_joined(error)
            self.offline.unheard()
        if self.node.bundle is not None and self.cache.own_bundle is None:
            self.cache.start_with(self.node.bundle)
        if self.node.tls is not had:
            # The connection by which it joined is dropped, but the channel is told by a socket: what is begun before that fails.
            await self.upstream.pause(NEXT_CONNECTION)
        async with asyncio.TaskGroup() as group:
            group.create_task(self.sync.run(), name="sync")
            group.create_task(self.node.keep(self.upstream, self._chance.random), name="identity")
            group.create_task(self.reports.run(), name="reports")
            group.create_task(self._introduction.run(), name="introduction")
            group.create_task(self.relay.run(), name="feed")

    def _node(self, store: IdentityFile) -> NodeIdentity:
        settings = self._settings
        ((attestor, table),) = settings.attestors.node.items()
        if attestor == "join_token":
            table = {"join_token": settings.join_token, "join_token_file": settings.join_token_file}
        return NodeIdentity(
            settings.trust_domain,
            store,
            self._catalogue.node_agent(attestor, table),
            self._clock,
            bundle=self._first_trust(),
            on_change=self._identity_changed,
            on_lost=self._identity_lost,
        )

    def _dial(self) -> SpiffeDialer:
        settings = self._settings
        unsafe: Callable[[tuple[bytes, ...]], None] | None = None
        if settings.insecure_bootstrap:
            _log.warning("insecure_bootstrap", hint="whoever answers first is trusted: set trust_bundle_path")
            unsafe = _unsafe_trust_anybody
        return SpiffeDialer(
            settings.server,
            identity=lambda: self.node.tls,
            bundles=lambda: self.node.bundles,
            expect=SpiffeId.of(settings.trust_domain, SERVER_PATH),
            clock=self._clock,
            unsafe_accept_any_server=unsafe,
            directory=settings.private_dir,
            # What gRPC says of it is only that its own socket went.
            on_failed=lambda why: _log.warning("server_not_connected", address=settings.server, reason=why),
        )

    def _attestors(self) -> tuple[WorkloadAttestor, ...]:
        attestors, broken = self._catalogue.workload(self._settings.attestors.workload)
        for one in broken:
            _log.error("attestor_unavailable", attestor=one.name, reason=one.reason)
        return attestors

    def _assemble(
        self, channel: grpc.aio.Channel, attestors: tuple[WorkloadAttestor, ...], strengths: Strengths
    ) -> None:
        settings, cache, clock = self._settings, self.cache, self._clock
        self.upstream = upstream = Upstream(channel, lambda: self._dialer.lost)
        self._introduction = Introduction(upstream)
        self.reports = SessionReports(upstream, on_over=self._over)
        self.attachments = Attachments(self.reports.detached)
        self.sessions = sessions = Sessions(cache, clock, on_identities_ended=self._identities_ended)
        self.sync = Sync(
            upstream,
            cache,
            on_online=self._online,
            on_bundle=self._bundle,
            on_refused=self._watch_refused,
            on_heard=self._heard,
        )
        self._prepare_offline()
        self._signing = Signing(upstream, cache, clock, self._chance)
        self.svids = svids = SvidKeeper(
            self._signing,
            cache,
            clock,
            is_online=lambda: self.sync.is_online,
            share_when_offline=settings.share_when_offline,
            on_new_leaf=self.reports.leaf,
            on_revoked=lambda identity: self._identities_ended([identity], SessionEnd.SVID_REVOKED),
            on_spares=self.keeping.note,
        )
        self.offline.svids = self.keeping.svids = svids
        self.relay = FeedRelay(upstream, clock)
        freshness = Freshness(
            settings.attest_again_every.total_seconds(), settings.attestors_bridged_for.total_seconds()
        )
        self.workloads = workloads = Workloads(attestors, sessions, clock, freshness)
        self.rounds = Rounds(workloads, sessions, clock, freshness.ask_every)
        self._tokens = TokenStream(upstream, workloads.check)
        self.doors = Doors(
            settings,
            Inside(
                node=self.node,
                upstream=upstream,
                tokens=self._tokens,
                cache=cache,
                strengths=strengths,
                workloads=workloads,
                sessions=sessions,
                svids=svids,
                reports=self.reports,
                attachments=self.attachments,
                relay=self.relay,
                offline=self.offline,
                clock=clock,
                on_over=self._over,
                is_ready=lambda: self.is_ready,
                health={IDENTITY: lambda: self.node.tls is not None, CONNECTION: lambda: self.sync.is_online},
            ),
        )

    def _prepare_offline(self) -> None:
        settings, cache, clock = self._settings, self.cache, self._clock
        file = EstateFile(settings.private_dir, settings.trust_domain, self._at_rest)
        self.keeping = Keeping(
            file, cache, clock, agent_id=lambda: self._estate_of, heard_at=lambda: self.offline.heard_at
        )
        self.offline = Offline(
            file,
            cache,
            clock,
            longest=settings.max_offline,
            is_online=lambda: self.sync.is_online,
            note=self.keeping.note,
        )
        if self.node.last_id is not None:
            self._estate_of = self.node.last_id
            self.offline.load(self.node.last_id)
        self._rebootstrap = Rebootstrap(
            settings.rebootstrap_mode,
            settings.rebootstrap_delay.total_seconds(),
            clock,
            node=self.node,
            is_stranger=lambda: self._dialer.is_stranger,
            first_trust=self._first_trust,
        )

    def _first_trust(self) -> Bundle | None:
        path = self._settings.trust_bundle_path
        return None if path is None else read_trust_bundle(path, self._settings.trust_domain)

    def _identity_changed(self) -> None:
        if self.node.last_id != self._known_as:
            # Another agent has other entries: nothing of the old one's may stay by way of its cursor.
            self._known_as = self.node.last_id
            self.sync.begin_anew()
        self._dialer.reconnect()
        self.sync.hurry()

    def _identity_lost(self) -> None:
        self._estate_of = None
        self.offline.forget()
        self.keeping.forget()
        self.cache.withdraw()
        self.svids.spares.forget()
        for session in self.sessions:
            self.sessions.entries(session)

    async def _farewell(self) -> None:
        """Tell the server at once what has ended with this run; where that fails, the next run says it, or our silence."""
        if self.reports.is_settled:
            return
        with suppress(BrokerError, TimeoutError):
            async with asyncio.timeout(FAREWELL):
                await self.reports.tell()

    def _identities_ended(self, identities: list[Identity], cause: SessionEnd) -> None:
        self.attachments.ended([identity.id for identity in identities])
        self.reports.ended(identities, cause)

    def _over(self, session_ids: frozenset[str]) -> None:
        self.attachments.ended([identity.id for identity in self.sessions.let_go(session_ids)])

    def _connected(self) -> None:
        self.sync.hurry()
        self.node.hurry()

    def _online(self) -> None:
        self._introduction.again()
        held = [identity for session in self.sessions for identity in session.identities.values()]
        self.reports.again(held)
        for identity in held:
            identity.retry_at, identity.failures = 0.0, 0
        # Shared spares are replaced now, failed rotations tried again.
        self.cache.ring_all()

    def _heard(self) -> None:
        self._estate_of = self.node.last_id
        self.offline.heard()

    def _bundle(self, told: ToldBundle) -> None:
        self.node.follow(told.bundle, told.tainted)
        self._dialer.recheck()

    def _watch_refused(self, error: BrokerError) -> None:
        if error.reason == "agent_not_active":
            # The stream is older than the newest SVID.
            self._dialer.reconnect()
        self.node.refused(error)
        self.offline.unheard()


def _unsafe_trust_anybody(chain: tuple[bytes, ...]) -> None:
    del chain
