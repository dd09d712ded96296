"""The link between a spliced connection and its caller: a one-time unguessable name.

The connection to the private gRPC server is made from a socket bound to that name in the abstract namespace; gRPC
reports the name as its peer. A peer that is not in the index is nobody. What a caller is, the index does not know.
"""

import secrets
from typing import Generic, Protocol, TypeVar

from broker.errors import NotAttested

C = TypeVar("C")

NAME_BYTES = 16  # 128 random bits: a name cannot be guessed, and never comes twice
_SCHEME = "unix-abstract:"  # of the peers that gRPC reports for such a name


def new_name() -> str:
    """Give a fresh name: 32 lower-case hex digits."""
    return secrets.token_hex(NAME_BYTES)


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

    def admit(self, caller: C, link: Link | None = None, *, name: str = "") -> str:
        """Give a caller its name: ``name`` where its connection has one that is nobody's, else a fresh one.

        ``link``: who is told of its calls.
        """
        name = name or new_name()
        self._callers[name] = (caller, link)
        return name

    def of(self, grpc_peer: str) -> C:
        """The caller behind ``context.peer()``, asked once for each call.

        Raises NotAttested for any peer that no listener admitted.
        """
        # Nothing but names that were made here is in the index.
        known = self._callers.get(grpc_peer[len(_SCHEME) :]) if grpc_peer.startswith(_SCHEME) else None
        if known is None:
            raise NotAttested("this connection did not come through the listener", code="peer_unknown")
        caller, link = known
        if link is not None:
            link.begun()
        return caller

    def is_open(self, grpc_peer: str) -> bool:
        """Whether the connection of a peer that was known is open still."""
        return grpc_peer.removeprefix(_SCHEME) in self._callers

    def cut(self, grpc_peer: str, error: Exception) -> None:
        """End the connection of a peer that was known; harmless where it has ended, or cannot be ended from here."""
        _, link = self._callers.get(grpc_peer.removeprefix(_SCHEME), (None, None))
        if link is not None:
            link.cut(error)

    def forget(self, name: str) -> None:
        """Drop a name: calls that ask for it from now on are refused. Harmless when it is not there."""
        self._callers.pop(name, None)
