"""Wiring of the task half: its use cases from settings and parts, its gRPC services, and what its HTTP app needs."""

import asyncio
import secrets
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, Final

from broker._proto.service import ServiceBinding
from broker.clock import Clock
from broker.errors import BrokerError, Invalid, Misconfigured
from broker.server.api.grpc import feed as feed_api
from broker.server.api.grpc import sessions as sessions_api
from broker.server.api.grpc import tasks as tasks_api
from broker.server.api.http.clients import Clients
from broker.server.api.http.services import HttpServices
from broker.server.authority.authorities import Authorities
from broker.server.identity.directory import Directory
from broker.server.settings import AudienceSettings, ServerSettings, SubjectSettings, WitIssuerSettings
from broker.server.stillness import Stillness
from broker.server.store.ports import Store
from broker.server.tasks.admission import Starters
from broker.server.tasks.config import Audience, Audiences, SubjectIssuer, TaskDefaults
from broker.server.tasks.decision import Policy
from broker.server.tasks.exchange import Exchange
from broker.server.tasks.feed import Feed
from broker.server.tasks.foreign import ForeignStarters
from broker.server.tasks.ids import Ids
from broker.server.tasks.lifecycle import Lifecycle
from broker.server.tasks.proofs import Proofs
from broker.server.tasks.refusals import Refusals
from broker.server.tasks.sessions import Sessions
from broker.server.tasks.subjects import Subjects
from broker.server.tasks.tokens import TaskTokens
from broker.spiffe import BundleSet, TrustDomain, strictjson
from broker.spiffe.jose import PublicKey
from broker.tasks import Resource, Supervision
from broker.tasks.wit import read_wit_keys
from broker.telemetry.log import get_logger
from broker.telemetry.metrics import Metrics

SWEEP_EVERY: Final = 1.0
"""Seconds between two looks for tasks whose time is over: they count as over before, this writes it down."""

log = get_logger("tasks")
Service = tuple[ServiceBinding, object]


@dataclass(frozen=True, slots=True)
class TasksHalf:
    """The use cases of the task half."""

    store: Store
    clock: Clock
    trust_domain: TrustDomain
    subjects: Subjects
    exchange: Exchange
    lifecycle: Lifecycle
    sessions: Sessions
    feed: Feed
    refusals: Refusals
    http: HttpServices

    def services(self) -> Iterable[Service]:
        """Give each service with what serves it."""
        tasks = tasks_api.Tasks(
            store=self.store,
            clock=self.clock,
            exchange=self.exchange,
            lifecycle=self.lifecycle,
            feed=self.feed,
            refusals=self.refusals,
        )
        return (
            (tasks_api.BINDING, tasks),
            (feed_api.BINDING, feed_api.Feed(self.feed, self.trust_domain)),
            (sessions_api.BINDING, sessions_api.Sessions(self.sessions)),
        )

    def loops(self) -> Iterable[Coroutine[Any, Any, None]]:
        """Give what has to run for as long as the server does."""
        return (self._sweep(),)

    async def close(self) -> None:
        """Let go of the issuers' connections and of the change log."""
        self.feed.stop()
        await self.subjects.aclose()

    async def _sweep(self) -> None:
        stillness = Stillness(self.store, self.clock)
        while True:
            try:
                if stillness.may_have_ended() and not await self.lifecycle.sweep():
                    stillness.looked(await self.store.read(lambda reader: reader.earliest_end()))
            except BrokerError as error:
                log.warning("tasks_not_swept", code=error.reason, error=error.message)
            await asyncio.sleep(SWEEP_EVERY)


async def tasks_half(
    settings: ServerSettings,
    store: Store,
    clock: Clock,
    *,
    authorities: Authorities,
    directory: Directory,
    bundles: Callable[[], BundleSet],
    metrics: Metrics,
) -> TasksHalf:
    """Make the use cases, load what they keep in memory, follow the change log; raises Misconfigured, Unavailable.

    ``bundles`` gives those under which workloads are judged: our own, and those of trust domains that we federate with.
    """
    audiences = Audiences(_audience(one) for one in settings.audiences)
    subjects = Subjects((_issuer(one) for one in settings.subjects), clock)
    foreign = ForeignStarters(settings.tasks.foreign_starters, settings.trust_domain)
    starters = Starters(foreign)
    # The directory was loaded before and has every commit since: nothing falls between these two lines.
    starters.load(directory.entries())
    store.subscribe(starters.apply)
    refusals = Refusals(store, clock)
    feed = Feed(
        store, authorities, clock, issuer=settings.issuer, observe=metrics.revocation_delay.observe, audiences=audiences
    )
    await feed.start()
    lifecycle = Lifecycle(store, clock, count=lambda cause: metrics.ends.labels(cause).inc())
    exchange = Exchange(
        store=store,
        subjects=subjects,
        keys=authorities,
        vouching=directory,
        starters=starters,
        clock=clock,
        ids=Ids(secrets.token_bytes),
        refusals=refusals,
        policy=Policy(audiences, _defaults(settings)),
        issuer=settings.issuer,
        count=lambda outcome, reason: metrics.exchanges.labels(outcome, reason).inc(),
    )
    http = HttpServices(
        issuer=settings.issuer,
        trust_domain=settings.trust_domain,
        store=store,
        clock=clock,
        exchange=exchange,
        lifecycle=lifecycle,
        tokens=TaskTokens(store, authorities, clock, starters, audiences, issuer=settings.issuer),
        feed=feed,
        keys=authorities,
        refusals=refusals,
        bundles=bundles,
        clients=Clients(
            Proofs(store, clock, secrets.token_bytes),
            foreign,
            wit_keys={one.trust_domain: _wit_keys(one) for one in settings.tasks.wit_issuers},
            proxies=frozenset(settings.tasks.trusted_proxies),
        ),
    )
    return TasksHalf(
        store=store,
        clock=clock,
        trust_domain=settings.trust_domain,
        subjects=subjects,
        exchange=exchange,
        lifecycle=lifecycle,
        sessions=Sessions(store, clock, directory),
        feed=feed,
        refusals=refusals,
        http=http,
    )


def _audience(settings: AudienceSettings) -> Audience:
    return Audience(
        Resource(settings.resource),
        binding=frozenset(settings.binding),
        risk=settings.risk,
        introspectors=frozenset(settings.introspectors),
        token_ttl=None if settings.token_ttl is None else int(settings.token_ttl.total_seconds()),
    )


def _issuer(settings: SubjectSettings) -> SubjectIssuer:
    return SubjectIssuer(
        settings.issuer,
        frozenset(settings.audiences),
        clients=frozenset(settings.clients),
        namespace=settings.namespace,
        ca_path=settings.ca_path,
        required_claims=tuple(sorted(settings.required_claims.items())),
    )


def _defaults(settings: ServerSettings) -> TaskDefaults:
    tasks = settings.tasks
    return TaskDefaults(
        token_ttl=int(tasks.token_ttl.total_seconds()),
        task_ttl=int(tasks.task_ttl.total_seconds()),
        max_task_ttl=int(tasks.max_task_ttl.total_seconds()),
        supervision=Supervision(tasks.supervision),
        allow_unsupervised=tasks.allow_unsupervised,
        allow_bearer=tasks.allow_bearer,
    )


def _wit_keys(settings: WitIssuerSettings) -> dict[str, PublicKey]:
    try:
        return read_wit_keys(strictjson.loads(settings.keys_path.read_bytes()))
    except (OSError, Invalid) as error:
        raise Misconfigured(
            f"{settings.keys_path}: {error}", code="wit_keys", hint="a JWK Set with use wit-svid and a kid for each key"
        ) from None
