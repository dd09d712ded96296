"""The agent's own identity: how it gets one, keeps it, renews it at half-life, and loses it when it is banned.

Node attestation is SPIRE's: AttestAgent with evidence and a certificate request, challenges answered by the attestor,
renewal by RenewAgent. A new SVID is stored before it is used, because the server drops the old one at the new one's
first use. Whom the agent serves is not known here.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from broker._proto.spire.api.server.agent.v1 import agent_pb2
from broker._proto.spire.api.types import x509svid_pb2
from broker.agent.backoff import Backoff
from broker.agent.identity_file import IdentityFile, StoredIdentity
from broker.agent.kept import Kept
from broker.agent.node_attestation import csr, fetch_bundle, judged, prove
from broker.agent.signing import MAX_LIFETIME
from broker.agent.upstream import RPC_TIMEOUT, Upstream, answered
from broker.attestation.contract import NodeAgentAttestor
from broker.clock import Clock
from broker.errors import BrokerError, InvalidJson, InvalidSvid, Refused, Unavailable
from broker.spiffe import Bundle, BundleSet, SpiffeId, TrustDomain, X509Svid
from broker.telemetry.log import get_logger
from broker.transport.tls import TlsIdentity

HALF_LIFE: Final = 0.5
JITTER: Final = 0.1  # of the half-life: a fleet that joined together does not renew together
CHECK_EVERY: Final = 5.0  # seconds: the wall clock may jump, so it is asked rather than slept towards
LOST_CODES: Final = frozenset({"agent_banned", "agent_not_attested", "agent_evicted"})
"""What the server says when this agent's identity is worth nothing any more."""
ATTEST_CODES: Final = frozenset({"agent_must_reattest", "agent_not_active", "agent_expired"})
"""What it says when only a new attestation helps."""
_MOMENT: Final = timedelta(seconds=1)

_log = get_logger("agent.bootstrap")


class Condition(StrEnum):
    """How it stands with the agent's own identity."""

    JOINING = "joining"  # never had one
    JOINED = "joined"
    EXPIRED = "expired"  # and no server to ask
    REFUSED = "refused"  # asked, and denied for a reason that does not pass by itself
    LOST = "lost"  # banned or evicted: nobody is served


