"""The port of the store for SVIDs that were signed and taken back; composed in :mod:`broker.server.store.ports`."""

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol

from broker.server.store.revocation_rows import CrlRow, IssuedSvid, RevokedSvid


class RevocationReads(Protocol):
    """Signed and revoked X.509-SVIDs and revocation lists, read."""

    def issued_svids(self, wanted: str, now: datetime) -> tuple[IssuedSvid, ...]:
        """Give the living SVIDs of which ``wanted`` is the serial number, the entry id or the SPIFFE ID, oldest first.

        Looks at every batch that is kept: for what happens rarely.
        """
        ...

    def revoked_svids(self) -> tuple[RevokedSvid, ...]:
        """Give all that are kept, by authority and serial number."""
        ...

    def is_revoked(self, serial: str) -> bool:
        """Say whether an SVID of this serial number was revoked, whoever signed it."""
        ...

    def crls(self) -> tuple[CrlRow, ...]:
        """Give the newest list of each authority."""
        ...


class RevocationWrites(RevocationReads, Protocol):
    """Signed and revoked X.509-SVIDs and revocation lists, written."""

    def add_issued(self, seq: int, svids: Sequence[IssuedSvid]) -> None:
        """Keep one batch of one authority and agent, under the number of its last audit record."""
        ...

    def add_revoked(self, row: RevokedSvid) -> bool:
        """Keep; False when it was revoked before, and then nothing changes."""
        ...

    def put_crl(self, row: CrlRow) -> None:
        """Add, or replace the one of the same authority and kind."""
        ...
