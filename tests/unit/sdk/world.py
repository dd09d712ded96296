"""A verifier with a feed told by hand, certificates of a real authority, and a clock that tests step."""

from datetime import UTC, datetime, timedelta

from broker._proto.broker.server.v1 import feed_pb2
from broker.sdk.feed import Risk
from broker.sdk.verify import TokenVerifier
from broker.sdk.workload import Workload
from broker.spiffe import BundleSet
from broker.spiffe.x509svid import verify_x509_svid
from broker.tasks import Confirmation
from broker.tasks.keyset import write_keys
from tests.unit.tasks.world import AGENT, ISSUER, TICKETS, TokenKey, claims, delegation, task
from tests.unit.transport.pki import Authority


class SteppedClock:
    """Stands still until it is stepped; both clocks move together."""

    def __init__(self) -> None:
        self.wall = datetime.now(UTC).replace(microsecond=0)
        self.passed = 1000.0

    def now(self) -> datetime:
        return self.wall

    def monotonic(self) -> float:
        return self.passed

    def step(self, seconds: float) -> None:
        self.wall += timedelta(seconds=seconds)
        self.passed += seconds


def snapshot(key: TokenKey, *frames: feed_pb2.Frame, seq: int = 1, more: bool = False) -> feed_pb2.FeedMessage:
    told = feed_pb2.FeedSnapshot(issuer=ISSUER, keys=write_keys(key.public), frames=frames, more=more)
    return feed_pb2.FeedMessage(seq=seq, store="s1", snapshot=told)


def frame(seq: int, **members) -> feed_pb2.FeedMessage:
    return feed_pb2.FeedMessage(seq=seq, store="s1", frame=feed_pb2.Frame(seq=seq, forget_at=2**40, **members))


def heartbeat(seq: int = 1) -> feed_pb2.FeedMessage:
    return feed_pb2.FeedMessage(seq=seq, store="s1", heartbeat=feed_pb2.FeedHeartbeat())


class World:
    """One agent, its certificate, a signing key, and a verifier that has its first snapshot."""

    def __init__(self, *, risk: Risk = Risk.HIGH) -> None:
        self.clock = SteppedClock()
        self.key = TokenKey()
        self.authority = Authority("example.org")
        self.identity = self.authority.issue(AGENT.path, lifetime=timedelta(hours=12))
        workload = Workload("unix:/nowhere")
        workload._bundles = BundleSet.of(self.authority.bundle)
        workload._channel = _NoChannel()
        self.workload = workload
        self.verifier = TokenVerifier(workload, ISSUER, TICKETS, risk, self.clock)

    def hear(self, message: feed_pb2.FeedMessage) -> None:
        now = int(self.clock.now().timestamp())
        if self.verifier.feed.apply(message, monotonic=self.clock.monotonic(), now=now):
            self.verifier._keys_changed()

    def svid(self, identity=None):
        chain = (identity or self.identity).chain_der
        return verify_x509_svid(chain, self.workload.bundles, now=self.clock.now())

    def token(self, **members) -> str:
        now, extra = self.clock.now(), members.pop("extra", {})
        started = task(now=now, delegation=delegation(expires_at=now + timedelta(hours=2)), **members.pop("task", {}))
        cnf = members.pop("cnf", Confirmation(self.svid().x5t, "ws_1"))
        return self.key.token(claims(started, now=now, cnf=cnf, **members).to_payload() | extra)


class _NoChannel:
    """A channel that nobody calls: these tests tell the feed by hand."""

    def __getattr__(self, name: str):
        return lambda *_, **__: None
