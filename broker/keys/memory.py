"""Keys that live in this process and die with it: the default, because nothing on a disk can be copied.

A restart therefore makes new authorities; the old public halves stay published until what they signed has expired
(``broker/server/authority/rotation``).
"""

from collections.abc import Iterable
from typing import final

from broker.errors import Conflict, NotFound
from broker.keys.local import LocalSigner, generated
from broker.keys.signer import KeyName, Signer


@final
class MemoryKeys:
    """The key manager whose keys end with the process."""

    __slots__ = ("_signers",)

    def __init__(self) -> None:
        self._signers: dict[str, LocalSigner] = {}

    async def generate(self, name: str | KeyName) -> Signer:
        """Make a P-256 key under a new name; ``Conflict`` when the name is taken."""
        signer = generated(name)
        if signer.id in self._signers:
            raise Conflict(f"there is a key {signer.id!r} already", code="key_exists")
        self._signers[signer.id] = signer
        return signer

    def signer(self, key_id: str) -> Signer:
        """Find a key; ``NotFound`` when it is not held here."""
        try:
            return self._signers[key_id]
        except KeyError:
            raise NotFound(f"no key {key_id!r} is held here", code="key_not_found") from None

    def ids(self) -> Iterable[str]:
        """Name every key that is held here."""
        return tuple(self._signers)

    async def remove(self, key_id: str) -> None:
        """Forget a key; a name that is not held is no error."""
        self._signers.pop(key_id, None)

    def __repr__(self) -> str:
        return f"MemoryKeys({len(self._signers)} keys, <secret>)"
