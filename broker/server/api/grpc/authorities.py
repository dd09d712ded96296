"""``broker.server.v1.Authorities``: the authorities of every kind for our own command line, task-token keys among them."""

from typing import Final

from broker._proto.broker.server.v1 import authorities_pb2 as pb
from broker._proto.service import Context, ServiceBinding
from broker.errors import Invalid
from broker.server.api.access import Caller, name_of
from broker.server.api.grpc.convert import seconds
from broker.server.authority.forced import Forced
from broker.server.store.rows import AuthorityKind, AuthorityRow, AuthorityState

BINDING: Final = ServiceBinding.of(pb.DESCRIPTOR, "Authorities")
_KINDS: Final = {
    pb.AUTHORITY_KIND_X509: AuthorityKind.X509,
    pb.AUTHORITY_KIND_JWT: AuthorityKind.JWT,
    pb.AUTHORITY_KIND_TASK: AuthorityKind.TASK,
}
_KIND_NUMBERS: Final = {kind: number for number, kind in _KINDS.items()}
_STATES: Final = {
    AuthorityState.PREPARED: pb.AUTHORITY_STATE_PREPARED,
    AuthorityState.ACTIVE: pb.AUTHORITY_STATE_ACTIVE,
    AuthorityState.OLD: pb.AUTHORITY_STATE_OLD,
}


class Authorities:
    """The service, over its use cases."""

    def __init__(self, forced: Forced, replica: str) -> None:
        self._forced = forced
        self._replica = replica

    async def ListAuthorities(  # noqa: N802  # the name on the wire
        self, request: pb.ListAuthoritiesRequest, context: Context, caller: Caller
    ) -> pb.ListAuthoritiesResponse:
        """List the authorities of all replicas."""
        rows = self._forced.all(_kind(request.kind))
        return pb.ListAuthoritiesResponse(authorities=[self._message(row) for row in rows])

    async def PrepareAuthority(  # noqa: N802
        self, request: pb.PrepareAuthorityRequest, context: Context, caller: Caller
    ) -> pb.PrepareAuthorityResponse:
        """Make and publish a successor."""
        row = await self._forced.prepare(_kind(request.kind), name_of(caller))
        return pb.PrepareAuthorityResponse(authority=self._message(row))

    async def ActivateAuthority(  # noqa: N802
        self, request: pb.ActivateAuthorityRequest, context: Context, caller: Caller
    ) -> pb.ActivateAuthorityResponse:
        """Let the prepared one take over."""
        row = await self._forced.activate(_kind(request.kind), request.id, name_of(caller))
        return pb.ActivateAuthorityResponse(authority=self._message(row))

    async def TaintAuthority(  # noqa: N802
        self, request: pb.TaintAuthorityRequest, context: Context, caller: Caller
    ) -> pb.TaintAuthorityResponse:
        """Have everything an old one signed replaced."""
        row = await self._forced.taint(_kind(request.kind), request.id, name_of(caller))
        return pb.TaintAuthorityResponse(authority=self._message(row))

    async def RevokeAuthority(  # noqa: N802
        self, request: pb.RevokeAuthorityRequest, context: Context, caller: Caller
    ) -> pb.RevokeAuthorityResponse:
        """Take a tainted one out of the bundle."""
        row = await self._forced.revoke(_kind(request.kind), request.id, name_of(caller))
        return pb.RevokeAuthorityResponse(authority=self._message(row))

    def _message(self, row: AuthorityRow) -> pb.Authority:
        return pb.Authority(
            kind=_KIND_NUMBERS[row.kind],
            id=row.id,
            state=_STATES[row.state],
            not_before=seconds(row.not_before),
            not_after=seconds(row.not_after),
            tainted=row.tainted,
            replica=row.replica,
            is_local=row.replica == self._replica,
            upstream=row.upstream,
        )


def _kind(number: int) -> AuthorityKind:
    found = {int(known): kind for known, kind in _KINDS.items()}.get(number)
    if found is None:
        raise Invalid("an authority is of kind x509, jwt or task", code="invalid_authority_kind")
    return found
