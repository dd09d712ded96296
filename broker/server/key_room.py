"""Wiring of the key room: keys, authorities, who stands above them, and their rotation."""

from collections.abc import Coroutine, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Final

from broker.clock import Clock
from broker.keys import DiskKeys, KeyManager, MemoryKeys
from broker.server.authority.authorities import Authorities
from broker.server.authority.forced import Forced
from broker.server.authority.journal import Journal, TaskKeysHook
from broker.server.authority.replica import replica_name
from broker.server.authority.rotation import Rotation, RotationRules
from broker.server.authority.upstream import DiskUpstream, SelfSigned, Upstream
from broker.server.nested import ServerUpstream
from broker.server.settings import ServerSettings
from broker.server.store.ports import Store
from broker.server.store.rows import AuthorityKind

KEYS_DIRECTORY: Final = "keys"
"""In the data directory."""


@dataclass(frozen=True, slots=True)
class KeyRoom:
    """What the halves need of it."""

    authorities: Authorities
    rotation: Rotation
    forced: Forced
    upstream: Upstream
    replica: str
    keys: KeyManager

    def loops(self) -> Iterable[Coroutine[Any, Any, None]]:
        """Give what has to run for as long as the server does."""
        return self.rotation.run(), self.rotation.run_following()

    async def withdraw(self) -> None:
        """Take back what a start has published that failed before a door was open, unless the next one has the keys.

        A server that is started again and again with settings that cannot be would fill the bundle. Raises Unavailable.
        """
        if isinstance(self.keys, MemoryKeys):
            await self.rotation.forsake()


async def key_room(
    settings: ServerSettings, store: Store, clock: Clock, stack: AsyncExitStack, *, on_task_keys: TaskKeysHook
) -> KeyRoom:
    """Open it, with an active authority of each kind; raises Misconfigured, Unavailable."""
    replica = stack.enter_context(replica_name(settings.data_dir))
    keys: KeyManager = MemoryKeys()
    if settings.keys.manager == "disk":
        keys = DiskKeys(settings.data_dir / KEYS_DIRECTORY)
    authorities = Authorities(settings.trust_domain, keys)
    upstream = await _upstream(settings, clock, stack)
    journal = Journal(store, authorities, clock, on_task_keys=on_task_keys)
    rotation = Rotation(journal, keys, upstream, clock, _rules(settings, replica))
    rotation.follow(store)
    await rotation.start()
    forced = Forced(journal, rotation, is_below=upstream.is_above)
    return KeyRoom(authorities, rotation, forced, upstream, replica, keys)


async def _upstream(settings: ServerSettings, clock: Clock, stack: AsyncExitStack) -> Upstream:
    if (files := settings.upstream.disk) is not None:
        on_disk = DiskUpstream(
            settings.trust_domain,
            clock,
            certificate=files.cert_file_path,
            key=files.key_file_path,
            bundle=files.bundle_file_path,
        )
        on_disk.check()
        return on_disk
    if (above := settings.upstream.spire) is not None:
        return await stack.enter_async_context(
            ServerUpstream(
                settings.trust_domain,
                clock,
                address=f"{above.server_address}:{above.server_port}",
                workload_api=above.workload_api_socket,
            )
        )
    return SelfSigned(settings.trust_domain, clock)


def _rules(settings: ServerSettings, replica: str) -> RotationRules:
    kinds: tuple[AuthorityKind, ...] = (AuthorityKind.X509, AuthorityKind.JWT)
    if "tasks" in settings.roles:
        kinds = (*kinds, AuthorityKind.TASK)
    return RotationRules(settings.trust_domain, kinds, settings.ca_ttl, replica)
