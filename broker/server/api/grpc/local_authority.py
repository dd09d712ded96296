"""``spire.api.server.localauthority.v1.LocalAuthority``: SPIRE's tools rotate our authorities by hand."""

from typing import Final

from broker._proto.service import Context, ServiceBinding
from broker._proto.spire.api.server.localauthority.v1 import localauthority_pb2 as pb
from broker.server.api.access import Caller, name_of
from broker.server.api.grpc.convert import seconds
from broker.server.authority.forced import Forced
from broker.server.store.rows import AuthorityKind, AuthorityRow

BINDING: Final = ServiceBinding.of(pb.DESCRIPTOR, "LocalAuthority")
_X509, _JWT = AuthorityKind.X509, AuthorityKind.JWT


class LocalAuthority:
    """The service, over its use cases; the methods of WIT-SVIDs are not here and answer Unimplemented."""

    def __init__(self, forced: Forced) -> None:
        self._forced = forced

    async def GetJWTAuthorityState(  # noqa: N802  # the name on the wire
        self, request: pb.GetJWTAuthorityStateRequest, context: Context, caller: Caller
    ) -> pb.GetJWTAuthorityStateResponse:
        """Show this replica's JWT authorities."""
        states = self._forced.states(_JWT)
        return pb.GetJWTAuthorityStateResponse(
            active=_state(states.active), prepared=_maybe(states.prepared), old=_maybe(states.old)
        )

    async def PrepareJWTAuthority(  # noqa: N802
        self, request: pb.PrepareJWTAuthorityRequest, context: Context, caller: Caller
    ) -> pb.PrepareJWTAuthorityResponse:
        """Make and publish a successor."""
        row = await self._forced.prepare(_JWT, name_of(caller))
        return pb.PrepareJWTAuthorityResponse(prepared_authority=_state(row))

    async def ActivateJWTAuthority(  # noqa: N802
        self, request: pb.ActivateJWTAuthorityRequest, context: Context, caller: Caller
    ) -> pb.ActivateJWTAuthorityResponse:
        """Let the prepared one take over."""
        row = await self._forced.activate(_JWT, request.authority_id, name_of(caller))
        return pb.ActivateJWTAuthorityResponse(activated_authority=_state(row))

    async def TaintJWTAuthority(  # noqa: N802
        self, request: pb.TaintJWTAuthorityRequest, context: Context, caller: Caller
    ) -> pb.TaintJWTAuthorityResponse:
        """Have everything an old one signed replaced."""
        row = await self._forced.taint(_JWT, request.authority_id, name_of(caller))
        return pb.TaintJWTAuthorityResponse(tainted_authority=pb.AuthorityState(authority_id=row.id))

    async def RevokeJWTAuthority(  # noqa: N802
        self, request: pb.RevokeJWTAuthorityRequest, context: Context, caller: Caller
    ) -> pb.RevokeJWTAuthorityResponse:
        """Take a tainted one out of the bundle."""
        row = await self._forced.revoke(_JWT, request.authority_id, name_of(caller))
        return pb.RevokeJWTAuthorityResponse(revoked_authority=pb.AuthorityState(authority_id=row.id))

    async def GetX509AuthorityState(  # noqa: N802
        self, request: pb.GetX509AuthorityStateRequest, context: Context, caller: Caller
    ) -> pb.GetX509AuthorityStateResponse:
        """Show this replica's X.509 authorities."""
        states = self._forced.states(_X509)
        return pb.GetX509AuthorityStateResponse(
            active=_state(states.active), prepared=_maybe(states.prepared), old=_maybe(states.old)
        )

    async def PrepareX509Authority(  # noqa: N802
        self, request: pb.PrepareX509AuthorityRequest, context: Context, caller: Caller
    ) -> pb.PrepareX509AuthorityResponse:
        """Make and publish a successor."""
        row = await self._forced.prepare(_X509, name_of(caller))
        return pb.PrepareX509AuthorityResponse(prepared_authority=_state(row))

    async def ActivateX509Authority(  # noqa: N802
        self, request: pb.ActivateX509AuthorityRequest, context: Context, caller: Caller
    ) -> pb.ActivateX509AuthorityResponse:
        """Let the prepared one take over."""
        row = await self._forced.activate(_X509, request.authority_id, name_of(caller))
        return pb.ActivateX509AuthorityResponse(activated_authority=_state(row))

    async def TaintX509Authority(  # noqa: N802
        self, request: pb.TaintX509AuthorityRequest, context: Context, caller: Caller
    ) -> pb.TaintX509AuthorityResponse:
        """Have everything an old one signed replaced."""
        row = await self._forced.taint(_X509, request.authority_id, name_of(caller))
        return pb.TaintX509AuthorityResponse(tainted_authority=_state(row))

    async def TaintX509UpstreamAuthority(  # noqa: N802
        self, request: pb.TaintX509UpstreamAuthorityRequest, context: Context, caller: Caller
    ) -> pb.TaintX509UpstreamAuthorityResponse:
        """Have everything below a root above us replaced."""
        key_id = await self._forced.taint_upstream(request.subject_key_id, name_of(caller))
        return pb.TaintX509UpstreamAuthorityResponse(upstream_authority_subject_key_id=key_id)

    async def RevokeX509Authority(  # noqa: N802
        self, request: pb.RevokeX509AuthorityRequest, context: Context, caller: Caller
    ) -> pb.RevokeX509AuthorityResponse:
        """Take a tainted one out of the bundle."""
        row = await self._forced.revoke(_X509, request.authority_id, name_of(caller))
        return pb.RevokeX509AuthorityResponse(revoked_authority=pb.AuthorityState(authority_id=row.id))

    async def RevokeX509UpstreamAuthority(  # noqa: N802
        self, request: pb.RevokeX509UpstreamAuthorityRequest, context: Context, caller: Caller
    ) -> pb.RevokeX509UpstreamAuthorityResponse:
        """Take a tainted root above us out of the bundle."""
        key_id = await self._forced.revoke_upstream(request.subject_key_id, name_of(caller))
        return pb.RevokeX509UpstreamAuthorityResponse(upstream_authority_subject_key_id=key_id)


def _state(row: AuthorityRow) -> pb.AuthorityState:
    return pb.AuthorityState(
        authority_id=row.id, expires_at=seconds(row.not_after), upstream_authority_subject_key_id=row.upstream
    )


def _maybe(row: AuthorityRow | None) -> pb.AuthorityState | None:
    return None if row is None else _state(row)
