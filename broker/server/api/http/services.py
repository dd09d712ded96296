"""What the HTTP door needs of the task half."""

from collections.abc import Callable
from dataclasses import dataclass

from broker.clock import Clock
from broker.server.api.http.clients import Clients
from broker.server.store.ports import Store
from broker.server.tasks.exchange import Exchange, TaskKeys
from broker.server.tasks.feed import Feed
from broker.server.tasks.lifecycle import Lifecycle
from broker.server.tasks.refusals import Refusals
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
    lifecycle: Lifecycle
    tokens: TaskTokens
    feed: Feed
    keys: TaskKeys
    refusals: Refusals
    bundles: Callable[[], BundleSet]
    clients: Clients
