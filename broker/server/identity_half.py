"""Wiring of the identity half: its use cases from settings and parts, and its gRPC services from its use cases."""

import random
from collections.abc import Coroutine, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from broker._proto.service import ServiceBinding
from broker.attestation.catalogue import Catalogue
from broker.attestation.contract import Home, NodeServerAttestor, SettledAttestor
from broker.clock import Clock
from broker.server.api.grpc import (
    agent,
    bundle,
    entries,
    entry,
    local_authority,
    revocations,
    svid,
    trustdomain,
    watch,
)
from broker.server.api.grpc import authorities as authorities_api
from broker.server.api.rate_limits import Limits
from broker.server.authority.crl_publisher import CrlPublisher
from broker.server.federation_settings import bootstrap, configured_relationships
from broker.server.identity.admission import Admission
from broker.server.identity.bundles import Bundles
from broker.server.identity.directory import Directory
from broker.server.identity.downstream import Downstream
from broker.server.identity.endpoint_client import EndpointClient
from broker.server.identity.entries import Entries
from broker.server.identity.federated import Federated
from broker.server.identity.join_tokens import JoinTokens
from broker.server.identity.nodes import Nodes
from broker.server.identity.polling import Polling
from broker.server.identity.pruning import NodePruning, PruningRules
from broker.server.identity.relationships import Relationships
from broker.server.identity.revocation import Revocation
from broker.server.identity.signing import Signing, SigningRules
from broker.server.identity.watch import Watch
from broker.server.key_room import KeyRoom
from broker.server.settings import ServerSettings
from broker.server.store.ports import Store
from broker.server.tasks.lifecycle import end_revoked
from broker.server.tasks.withdrawals import Distrust, TaskWithdrawals
from broker.telemetry.metrics import Metrics

Service = tuple[ServiceBinding, object]


@dataclass(frozen=True, slots=True)
class IdentityHalf:
    """The use cases of the identity half."""

    store: Store
    clock: Clock
    directory: Directory
    nodes: Nodes
    admission: Admission
    join_tokens: JoinTokens
    entries: Entries
    signing: Signing
    bundles: Bundles
    federated: Federated
    relationships: Relationships
    polling: Polling
    watch: Watch
    downstream: Downstream
    room: KeyRoom
    limits: Limits
    pruning: NodePruning
    publisher: CrlPublisher
    revocation: Revocation

    def services(self) -> Iterable[Service]:
        """Give each service with what serves it."""
        return (
            (
                agent.BINDING,
                agent.Agent(
                    self.nodes,
                    self.admission,
                    self.join_tokens,
                    limits=self.limits,
                    trust_domain=self.entries.trust_domain,
                ),
            ),
            (bundle.BINDING, bundle.Bundle(self.bundles, self.downstream, limits=self.limits)),
            (entry.BINDING, entry.Entry(self.entries, self.directory, self.clock)),
            (entries.BINDING, entries.Entries(self.entries, self.clock)),
            (svid.BINDING, svid.Svid(self.signing, self.downstream, limits=self.limits)),
            (local_authority.BINDING, local_authority.LocalAuthority(self.room.forced)),
            (authorities_api.BINDING, authorities_api.Authorities(self.room.forced, self.room.replica)),
            (trustdomain.BINDING, trustdomain.TrustDomains(self.relationships, self.polling)),
            (revocations.BINDING, revocations.Revocations(self.revocation)),
            (watch.BINDING, watch.Watch(self.watch, self.nodes, self.store.id)),
        )

    def loops(self) -> Iterable[Coroutine[Any, Any, None]]:
        """Give what has to run for as long as the server does."""
        return self.nodes.run(), self.entries.run(), self.pruning.run(), self.polling.run(), self.publisher.run()


async def identity_half(
    settings: ServerSettings,
    store: Store,
    clock: Clock,
    *,
    room: KeyRoom,
    workers: Executor,
    metrics: Metrics,
) -> IdentityHalf:
    """Make the use cases and load the directory; raises Misconfigured, Unavailable."""
    authorities = room.authorities
    directory = Directory(clock)
    await directory.load(store)
    withdrawals = TaskWithdrawals()
    nodes = Nodes(store, directory, clock, withdrawals)
    federated = Federated(authorities, configured_relationships(settings))
    await federated.load(store)
    await bootstrap(settings, store, clock)
    bundles = Bundles(
        store,
        authorities,
        room.rotation,
        federated,
        clock,
        trust_domain=settings.trust_domain,
        withdrawals=withdrawals,
    )
    client = EndpointClient(clock, settings.federation.web_ca_path)
    publisher = CrlPublisher(store, room.keys, authorities, clock)
    revocation = Revocation(
        store,
        clock,
        trust_domain=settings.trust_domain,
        directory=directory,
        authorities=authorities,
        publisher=publisher,
        end_session=end_revoked,
    )
    await revocation.load()
    await publisher.start()
    room.forced.on_distrust(Distrust(store, clock).authority)
    home = Home(settings.trust_domain, lambda: authorities.bundle)
    return IdentityHalf(
        store=store,
        clock=clock,
        directory=directory,
        nodes=nodes,
        admission=Admission(
            store,
            nodes,
            authorities,
            clock,
            trust_domain=settings.trust_domain,
            attestors=_node_attestors(settings, home),
            agent_ttl=settings.agent_ttl,
        ),
        join_tokens=JoinTokens(store, clock, settings.trust_domain),
        entries=Entries(store, directory, clock, settings.trust_domain, withdrawals),
        signing=Signing(
            store,
            directory,
            authorities,
            clock,
            rules=_signing_rules(settings),
            workers=workers,
            count=lambda kind, signed: metrics.svids.labels(kind).inc(signed),
        ),
        bundles=bundles,
        federated=federated,
        relationships=Relationships(store, federated, clock, settings.trust_domain, withdrawals),
        polling=Polling(store, federated, clock, client.fetch, chance=random.SystemRandom().uniform),
        watch=Watch(store, directory, authorities, bundles, federated, crls=publisher),
        downstream=Downstream(
            store,
            authorities,
            room.rotation,
            room.upstream,
            clock,
            trust_domain=settings.trust_domain,
            ca_ttl=settings.ca_ttl,
        ),
        room=room,
        limits=Limits.of(clock, attestation=settings.ratelimit.attestation, signing=settings.ratelimit.signing),
        pruning=NodePruning(nodes, clock, _pruning_rules(settings)),
        publisher=publisher,
        revocation=revocation,
    )


def _node_attestors(settings: ServerSettings, home: Home) -> dict[str, NodeServerAttestor]:
    catalogue = Catalogue(frozenset(settings.attestors.trusted_distributions))
    made = {name: catalogue.node_server(name, table) for name, table in settings.attestors.node.items()}
    for attestor in made.values():
        if isinstance(attestor, SettledAttestor):
            attestor.settle(home)
    return made


def _pruning_rules(settings: ServerSettings) -> PruningRules:
    return PruningRules(
        settings.prune_attested_nodes_expired_for,
        settings.prune_attested_nodes_batch_size,
        settings.prune_non_reattestable_nodes,
    )


def _signing_rules(settings: ServerSettings) -> SigningRules:
    return SigningRules(
        trust_domain=settings.trust_domain,
        issuer=settings.issuer,
        x509_ttl=settings.default_x509_svid_ttl,
        jwt_ttl=settings.default_jwt_svid_ttl,
        default_audiences=frozenset(settings.default_allowed_audiences),
    )
