"""Keeps the bundles of other trust domains fresh: one poller for each relationship, at the pace that its bundle asks for.

What is fetched is judged here (older is never taken) and written in one transaction that looks again whether the
relationship still stands: what an operator has ended is not brought back by a fetch that was under way. Several replicas
may poll: the same bundle is written once.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from broker.clock import Clock
from broker.errors import BrokerError, Conflict, NotFound, Refused
from broker.server.identity.bundles import put_bundle
from broker.server.identity.federated import RELATIONSHIP_KIND, Federated
from broker.server.store.bundle_rows import PublishedBundle
from broker.server.store.ports import Store, Writer
from broker.spiffe import Bundle, TrustDomain
from broker.spiffe.federation import MIN_REFRESH, Freshness, Relationship, freshness, refresh_seconds
from broker.telemetry.log import get_logger

AT_ONCE: Final = 8
"""Endpoints that are asked at the same time: each may take ten seconds, and they are no hurry."""
JITTER: Final = 0.1
"""Part of the pause that chance adds or takes, so that replicas and trust domains do not come in step."""
MAX_DOUBLINGS: Final = 8

Fetch = Callable[[Relationship, Bundle | None], Awaitable[Bundle]]
"""Ask an endpoint; the bundle is that of the endpoint's own trust domain, for https_spiffe."""

log = get_logger("federation")


@dataclass(slots=True, eq=False)
class _Poller:
    relationship: Relationship
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    failures: int = 0


class Polling:
    """The pollers of all relationships."""

    def __init__(
        self, store: Store, federated: Federated, clock: Clock, fetch: Fetch, *, chance: Callable[[float, float], float]
    ) -> None:
        """``chance(low, high)`` gives a number between the two."""
        self._store = store
        self._federated = federated
        self._clock = clock
        self._fetch = fetch
        self._chance = chance
        self._pollers: dict[TrustDomain, _Poller] = {}
        self._changed = asyncio.Event()
        self._slots = asyncio.Semaphore(AT_ONCE)
        federated.subscribe(self._on_change)

    async def run(self) -> None:
        """Poll, as relationships come and go, until cancelled; raises what a poller raised that is a defect."""
        try:
            while True:
                self._changed.clear()
                self._reconcile()
                await self._until_changed()
        finally:
            for poller in self._pollers.values():
                assert poller.task is not None
                poller.task.cancel()
            await asyncio.gather(*(one.task for one in self._pollers.values() if one.task), return_exceptions=True)
            self._pollers.clear()

    async def refresh(self, trust_domain: TrustDomain) -> None:
        """Ask one endpoint now; raises NotFound without a relationship, and BrokerError saying why nothing came of it."""
        relationship = self._federated.relationships.get(trust_domain)
        if relationship is None:
            raise NotFound(f'no relationship with trust domain "{trust_domain}"', code="relationship_not_found")
        try:
            await self._poll(relationship)
        except BrokerError as error:
            raise BrokerError(
                f"failed to refresh bundle: {error.message}", code=error.reason, hint=error.hint
            ) from None

    def _on_change(self, kind: str, trust_domain: TrustDomain) -> None:
        if kind == RELATIONSHIP_KIND:
            self._changed.set()
            return
        for poller in self._pollers.values():
            endpoint_id = poller.relationship.endpoint_id
            # It may have failed for want of this very bundle.
            if poller.failures and endpoint_id is not None and endpoint_id.trust_domain == trust_domain:
                poller.wake.set()

    def _reconcile(self) -> None:
        wanted = self._federated.relationships
        for trust_domain, poller in tuple(self._pollers.items()):
            if wanted.get(trust_domain) != poller.relationship:
                assert poller.task is not None
                poller.task.cancel()
                del self._pollers[trust_domain]
        for trust_domain, relationship in wanted.items():
            if trust_domain not in self._pollers:
                poller = _Poller(relationship)
                poller.task = asyncio.create_task(self._follow(poller), name="broker-federation")
                self._pollers[trust_domain] = poller

    async def _until_changed(self) -> None:
        changed = asyncio.ensure_future(self._changed.wait())
        tasks = [poller.task for poller in self._pollers.values() if poller.task is not None]
        try:
            done, _ = await asyncio.wait([changed, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if task is not changed:
                    task.result()
        finally:
            changed.cancel()

    async def _follow(self, poller: _Poller) -> None:
        while True:
            poller.wake.clear()
            try:
                async with self._slots:
                    await self._poll(poller.relationship)
                poller.failures = 0
            except BrokerError as error:
                poller.failures += 1
                _log_failure(poller.relationship, error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause(poller)):
                    await poller.wake.wait()

    def _pause(self, poller: _Poller) -> float:
        bundle = self._federated.trusted_bundle(poller.relationship.trust_domain)
        seconds: float = refresh_seconds(bundle)
        if poller.failures:
            seconds = min(seconds, MIN_REFRESH * 2 ** min(poller.failures - 1, MAX_DOUBLINGS))
        return seconds * self._chance(1 - JITTER, 1 + JITTER)

    async def _poll(self, relationship: Relationship) -> None:
        endpoint_id = relationship.endpoint_id
        trust = None if endpoint_id is None else self._federated.trusted_bundle(endpoint_id.trust_domain)
        fetched = await self._fetch(relationship, trust)
        # Most answers are what is known already: no transaction for those.
        verdict = freshness(self._federated.trusted_bundle(relationship.trust_domain), fetched)
        if verdict in (Freshness.NEWER, Freshness.CHANGED):
            verdict = await self._take(relationship, fetched)
        if verdict is Freshness.OLDER:
            raise Refused(
                f"the endpoint of {relationship.trust_domain} serves an older bundle than the one held: it was not taken",
                code="bundle_older",
                hint="if that trust domain began anew, set its bundle by hand: broker bundle set",
            )

    async def _take(self, relationship: Relationship, fetched: Bundle) -> Freshness:
        now = self._clock.now()
        published = PublishedBundle.of(fetched)

        def act(writer: Writer) -> Freshness:
            if not self._stands(writer, relationship):
                raise Conflict("the relationship has changed meanwhile", code="relationship_changed")
            held = writer.federated_bundle(relationship.trust_domain)
            verdict = freshness(None if held is None else held.checked(), fetched)
            if verdict in (Freshness.NEWER, Freshness.CHANGED):
                code = "sequence_unchanged" if verdict is Freshness.CHANGED else ""
                put_bundle(writer, published, "server", now, code)
            return verdict

        verdict = await self._store.write(act)
        if verdict is Freshness.CHANGED:
            log.warning(
                "federated_bundle_changed_at_same_sequence",
                trust_domain=relationship.trust_domain.name,
                sequence=fetched.sequence,
            )
        elif verdict is Freshness.NEWER:
            log.info(
                "federated_bundle_updated",
                trust_domain=relationship.trust_domain.name,
                sequence=fetched.sequence,
                x509_authorities=len(fetched.x509_authorities),
                jwt_authorities=len(fetched.jwt_authorities),
            )
        return verdict

    def _stands(self, writer: Writer, relationship: Relationship) -> bool:
        if self._federated.is_configured(relationship.trust_domain):
            return self._federated.relationships.get(relationship.trust_domain) == relationship
        return writer.relationship(relationship.trust_domain) == relationship


def _log_failure(relationship: Relationship, error: BrokerError) -> None:
    log.warning(
        "federated_bundle_not_refreshed",
        trust_domain=relationship.trust_domain.name,
        url=relationship.url,
        code=error.reason,
        error=error.message,
    )
