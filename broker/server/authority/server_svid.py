"""The server's own SVID: what it shows on its TLS port, and how that outlives the process (ADR 0006).

The SVID and its key lie in the runtime directory, readable by the server's user only. A restarted server, whose new
authority nobody knows yet, proves itself under the old root with it until the agents have been told the new one.
"""

import asyncio
import contextlib
import ipaddress
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509 import load_pem_x509_certificates

from broker.clock import Clock
from broker.errors import BrokerError, Misconfigured
from broker.server.authority import profile
from broker.server.authority.authorities import Authorities
from broker.server.authority.profile import Leaf
from broker.spiffe import SpiffeId, TrustDomain, X509Svid, verify_x509_svid
from broker.telemetry.log import get_logger
from broker.transport.tls import TlsIdentity

SERVER_PATH: Final = "/spire/server"
"""SPIRE's path for the server; agents refuse any other."""
FILE_NAME: Final = "server-svid.pem"
HANDOVER: Final = timedelta(minutes=2)
"""A restarted server shows the old SVID at least this long, so that every agent can come back and learn the new root."""
MARGIN: Final = timedelta(seconds=10)
"""But never closer than this to its end."""
CHECK_EVERY: Final = 10.0
"""Seconds between two looks at the wall clock."""

log = get_logger("authority")


@dataclass(frozen=True, slots=True)
class ServerNames:
    """The names in the server's certificate, for callers who check names and not SPIFFE IDs."""

    dns_names: tuple[str, ...] = ()
    ip_addresses: tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, ...] = ()

    @classmethod
    def of(cls, issuer: str, bind_address: str) -> "ServerNames":
        """Take the host of the issuer's URL and the bind address; a wildcard or loopback address means localhost too."""
        hosts = [urlsplit(issuer).hostname or "", bind_address]
        bound = _address(bind_address)
        if bound is not None and (bound.is_unspecified or bound.is_loopback):
            hosts += ["localhost", "127.0.0.1", "::1"]
        addresses = dict.fromkeys(address for host in hosts if (address := _address(host)) is not None)
        names = dict.fromkeys(host for host in hosts if host and _address(host) is None)
        return cls(tuple(names), tuple(address for address in addresses if not address.is_unspecified))


@dataclass(frozen=True, slots=True)
class _Held:
    identity: TlsIdentity = field(repr=False)
    svid: X509Svid
    rotate_at: datetime
    signed_by: str = ""


