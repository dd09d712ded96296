"""Typed clients of our own admin APIs: one thin class per service, errors as this product's errors.

Knows messages and deadlines. Refuses to know where the server is (it is given a channel) and how an answer is shown.
Each class is imported when it is first asked for: the command line must start fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from broker.client.approvals import Approvals
    from broker.client.authorities import Authorities
    from broker.client.bundles import Bundles
    from broker.client.calls import Caller
    from broker.client.delegations import Delegations, Stops
    from broker.client.dial import dial_socket
    from broker.client.entries import Entries
    from broker.client.federation import Relationships
    from broker.client.health import Health
    from broker.client.nodes import Nodes
    from broker.client.policies import Policies
    from broker.client.revocations import Revocations
    from broker.client.svids import Svids
    from broker.client.tasks import Tasks

__all__ = [
    "Approvals",
    "Authorities",
    "Bundles",
    "Caller",
    "Delegations",
    "Entries",
    "Health",
    "Nodes",
    "Policies",
    "Relationships",
    "Revocations",
    "Stops",
    "Svids",
    "Tasks",
    "dial_socket",
]

_MODULES = {
    "Approvals": "approvals",
    "Authorities": "authorities",
    "Bundles": "bundles",
    "Caller": "calls",
    "Delegations": "delegations",
    "Entries": "entries",
    "Health": "health",
    "Nodes": "nodes",
    "Policies": "policies",
    "Relationships": "federation",
    "Revocations": "revocations",
    "Stops": "delegations",
    "Svids": "svids",
    "Tasks": "tasks",
    "dial_socket": "dial",
}


def __getattr__(name: str) -> object:
    """Import what is asked for (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = found
    return found
