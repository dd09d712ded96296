"""Rows of SVIDs that were signed and of those that were taken back, as frozen values. Serial numbers are lower hex text."""

from dataclasses import dataclass, field
from datetime import datetime

from broker.spiffe import SpiffeId


@dataclass(frozen=True, slots=True)
class IssuedSvid:
    """An X.509-SVID that was signed; ``agent`` and ``entry_id`` are empty for a minted one. Ends in whole seconds."""

    authority: str
    serial: str
    spiffe_id: SpiffeId
    entry_id: str
    agent: str
    not_after: datetime


@dataclass(frozen=True, slots=True)
class RevokedSvid:
    """An X.509-SVID that was taken back; what is not known of it is empty. ``reason`` is RFC 5280's number (§5.3.1)."""

    authority: str
    serial: str
    spiffe_id: str
    entry_id: str
    not_after: datetime
    revoked_at: datetime
    reason: int


@dataclass(frozen=True, slots=True)
class CrlRow:
    """The newest revocation list of an authority; ``indirect``: of certificates that others signed."""

    authority: str
    indirect: bool
    number: int
    this_update: datetime
    next_update: datetime
    der: bytes = field(repr=False)
