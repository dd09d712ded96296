"""``broker.server.v1.Revocations``: X.509-SVIDs are taken back."""

from typing import Final

from broker._proto.broker.server.v1 import revocations_pb2
from broker._proto.service import Context, ServiceBinding
from broker.server.api.access import Caller, name_of
from broker.server.api.grpc.convert import seconds
from broker.server.identity.revocation import Revocation, Target
from broker.server.store.revocation_rows import RevokedSvid

BINDING: Final = ServiceBinding.of(revocations_pb2.DESCRIPTOR, "Revocations")
MAX_SHOWN: Final = 1_000
"""SVIDs named in one answer: some 200 KiB."""


class Revocations:
    """The service, over its use cases."""

    def __init__(self, revocation: Revocation) -> None:
        self._revocation = revocation

    async def RevokeSvids(  # noqa: N802  # the name on the wire
        self, request: revocations_pb2.RevokeSvidsRequest, context: Context, caller: Caller
    ) -> revocations_pb2.RevokeSvidsResponse:
        """Revoke by serial number, session, entry or SPIFFE ID."""
        target = Target(
            serial=request.serial.serial_number,
            authority=request.serial.authority,
            session=request.session_id,
            entry_id=request.entry_id,
            spiffe_id=request.spiffe_id,
        )
        done = await self._revocation.revoke(target, request.reason, name_of(caller))
        return revocations_pb2.RevokeSvidsResponse(
            svids=map(_message, done.svids[:MAX_SHOWN]),
            revoked=len(done.svids),
            already_revoked=done.before,
            sessions_ended=done.sessions[:MAX_SHOWN],
            tasks_ended=done.tasks,
        )


def _message(row: RevokedSvid) -> revocations_pb2.RevokedSvid:
    return revocations_pb2.RevokedSvid(
        serial_number=row.serial,
        authority_id=row.authority,
        spiffe_id=row.spiffe_id,
        entry_id=row.entry_id,
        expires_at=seconds(row.not_after),
    )
