"""What the admin socket serves beyond the services of both halves: health, debug, logger, reflection."""

from collections.abc import Callable, Sequence

from broker.clock import Clock
from broker.server.api.grpc import debug, health, logger
from broker.server.identity.directory import Directory
from broker.server.identity_half import Service
from broker.spiffe import BundleSet
from broker.telemetry.log import LEVELS
from broker.transport.reflection import V1, V1ALPHA, Catalogue, ReflectionApi
from broker.transport.tls import TlsIdentity


def admin_services(
    services: Sequence[Service],
    *,
    is_ready: Callable[[], bool],
    directory: Directory,
    clock: Clock,
    identity: Callable[[], TlsIdentity],
    bundles: Callable[[], BundleSet],
    count_bundles: Callable[[], int],
) -> list[Service]:
    """Give ``services`` and what only the admin socket has; reflection tells all of them."""
    served: list[Service] = [
        *services,
        (
            debug.BINDING,
            debug.Debug(directory, clock, identity=identity, bundles=bundles, count_bundles=count_bundles),
        ),
        (logger.BINDING, logger.Logger(LEVELS)),
    ]
    served.append((health.BINDING, health.Health(is_ready, [binding.name for binding, _ in served])))
    tools = (V1, V1ALPHA)
    told = [*(binding for binding, _ in served), *tools]
    catalogue = Catalogue((binding.name for binding in told), (binding.file for binding in told))
    return [*served, *((tool, ReflectionApi(catalogue, tool)) for tool in tools)]
