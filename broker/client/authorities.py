"""The key room, for an operator (``broker.server.v1.Authorities``, and SPIRE's service for who stands above)."""

from collections.abc import Sequence

import grpc.aio

from broker._proto.broker.server.v1 import authorities_pb2 as pb
from broker._proto.service import ServiceBinding
from broker._proto.spire.api.server.localauthority.v1 import localauthority_pb2 as spire
from broker.client.calls import DEADLINE_SECONDS, Caller

_AUTHORITIES = ServiceBinding.of(pb.DESCRIPTOR, "Authorities")
_LOCAL = ServiceBinding.of(spire.DESCRIPTOR, "LocalAuthority")
_KINDS = {"x509": pb.AUTHORITY_KIND_X509, "jwt": pb.AUTHORITY_KIND_JWT, "task": pb.AUTHORITY_KIND_TASK}


class Authorities:
    """What an operator does in the key room. Kinds are ``x509``, ``jwt``, ``task``; a failed call raises as its server meant."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout: float = DEADLINE_SECONDS) -> None:
        """Call over ``channel``; ``timeout`` is in seconds, for each call."""
        self._authorities = Caller(channel, _AUTHORITIES, timeout=timeout)
        self._local = Caller(channel, _LOCAL, timeout=timeout)

    async def list(self, kind: str) -> Sequence[pb.Authority]:
        """Give the authorities of all replicas, oldest first."""
        request = pb.ListAuthoritiesRequest(kind=_KINDS[kind])
        found: pb.ListAuthoritiesResponse = await self._authorities.call("ListAuthorities", request)
        return found.authorities

    async def prepare(self, kind: str) -> pb.Authority:
        """Make and publish a successor."""
        request = pb.PrepareAuthorityRequest(kind=_KINDS[kind])
        made: pb.PrepareAuthorityResponse = await self._authorities.call("PrepareAuthority", request)
        return made.authority

    async def activate(self, kind: str, authority_id: str) -> pb.Authority:
        """Let the prepared one take over."""
        request = pb.ActivateAuthorityRequest(kind=_KINDS[kind], id=authority_id)
        now: pb.ActivateAuthorityResponse = await self._authorities.call("ActivateAuthority", request)
        return now.authority

    async def taint(self, kind: str, authority_id: str) -> pb.Authority:
        """Have everything an old one signed replaced."""
        request = pb.TaintAuthorityRequest(kind=_KINDS[kind], id=authority_id)
        now: pb.TaintAuthorityResponse = await self._authorities.call("TaintAuthority", request)
        return now.authority

    async def revoke(self, kind: str, authority_id: str) -> pb.Authority:
        """Take a tainted one out of the bundle."""
        request = pb.RevokeAuthorityRequest(kind=_KINDS[kind], id=authority_id)
        gone: pb.RevokeAuthorityResponse = await self._authorities.call("RevokeAuthority", request)
        return gone.authority

    async def taint_upstream(self, key_id: str) -> str:
        """Taint a root above the server, by its key identifier in hex."""
        request = spire.TaintX509UpstreamAuthorityRequest(subject_key_id=key_id)
        now: spire.TaintX509UpstreamAuthorityResponse = await self._local.call("TaintX509UpstreamAuthority", request)
        return now.upstream_authority_subject_key_id

    async def revoke_upstream(self, key_id: str) -> str:
        """Take a tainted root above the server out of its bundle."""
        request = spire.RevokeX509UpstreamAuthorityRequest(subject_key_id=key_id)
        gone: spire.RevokeX509UpstreamAuthorityResponse = await self._local.call("RevokeX509UpstreamAuthority", request)
        return gone.upstream_authority_subject_key_id