class ServerSvid:
    """Holds the server's TLS identity of this moment, renews it, and keeps it across restarts."""

    def __init__(
        self,
        authorities: Authorities,
        clock: Clock,
        directory: Path,
        *,
        trust_domain: TrustDomain,
        names: ServerNames,
        ttl: timedelta,
        on_rotated: Callable[[], None] = lambda: None,
    ) -> None:
        """``directory`` exists and is the server's alone; ``on_rotated`` is called on the event loop."""
        self._authorities = authorities
        self._clock = clock
        self._path = directory / FILE_NAME
        self._id = SpiffeId.of(trust_domain, SERVER_PATH)
        self._names = names
        self._ttl = ttl
        self._on_rotated = on_rotated
        self._held: _Held | None = None
        self._news = asyncio.Event()
        authorities.subscribe(self._news.set)

    def identity(self) -> TlsIdentity:
        """Give what the TLS port shows now; ``start`` must have been called."""
        assert self._held is not None
        return self._held.identity

    @property
    def rotate_at(self) -> datetime:
        """When the next one is signed."""
        assert self._held is not None
        return self._held.rotate_at

    def start(self) -> None:
        """Take up what an earlier process left, if it still verifies, else sign a new one; raises Unavailable."""
        kept = self._load()
        if kept is None:
            self._save(*self._renew())
        else:
            self._held = kept
            log.info("server_svid_kept", serial=f"{kept.svid.serial:x}", expires_at=str(kept.svid.not_after))

    async def run(self) -> None:
        """Renew at half-life, and at once when the authority is tainted or gone; until cancelled."""
        while True:
            try:
                left = (self.rotate_at - self._clock.now()).total_seconds()
                if left > 0 and not self._is_suspect():
                    await self._woken(min(left, CHECK_EVERY))
                    continue
                renewed = self._renew()
            except BrokerError as error:
                log.warning("server_svid_not_renewed", error=type(error).__name__)
                await asyncio.sleep(1)
            else:
                self._on_rotated()
                await self._keep(*renewed)

    async def _keep(self, svid: X509Svid, key: ec.EllipticCurvePrivateKey) -> None:
        # In a thread: a disk may take seconds. Shown it is all the same; a restart signs another one.
        try:
            await asyncio.to_thread(self._save, svid, key)
        except OSError as error:
            log.warning("server_svid_not_kept", reason=error.strerror or type(error).__name__)

    async def _woken(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()
        self._news.clear()

    def _is_suspect(self) -> bool:
        assert self._held is not None
        # Only another authority can help: who stands above may be tainted before there is one.
        if self._authorities.x509().id == self._held.signed_by:
            return False
        authority = self._held.svid.authority
        return self._authorities.is_tainted(authority) or authority not in self._authorities.bundle.x509_authorities

    def _renew(self) -> tuple[X509Svid, ec.EllipticCurvePrivateKey]:
        authority, now = self._authorities.x509(), self._clock.now()
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = Leaf(
            self._id,
            profile.serial_number(secrets.randbits(profile.SERIAL_BITS)),
            authority.validity(now, self._ttl),
            self._names.dns_names,
            self._names.ip_addresses,
        )
        chain = authority.issue(leaf, key.public_key())
        svid = verify_x509_svid(chain, self._authorities.bundles, now=now)
        self._held = _Held(TlsIdentity(chain, key), svid, _half_life(svid), authority.id)
        log.info("server_svid_signed", serial=f"{svid.serial:x}", expires_at=str(svid.not_after))
        return svid, key

    def _load(self) -> _Held | None:
        try:
            # NOTE(security): O_NOFOLLOW, and the owner is checked on what was opened, not on the name.
            with os.fdopen(os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
                facts = os.fstat(file.fileno())
                if facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
                    raise Misconfigured(
                        f"{self._path} is not this user's alone",
                        code="server_svid_unsafe",
                        hint="remove it; the server signs a new one",
                    )
                text = file.read()
        except FileNotFoundError:
            return None
        return self._judge(text)

    def _judge(self, text: bytes) -> _Held | None:
        now = self._clock.now()
        try:
            key = load_pem_private_key(text, password=None)
            chain = tuple(cert.public_bytes(Encoding.DER) for cert in load_pem_x509_certificates(text))
            svid = verify_x509_svid(chain, self._authorities.bundles, now=now)
        except (ValueError, BrokerError) as error:
            # Its authority has been pruned, it has expired, or the file is cut off: a new one does.
            log.info("server_svid_dropped", error=type(error).__name__)
            return None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not _fits(key, svid) or svid.id != self._id:
            return None
        last = svid.not_after - MARGIN
        if last <= now or self._authorities.is_tainted(svid.authority):
            return None
        return _Held(TlsIdentity(chain, key), svid, min(max(_half_life(svid), now + HANDOVER), last))

    def _save(self, svid: X509Svid, key: ec.EllipticCurvePrivateKey) -> None:
        text = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        text += b"".join(cert.public_bytes(Encoding.PEM) for cert in svid.chain)
        fresh = self._path.with_suffix(f".{secrets.token_hex(4)}")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(text)
            fresh.replace(self._path)
        except OSError:
            with contextlib.suppress(OSError):
                fresh.unlink()
            raise


def _half_life(svid: X509Svid) -> datetime:
    # Of its life from the signature on: a short one, counted from its back-dated begin, would be over when it comes.
    begin = min(svid.not_before + profile.BACKDATE, svid.not_after)
    return begin + (svid.not_after - begin) / 2


def _fits(key: ec.EllipticCurvePrivateKey, svid: X509Svid) -> bool:
    def spki(public: ec.EllipticCurvePublicKey) -> bytes:
        return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    certified = svid.leaf.public_key()
    return isinstance(certified, ec.EllipticCurvePublicKey) and spki(certified) == spki(key.public_key())


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
