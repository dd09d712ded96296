"""Wiring of the task half: its use cases from settings and parts, its gRPC services, and what its HTTP app needs."""

import asyncio
import secrets
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, Final

from broker._proto.service import ServiceBinding
from broker.clock import Clock
from broker.errors import BrokerError
from broker.server.api.grpc import actions as actions_api
from broker.server.api.grpc import approvals as approvals_api
from broker.server.api.grpc import delegations as delegations_api
from broker.server.api.grpc import feed as feed_api
from broker.server.api.grpc import policies as policies_api
from broker.server.api.grpc import sessions as sessions_api
from broker.server.api.grpc import tasks as tasks_api
from broker.server.api.http.clients import Clients
from broker.server.api.http.services import HttpServices
from broker.server.authority.authorities import Authorities
from broker.server.identity.directory import Directory
from broker.server.settings import (
    ServerSettings,
)
from broker.server.stillness import Stillness
from broker.server.store.ports import Store
from broker.server.task_rules import (
    audience,
    detail_type,
    remote_server,
    subject_issuer,
    supervision_rules,
    task_defaults,
    transaction_rules,
    wit_keys_of,
)
from broker.server.tasks.actions import Actions
from broker.server.tasks.admission import Starters
from broker.server.tasks.assertions import Assertions
from broker.server.tasks.changes import Changes
from broker.server.tasks.config import Audiences
from broker.server.tasks.decision import Policy
from broker.server.tasks.detail_types import DetailTypes
from broker.server.tasks.exchange import Exchange
from broker.server.tasks.feed import Feed
from broker.server.tasks.foreign import ForeignStarters
from broker.server.tasks.ids import Ids
from broker.server.tasks.lifecycle import Lifecycle
from broker.server.tasks.outward import RemoteServers
from broker.server.tasks.policy.bundles import Bundles
from broker.server.tasks.policy.explain import Explain
from broker.server.tasks.policy.rejudge import Rejudge
from broker.server.tasks.policy.rules import Rules
from broker.server.tasks.proofs import Proofs
from broker.server.tasks.refusals import Refusals
from broker.server.tasks.sessions import Sessions
from broker.server.tasks.subjects import Subjects
from broker.server.tasks.supervisor import Supervisor
from broker.server.tasks.tokens import TaskTokens
from broker.server.tasks.withdrawals import Distrust
from broker.server.user_ends import UserEnds, standing_of, user_ends
from broker.spiffe import BundleSet, TrustDomain
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
    assertions: Assertions
    lifecycle: Lifecycle
    changes: Changes
    actions: Actions
    sessions: Sessions
    feed: Feed
    refusals: Refusals
    http: HttpServices
    ends: UserEnds
    policies: policies_api.Policies
    rejudge: Rejudge
    stop_policy: Callable[[], None]
    supervisor: Supervisor

    def services(self) -> Iterable[Service]:
        """Give each service with what serves it."""
        tasks = tasks_api.Tasks(
            store=self.store,
            clock=self.clock,
            exchange=self.exchange,
            assertions=self.assertions,
            lifecycle=self.lifecycle,
            changes=self.changes,
            feed=self.feed,
            refusals=self.refusals,
            supervisor=self.supervisor,
        )
        return (
            (tasks_api.BINDING, tasks),
            (actions_api.BINDING, actions_api.Actions(self.actions, self.clock, self.refusals)),
            (feed_api.BINDING, feed_api.Feed(self.feed, self.trust_domain)),
            (policies_api.BINDING, self.policies),
            (delegations_api.BINDING, delegations_api.Delegations(self.ends.delegations, self.clock)),
            (approvals_api.BINDING, approvals_api.Approvals(self.ends.approvals, self.clock)),
            (delegations_api.STOPS, delegations_api.Stops(self.ends.users)),
            (sessions_api.BINDING, sessions_api.Sessions(self.sessions, self.supervisor.agent_lease)),
        )

    def loops(self) -> Iterable[Coroutine[Any, Any, None]]:
        """Give what has to run for as long as the server does."""
        return (self._sweep(), self.rejudge.run(), self.supervisor.run(), *self.ends.loops())

    async def close(self) -> None:
        """Let go of the issuers' connections and of the change log."""
        self.feed.stop()
        self.stop_policy()
        await self.ends.aclose()
        await self.subjects.aclose()

    async def _sweep(self) -> None:
        stillness = Stillness(self.store, self.clock)
        while True:
            try:
                if stillness.may_have_ended() and not await self.lifecycle.sweep() + await self.ends.stops.sweep():
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
    audiences = Audiences(audience(one) for one in settings.audiences)
    subjects = Subjects((subject_issuer(one) for one in settings.subjects), clock)
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
    rules = Rules(audiences, count=lambda action, effect: metrics.decisions.labels(action, effect).inc())
    rejudge = Rejudge(store, rules, clock, count=lambda cause: metrics.ends.labels(cause).inc())
    policies = Bundles(store, rules, clock, path=settings.policy.path, on_change=rejudge.soon)
    stop_policy = await policies.start()
    ids, detail_types = Ids(secrets.token_bytes), DetailTypes.of(map(detail_type, settings.authorization_details))
    policy = Policy(audiences, task_defaults(settings), rules, detail_types)

    issued = metrics.exchanges.labels("issued", "")

    def count(outcome: str, reason: str) -> None:
        # The one that is counted with every token is looked up once.
        (issued if outcome == "issued" else metrics.exchanges.labels(outcome, reason)).inc()

    standing = standing_of(settings)
    tokens = TaskTokens(
        store, authorities, clock, starters, audiences, issuer=settings.issuer, rules=rules, standing=standing
    )
    ends = user_ends(
        settings,
        store,
        clock,
        subjects=subjects,
        standing=standing,
        refusals=refusals,
        ids=ids,
        policy=policy,
        count=lambda cause: metrics.ends.labels(cause).inc(),
    )
    supervisor = Supervisor(
        store, clock, supervision_rules(settings), count=lambda cause: metrics.ends.labels(cause).inc()
    )
    await supervisor.start()
    tainted = (row.id for row in authorities.x509_keys if row.tainted)
    await Distrust(store, clock).settle(tainted, (audience.resource.text for audience in audiences))
    changes = Changes(
        store=store,
        clock=clock,
        vouching=directory,
        starters=starters,
        policy=policy,
        standing=standing,
        ids=ids,
        refusals=refusals,
        count=lambda cause: metrics.ends.labels(cause).inc(),
    )
    exchange = Exchange(
        is_alive=tokens.is_alive,
        store=store,
        subjects=subjects,
        keys=authorities,
        vouching=directory,
        starters=starters,
        clock=clock,
        ids=ids,
        refusals=refusals,
        policy=policy,
        issuer=settings.issuer,
        standing=standing,
        count=count,
    )
    assertions = Assertions(
        store=store,
        subjects=subjects,
        keys=authorities,
        tokens=tokens,
        vouching=directory,
        starters=starters,
        clock=clock,
        ids=ids,
        refusals=refusals,
        policy=policy,
        issuer=settings.issuer,
        transactions=transaction_rules(settings),
        remotes=RemoteServers(map(remote_server, settings.outward), audiences),
        count=count,
    )
    actions = Actions(
        store=store,
        clock=clock,
        tokens=tokens,
        audiences=audiences,
        vouching=directory,
        starters=starters,
        ids=ids,
        refusals=refusals,
        count=lambda result: metrics.claims.labels(result).inc(),
    )
    http = HttpServices(
        issuer=settings.issuer,
        trust_domain=settings.trust_domain,
        store=store,
        clock=clock,
        exchange=exchange,
        assertions=assertions,
        lifecycle=lifecycle,
        changes=changes,
        actions=actions,
        tokens=tokens,
        feed=feed,
        keys=authorities,
        refusals=refusals,
        supervisor=supervisor,
        delegations=ends.delegations,
        approvals=ends.approvals,
        logout_tokens=ends.logout_tokens,
        events=ends.events,
        signals=ends.signals,
        audiences=audiences,
        detail_types=detail_types,
        bundles=bundles,
        clients=Clients(
            Proofs(store, clock, secrets.token_bytes),
            foreign,
            wit_keys={one.trust_domain: wit_keys_of(one) for one in settings.tasks.wit_issuers},
            proxies=frozenset(settings.tasks.trusted_proxies),
        ),
    )
    return TasksHalf(
        store=store,
        clock=clock,
        trust_domain=settings.trust_domain,
        subjects=subjects,
        exchange=exchange,
        assertions=assertions,
        lifecycle=lifecycle,
        changes=changes,
        actions=actions,
        sessions=Sessions(store, clock, directory, supervisor.agent_heard),
        feed=feed,
        refusals=refusals,
        http=http,
        ends=ends,
        policies=policies_api.Policies(
            policies,
            Explain(store, rules, clock, tokens),
            rules,
            audiences,
            issuers=[one.issuer for one in settings.subjects],
            refusals=refusals,
        ),
        rejudge=rejudge,
        stop_policy=stop_policy,
        supervisor=supervisor,
    )
