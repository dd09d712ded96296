"""``spire.agent.debug.v1.Debug``: the agent about itself, for its operator."""

from broker._proto.service import Context
from broker._proto.spire.api.agent.debug.v1 import debug_pb2
from broker._proto.spire.api.types import spiffeid_pb2
from broker.agent.bootstrap import NodeIdentity
from broker.agent.offline import Offline
from broker.agent.sessions import Sessions
from broker.agent.svids import SvidKeeper
from broker.agent.workloads import AdminCaller
from broker.clock import Clock


class DebugApi:
    """The method of ``Debug``."""

    def __init__(
        self, node: NodeIdentity, offline: Offline, sessions: Sessions, svids: SvidKeeper, clock: Clock
    ) -> None:
        self._node = node
        self._offline = offline
        self._sessions = sessions
        self._svids = svids
        self._clock = clock
        self._began = clock.monotonic()

    async def GetInfo(  # noqa: N802 - the RPC's name
        self, request: debug_pb2.GetInfoRequest, context: Context, caller: AdminCaller
    ) -> debug_pb2.GetInfoResponse:
        """Give the agent's own chain, its age, how much it holds, and when the server was heard."""
        held = [one.x509 for session in self._sessions for one in session.identities.values()]
        x509 = sum(one is not None and not one.shared for one in held) + len(self._svids.spares)
        heard = self._offline.heard_at
        response = debug_pb2.GetInfoResponse(
            uptime=int(self._clock.monotonic() - self._began),
            svids_count=x509,
            last_sync_success=int(heard.timestamp()) if heard is not None else 0,
            cached_x509_svids_count=x509,
            cached_jwt_svids_count=sum(len(session.jwts) for session in self._sessions),
        )
        svid = self._node.svid
        for number, one in enumerate(svid.chain if svid is not None else ()):
            added = response.svid_chain.add(
                expires_at=int(one.not_valid_after_utc.timestamp()), subject=one.subject.rfc4514_string()
            )
            if number == 0 and svid is not None:
                added.id.CopyFrom(spiffeid_pb2.SPIFFEID(trust_domain=str(svid.id.trust_domain), path=svid.id.path))
        return response
