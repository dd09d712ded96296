"""What the HTTP door needs of the task half."""

from collections.abc import Callable
from dataclasses import dataclass, field

from broker.clock import Clock
from broker.server.api.http.clients import Clients
from broker.server.store.ports import Store
from broker.server.tasks.actions import Actions
from broker.server.tasks.approvals import Approvals
from broker.server.tasks.assertions import Assertions
from broker.server.tasks.changes import Changes
from broker.server.tasks.config import Audiences
from broker.server.tasks.delegations import Delegations
from broker.server.tasks.detail_types import DetailTypes
from broker.server.tasks.exchange import Exchange, TaskKeys
from broker.server.tasks.feed import Feed
from broker.server.tasks.lifecycle import Lifecycle
from broker.server.tasks.refusals import Refusals
from broker.server.tasks.signals import LogoutTokens, SecurityEvents, Signals
from broker.server.tasks.supervisor import Supervisor
from broker.server.tasks.tokens import TaskTokens
from broker.spiffe import BundleSet, TrustDomain


@dataclass(frozen=True, slots=True)
class HttpServices:
    """The use cases and facts behind the endpoints. ``bundles`` gives those under which SVIDs are judged, each by its own."""

    issuer: str
    trust_domain: TrustDomain
    store: Store
    clock: Clock
    exchange: Exchange
    assertions: Assertions
    lifecycle: Lifecycle
    changes: Changes
    actions: Actions
    tokens: TaskTokens
    feed: Feed
    keys: TaskKeys
    refusals: Refusals
    supervisor: Supervisor
    bundles: Callable[[], BundleSet]
    delegations: Delegations
    approvals: Approvals
    logout_tokens: LogoutTokens
    events: SecurityEvents
    signals: Signals
    clients: Clients
    audiences: Audiences = field(default_factory=Audiences)
    detail_types: DetailTypes = field(default_factory=DetailTypes)
