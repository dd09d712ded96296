"""When the server is not the one that this agent trusts: whether its first trust may be settled anew (ADR 0026).

SPIRE's three modes and its delay. A server whose authority is unknown may be a new installation, or an attacker: only the
operator's setting tells them apart, and then the trust comes from where it came the first time.
"""

import asyncio
from collections.abc import Callable
from typing import Final, Literal, Protocol

from broker.clock import Clock
from broker.errors import BrokerError
from broker.spiffe import Bundle
from broker.telemetry.log import get_logger

LOOK_EVERY: Final = 1.0  # seconds between looks

Mode = Literal["never", "auto", "always"]

_log = get_logger("agent.rebootstrap")


class Node(Protocol):
    """What this needs of :class:`broker.agent.bootstrap.NodeIdentity`."""

    @property
    def bundle(self) -> Bundle | None:
        """What the server is judged by."""
        ...

    @property
    def reattestable(self) -> bool:
        """Whether the node can prove itself again."""
        ...

    def bootstrap_anew(self, bundle: Bundle | None) -> None:
        """Drop the identity and trust this bundle."""
        ...


class Rebootstrap:
    """Looks whether the server is a stranger, and for how long already."""

    def __init__(
        self,
        mode: Mode,
        delay: float,
        clock: Clock,
        *,
        node: Node,
        is_stranger: Callable[[], bool],
        first_trust: Callable[[], Bundle | None],
    ) -> None:
        """``delay`` in seconds. ``first_trust`` reads the settings' bundle; None: whoever answers is trusted."""
        self._mode = mode
        self._delay = delay
        self._clock = clock
        self._node = node
        self._is_stranger = is_stranger
        self._first_trust = first_trust
        self._since: float | None = None
        self._told = ""

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY)
            self.look()

    def look(self) -> None:
        """One look; begins anew where the mode allows it and the delay is over."""
        if not self._is_stranger():
            self._since, self._told = None, ""
            return
        now = self._clock.monotonic()
        if self._since is None:
            self._since = now
        if self._mode == "never":
            self._tell(
                "rebootstrap_mode is never", "if it was installed anew: set trust_bundle_path, and remove private/"
            )
        elif self._mode == "auto" and not self._node.reattestable:
            self._tell("this node cannot prove itself again", "rebootstrap_mode = always, with a new join token")
        elif now - self._since < self._delay:
            self._tell("rebootstrap_delay is not over", "")
        else:
            self._begin()

    def _begin(self) -> None:
        try:
            bundle = self._first_trust()
        except BrokerError as error:
            self._tell(error.message, error.hint)
            return
        known = self._node.bundle
        if bundle is not None and known is not None and set(bundle.x509_authorities) <= set(known.x509_authorities):
            self._tell("trust_bundle_path has no other authority either", "put the new server's bundle there")
            return
        _log.warning("rebootstrapping", state=self._mode, reason="the server's authority is unknown")
        self._since, self._told = None, ""
        self._node.bootstrap_anew(bundle)

    def _tell(self, reason: str, hint: str) -> None:
        if reason != self._told:
            _log.error("server_not_trusted", state=self._mode, reason=reason, hint=hint)
            self._told = reason