class NodeIdentity:
    """The agent's key, SVID and bundle. ``on_change`` is called after each change of the TLS identity, ``on_lost`` when it is gone."""

    def __init__(
        self,
        trust_domain: TrustDomain,
        store: IdentityFile,
        attestor: NodeAgentAttestor,
        clock: Clock,
        *,
        bundle: Bundle | None,
        on_change: Callable[[], None],
        on_lost: Callable[[], None],
    ) -> None:
        """``bundle`` None: nobody is trusted yet (insecure bootstrap), or only what is stored is."""
        self.trust_domain = trust_domain
        self._store = store
        self._kept = Kept(store)
        self._writing: set[asyncio.Task[None]] = set()
        self._attestor = attestor
        self._clock = clock
        self._on_change = on_change
        self._on_lost = on_lost
        self._tls: TlsIdentity | None = None
        self._svid: X509Svid | None = None
        self._bundle = bundle
        self._reattestable = False
        self._renew_at: datetime | None = None
        self._tainted: frozenset[x509.Certificate] = frozenset()
        self._news = asyncio.Event()
        self._refusal: BrokerError | None = None
        self._is_lost = False
        self.last_id: SpiffeId | None = None

    @property
    def condition(self) -> Condition:
        """How it stands with this agent's own identity."""
        if self.tls is not None:
            return Condition.JOINED
        if self._is_lost:
            return Condition.LOST
        if self._refusal is not None:
            return Condition.REFUSED
        return Condition.JOINING if self.last_id is None else Condition.EXPIRED

    @property
    def reattestable(self) -> bool:
        """Whether the node can prove itself again, as the server said last."""
        return self._reattestable

    @property
    def svid(self) -> X509Svid | None:
        """The agent's SVID, expired or not."""
        return self._svid

    @property
    def bundles(self) -> BundleSet:
        """What the server is judged by."""
        return BundleSet() if self._bundle is None else BundleSet.of(self._bundle)

    @property
    def bundle(self) -> Bundle | None:
        """The trust domain's own bundle, as far as it is known."""
        return self._bundle

    @property
    def tls(self) -> TlsIdentity | None:
        """What the agent presents; None before attestation and after its SVID has expired."""
        return self._tls if self._svid is not None and self._clock.now() < self._svid.expires_at else None

    @property
    def id(self) -> SpiffeId | None:
        """The agent's SPIFFE ID."""
        return None if self._svid is None else self._svid.id

    def load(self) -> bool:
        """Take up what an earlier run stored, and say whether it is usable; what is not is left for attestation.

        Of an SVID that has expired the bundle and the ID still count: the server is known, and whose entries were kept.
        """
        try:
            stored = self._store.load(self.trust_domain)
            if stored is None:
                return False
            now = self._clock.now()
            ends = x509.load_der_x509_certificate(stored.tls.chain_der[0]).not_valid_after_utc
            svid = judged(stored.tls.chain_der, stored.tls.key, stored.bundles, min(now, ends - _MOMENT))
        except (InvalidJson, InvalidSvid, ValueError) as error:
            known = error if isinstance(error, BrokerError) else InvalidJson("its certificate cannot be read")
            _log.warning("stored_identity_unusable", code=known.reason, reason=known.message)
            return False
        # The stored bundle was followed to the present; the one in the settings may be years old.
        self._bundle, self._reattestable, self.last_id = stored.bundle, stored.reattestable, svid.id
        if svid.expires_at <= now:
            _log.warning("stored_identity_expired", agent=str(svid.id), expires_at=svid.expires_at.isoformat())
            return False
        self._hold(stored.tls, svid)
        return True

    def follow(self, bundle: Bundle, tainted: frozenset[x509.Certificate] = frozenset()) -> None:
        """Take over the trust domain's bundle as the server tells it over a verified connection, and have it stored.

        An SVID of ours whose authority is ``tainted``, or gone, is renewed at once.
        """
        if not bundle.x509_authorities:
            return
        is_new, self._bundle, self._tainted = bundle != self._bundle, bundle, tainted
        if self._is_suspect():
            self._news.set()
        if is_new:
            self._keep()

    async def attest(self, upstream: Upstream) -> None:
        """Prove this node and take the identity that the server gives; raises BrokerError."""
        key = ec.generate_private_key(ec.SECP256R1())
        kind, result = await prove(upstream, self._attestor, key)
        if self._bundle is None:
            self._bundle = await fetch_bundle(upstream, self.trust_domain)
        self._reattestable = result.reattestable
        self._take(key, result.svid)
        _log.info("node_attested", agent=str(self.id), attestor=kind)

    async def renew(self, upstream: Upstream) -> None:
        """Replace the SVID by a new one with a new key; raises BrokerError."""
        if self._reattestable:
            await self.attest(upstream)
            return
        try:
            await self._renew(upstream)
        except Refused as error:
            if error.reason not in ATTEST_CODES:
                raise
            await self.attest(upstream)

    async def _renew(self, upstream: Upstream) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        response: agent_pb2.RenewAgentResponse = await answered(
            upstream.agent.RenewAgent(
                agent_pb2.RenewAgentRequest(params=agent_pb2.AgentX509SVIDParams(csr=csr(key))), timeout=RPC_TIMEOUT
            )
        )
        self._take(key, response.svid)
        _log.info("agent_svid_renewed", agent=str(self.id))

    def lose(self) -> None:
        """The server wants this agent no more: delete its key and SVID."""
        self._is_lost = True
        self._drop()
        self._on_lost()
        self._on_change()

    def bootstrap_anew(self, bundle: Bundle | None) -> None:
        """Drop identity and trust, and begin as the first time; ``bundle`` None: whoever answers is trusted."""
        self._drop()
        self._bundle, self._tainted = bundle, frozenset()
        self._news.set()
        self._on_change()

    def _drop(self) -> None:
        self._kept.forget()
        self._tls = self._svid = self._renew_at = self.last_id = None

    async def keep(self, upstream: Upstream, chance: Callable[[], float]) -> None:
        """Renew at half-life or when its authority is tainted, and join again when the SVID is lost or has expired; runs until cancelled."""
        backoff = Backoff()
        delay = 0.0
        while True:
            await self._woken(delay)
            now = self._clock.now()
            if self._renew_at is None and self._svid is not None:
                self._renew_at = now + (self._svid.expires_at - now) * HALF_LIFE * (1 + JITTER * (2 * chance() - 1))
            if self.tls is not None and self._renew_at is not None and now < self._renew_at and not self._is_suspect():
                # A short life is looked at more often; the wall clock may jump, so a long one is, too.
                delay = min((self._renew_at - now).total_seconds(), CHECK_EVERY)
                continue
            try:
                await (self.renew(upstream) if self.tls is not None else self.attest(upstream))
                backoff.reset()
                # Where the server has no better authority yet, asking again at once would not help.
                delay = CHECK_EVERY if self._is_suspect() else 0.0
            except BrokerError as error:
                self.refused(error)
                self.not_joined(error)
                delay = backoff.next()

    def hurry(self) -> None:
        """Look at once: there is a connection to the server again."""
        self._news.set()

    async def _woken(self, delay: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await self._news.wait()
        self._news.clear()

    def _is_suspect(self) -> bool:
        if self._svid is None or self._bundle is None:
            return False
        authority = self._svid.authority
        return authority in self._tainted or authority not in self._bundle.x509_authorities

    def not_joined(self, error: BrokerError) -> None:
        """Note why there is no newer identity; what will not pass by itself is said to be so."""
        is_final = not isinstance(error, Unavailable)
        if is_final and self.tls is None:
            self._refusal = error
        _log.error(
            "agent_identity_not_renewed",
            state=self.condition.value,
            code=error.reason,
            reason=error.message,
            hint=error.hint
            or ("give the agent a new join token, or let its node attest again" if is_final else "is the server up?"),
        )

    def refused(self, error: BrokerError) -> None:
        """Note what the server said of this agent: an identity that it no longer accepts is deleted at once."""
        if error.reason in LOST_CODES and self._tls is not None:
            _log.error("agent_identity_lost", code=error.reason, reason=error.message)
            self.lose()

    def _take(self, key: ec.EllipticCurvePrivateKey, told: x509svid_pb2.X509SVID) -> None:
        tls = TlsIdentity(tuple(told.cert_chain), key)
        now = self._clock.now()
        svid = judged(tls.chain_der, key, self.bundles, now)
        if svid.not_after - now > MAX_LIFETIME:
            raise InvalidSvid("the server gave an identity for too long", code="svid_too_long")
        if svid.id.trust_domain != self.trust_domain:
            raise InvalidSvid("the server gave an identity of another trust domain", code="svid_wrong_id")
        self._hold(tls, svid)
        self._keep()
        self._on_change()

    def _hold(self, tls: TlsIdentity, svid: X509Svid) -> None:
        self._tls, self._svid, self._renew_at = tls, svid, None
        self._refusal, self._is_lost, self.last_id = None, False, svid.id

    def _keep(self) -> None:
        if self._tls is None or self._bundle is None:
            return
        writing = asyncio.get_running_loop().create_task(
            self._write(StoredIdentity(self._tls, self._bundle, self._reattestable)), name="identity-file"
        )
        self._writing.add(writing)
        writing.add_done_callback(self._writing.discard)

    async def _write(self, identity: StoredIdentity) -> None:
        try:
            await self._kept.save(identity)
        except OSError as error:
            # Served all the same: only a restart would need a new token.
            _log.error("identity_not_stored", reason=error.strerror or "")

    async def settle(self) -> None:
        """Wait until what is to be stored is on the disk, or is said not to be."""
        while self._writing:
            await asyncio.wait(self._writing)


async def join(node: NodeIdentity, upstream: Upstream, on_failure: Callable[[], None] = lambda: None) -> None:
    """Attest until it succeeds, waiting while the server is away; raises Refused and what else will not pass by itself."""
    backoff = Backoff()
    while node.tls is None:
        try:
            await node.attest(upstream)
        except Unavailable as error:
            _log.warning("server_unavailable", code=error.reason, reason=error.message)
            on_failure()
            await upstream.pause(backoff.next())
