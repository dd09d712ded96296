"""What the key room's tests share: a clock moved by hand, an authority, keys."""

from datetime import UTC, datetime, timedelta

from broker.keys.local import generated
from broker.server.authority import profile, x509
from broker.server.authority.x509 import X509Authority
from broker.spiffe import TrustDomain

DOMAIN = TrustDomain("example.org")
NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


class StandingClock:
    """Stands until it is moved."""

    def __init__(self, now: datetime = NOW) -> None:
        self.time = now

    def now(self) -> datetime:
        return self.time

    def monotonic(self) -> float:
        return self.time.timestamp()

    def advance(self, by: timedelta) -> None:
        self.time += by


def authority(now: datetime = NOW, ttl: timedelta = timedelta(hours=24), serial: int = 1 << 120) -> X509Authority:
    signer = generated("ca")
    return X509Authority.of("ca", root_der(signer, now, ttl, serial), signer)


def root_der(signer, now: datetime = NOW, ttl: timedelta = timedelta(hours=24), serial: int = 1 << 120) -> bytes:
    return x509.self_signed(DOMAIN, signer, serial, profile.authority_validity(now, ttl))
