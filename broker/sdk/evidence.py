"""Who is on the other end of a connection, by its certificate: judged once, and remembered while nothing about it changes."""

import ssl
from collections import OrderedDict
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from broker.clock import Clock
from broker.errors import Refused
from broker.spiffe import BundleSet, X509Svid, verify_x509_svid
from broker.tasks import PeerEvidence
from broker.transport.tls import SvidPeer, peer_chain

PEERS_REMEMBERED = 4_096
"""Client certificates whose chain is not checked twice."""

Connection = ssl.SSLObject | ssl.SSLSocket | Sequence[bytes] | MutableMapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Peer:
    evidence: PeerEvidence
    not_after: float
    bundles: object


class Peers:
    """Gives the evidence of connections; bounded."""

    def __init__(self, bundles: Callable[[], BundleSet], clock: Clock) -> None:
        """``bundles`` gives those under which certificates are judged now."""
        self._bundles = bundles
        self._clock = clock
        self._chains: OrderedDict[bytes, _Peer] = OrderedDict()
        self._svids: OrderedDict[str, tuple[X509Svid, PeerEvidence, float]] = OrderedDict()

    def evidence_of(self, connection: Connection) -> PeerEvidence:
        """Give the evidence on this connection; raises Refused, InvalidSvid."""
        if isinstance(connection, MutableMapping):
            peer = connection.get("extensions", {}).get("broker.peer")
            return self._of_svid(peer.svid) if isinstance(peer, SvidPeer) else self._of_chain(())
        if isinstance(connection, ssl.SSLObject | ssl.SSLSocket):
            return self._of_chain(peer_chain(connection))
        return self._of_chain(connection)

    def _of_svid(self, svid: X509Svid) -> PeerEvidence:
        """Give the evidence of an SVID that the listener verified on this connection, and goes on judging."""
        known = self._svids.get(svid.x5t)
        if known is None or known[0] is not svid:
            known = self._svids[svid.x5t] = svid, PeerEvidence.from_svid(svid), svid.expires_at.timestamp()
            if len(self._svids) > PEERS_REMEMBERED:
                self._svids.popitem(last=False)
        # NOTE(security): a connection may outlive its SVID by a moment; nothing is accepted on it then (PB13).
        if self._clock.now().timestamp() >= known[2]:
            raise Refused("the connection's certificate has expired", code="svid_expired", hint="connect anew")
        return known[1]

    def _of_chain(self, chain: Sequence[bytes]) -> PeerEvidence:
        if not chain:
            raise Refused("the connection has no client certificate", code="binding_missing", hint="use mutual TLS")
        bundles = self._bundles()
        known = self._chains.get(chain[0])
        now = self._clock.now()
        if known is not None and known.bundles is bundles and now.timestamp() < known.not_after:
            return known.evidence
        svid = verify_x509_svid(chain, bundles, now=now)
        evidence = PeerEvidence.from_svid(svid)
        self._chains[chain[0]] = _Peer(evidence, svid.expires_at.timestamp(), bundles)
        if len(self._chains) > PEERS_REMEMBERED:
            self._chains.popitem(last=False)
        return evidence
