"""The link between a spliced connection and its caller: a one-time unguessable name.

The connection to the private gRPC server is made from a socket bound to that name in the abstract namespace; gRPC
reports the name as its peer. A peer that is not in the index is nobody. What a caller is, the index does not know.
"""

import re
import secrets
from typing import Generic, Protocol, TypeVar

from broker.errors import NotAttested

C = TypeVar("C")

NAME_BYTES = 16  # 128 random bits: a name cannot be guessed, and never comes twice
_GRPC_PEER = re.compile(r"unix-abstract:([0-9a-f]{32})", re.ASCII)


class Link(Protocol):
    """A connection, as far as the calls on it concern it."""

    def begun(self) -> None:
        """One call was taken up."""

    def cut(self, error: Exception) -> None:
        """End the connection at once, for this reason."""


class CallerIndex(Generic[C]):
    """Callers of the connections that are open now, by name; used from one event loop."""

    def __init__(self) -> None:
        self._callers: dict[str, tuple[C, Link | None]] = {}

    def __len__(self) -> int:
        """How many connections are known."""
        return len(self._callers)

    def admit(self, caller: C, link: Link | None = None) -> str:
        """Give a caller a fresh name: 32 lower-case hex digits. ``link``: who is told of its calls."""
        name = secrets.token_hex(NAME_BYTES)
        self._callers[name] = (caller, link)
        return name

    def of(self, grpc_peer: str) -> C:
        """The caller behind ``context.peer()``, asked once for each call.

        Raises NotAttested for any peer that no listener admitted.
        """
        match = _GRPC_PEER.fullmatch(grpc_peer)
        if match is None or match[1] not in self._callers:
            raise NotAttested("this connection did not come through the listener", code="peer_unknown")
        caller, link = self._callers[match[1]]
        if link is not None:
            link.begun()
        return caller

    def cut(self, grpc_peer: str, error: Exception) -> None:
        """End the connection of a peer that was known; harmless where it has ended, or cannot be ended from here."""
        _, link = self._callers.get(grpc_peer.removeprefix("unix-abstract:"), (None, None))
        if link is not None:
            link.cut(error)

    def forget(self, name: str) -> None:
        """Drop a name: calls that ask for it from now on are refused. Harmless when it is not there."""
        self._callers.pop(name, None)
