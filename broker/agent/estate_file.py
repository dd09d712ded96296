"""What the agent knows and holds, in its runtime directory, for a restart while the server is away (ADR 0026).

The entries, the bundles, the revocation lists, and one signed spare per entry lately used; no session's own key and
no JWT-SVID. The content is encrypted, and what is damaged or in clear is no file (ADR 0071). One that another agent or
another boot of the machine wrote is removed.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from google.protobuf.message import DecodeError

from broker._proto.broker.agent.v1 import estate_pb2
from broker.agent import wire
from broker.agent.sealed import SealedFile, SealingKey
from broker.agent.wire import ToldBundle
from broker.errors import BrokerError, InvalidJson
from broker.registry import Entry
from broker.spiffe import SpiffeId, TrustDomain
from broker.spiffe.revocation import read_crls

FILE: Final = "estate.bin"
MAX_SIZE: Final = 128 << 20  # bytes: MAX_ENTRIES entries of 4 KiB, a thousand spares, and bundles
MAX_ENTRIES: Final = 20_000  # of one node; above that only those that were used here lately
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class KeptSpare:
    """A spare of one entry: its chain, leaf first, and its key as PKCS#8. ``used_at``: the entry's last use here."""

    entry_id: str
    chain_der: tuple[bytes, ...] = field(repr=False)
    key_der: bytes = field(repr=False)
    used_at: datetime


@dataclass(frozen=True, slots=True)
class KeptEstate:
    """Everything as of ``heard_at``, the server's last word. ``is_partial``: not every entry is here."""

    agent_id: SpiffeId
    heard_at: datetime
    entries: tuple[Entry, ...]
    bundles: tuple[ToldBundle, ...]
    spares: tuple[KeptSpare, ...]
    is_partial: bool = False
    crls: tuple[bytes, ...] = ()  # DER


class EstateFile:
    """The file, in the directory that :class:`broker.agent.identity_file.IdentityFile` holds."""

    def __init__(
        self, directory: Path, trust_domain: TrustDomain, key: SealingKey | None, *, boot_id: str | None = None
    ) -> None:
        """``key`` None: nothing is kept. ``boot_id`` None: the kernel's."""
        self._file = SealedFile(directory / FILE, key, max_size=MAX_SIZE)
        self._trust_domain = trust_domain
        self._boot_id = BOOT_ID.read_text("ascii").strip() if boot_id is None else boot_id

    def load(self, agent_id: SpiffeId) -> KeptEstate | None:
        """Read what this agent kept under this boot, None where there is nothing; raises InvalidJson for a bad file."""
        content = self._file.read()
        if content is None:
            return None
        try:
            message = estate_pb2.KeptEstate.FromString(content)
            if (message.trust_domain, message.agent_id) != (str(self._trust_domain), str(agent_id)):
                raise InvalidJson("the kept estate is another agent's")
            if message.boot_id != self._boot_id:
                raise InvalidJson("the kept estate is of an earlier boot")
            return self._parsed(message, agent_id)
        except (DecodeError, BrokerError, OverflowError, OSError) as error:
            raise InvalidJson(error.message if isinstance(error, InvalidJson) else "it cannot be read") from None

    def _parsed(self, message: estate_pb2.KeptEstate, agent_id: SpiffeId) -> KeptEstate:
        bundles, crls = tuple(map(wire.bundle, message.bundles)), tuple(message.crls)
        for own in (one.bundle for one in bundles if one.bundle.trust_domain == self._trust_domain):
            read_crls(crls, own.x509_authorities)
        return KeptEstate(
            agent_id,
            datetime.fromtimestamp(message.heard_at, UTC),
            tuple(wire.entry(one, self._trust_domain) for one in message.entries),
            bundles,
            tuple(
                KeptSpare(one.entry_id, tuple(one.cert_chain), one.key, datetime.fromtimestamp(one.used_at, UTC))
                for one in message.spares
            ),
            message.is_partial,
            crls,
        )

    def store(self, kept: KeptEstate) -> None:
        """Replace what is kept; on return it is on the disk. Raises OSError. For a thread of its own."""
        self._file.require_key()
        message = estate_pb2.KeptEstate(
            trust_domain=str(self._trust_domain),
            agent_id=str(kept.agent_id),
            boot_id=self._boot_id,
            heard_at=int(kept.heard_at.timestamp()),
            entries=map(wire.entry_message, kept.entries),
            is_partial=kept.is_partial,
            bundles=map(wire.bundle_message, kept.bundles),
            crls=kept.crls,
            spares=[
                estate_pb2.KeptSpare(
                    entry_id=one.entry_id,
                    cert_chain=one.chain_der,
                    key=one.key_der,
                    used_at=int(one.used_at.timestamp()),
                )
                for one in kept.spares
            ],
        )
        self._file.write(message.SerializeToString())

    def remove(self) -> None:
        """Forget what is kept; harmless when there is nothing."""
        self._file.remove()


def worth_keeping(entries: Iterable[Entry], used: Iterable[str]) -> tuple[tuple[Entry, ...], bool]:
    """Give the entries that are written down, and whether some are left out."""
    every = tuple(entries)
    if len(every) <= MAX_ENTRIES:
        return every, False
    lately = frozenset(used)
    return tuple(entry for entry in every if entry.id in lately), True
