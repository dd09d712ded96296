"""``spire.api.server.debug.v1.Debug``: what the server says of itself, for whoever is on the admin socket."""

from collections.abc import Callable
from typing import Final

from cryptography import x509

from broker._proto.service import Context, ServiceBinding
from broker._proto.spire.api.server.debug.v1 import debug_pb2
from broker._proto.spire.api.types import spiffeid_pb2
from broker.clock import Clock
from broker.errors import Invalid
from broker.server.api.access import Caller
from broker.server.api.grpc.convert import spiffe_id_message
from broker.server.identity.directory import Directory
from broker.spiffe import BundleSet, SpiffeId, verify_x509_svid
from broker.transport.tls import TlsIdentity

BINDING: Final = ServiceBinding.of(debug_pb2.DESCRIPTOR, "Debug")


class Debug:
    """The service; every answer comes from memory."""

    def __init__(
        self,
        directory: Directory,
        clock: Clock,
        *,
        identity: Callable[[], TlsIdentity],
        bundles: Callable[[], BundleSet],
        count_bundles: Callable[[], int],
    ) -> None:
        """``identity``: what the TLS port shows now; ``bundles``: with the own one; ``count_bundles``: of all that are kept."""
        self._directory = directory
        self._clock = clock
        self._identity = identity
        self._bundles = bundles
        self._count_bundles = count_bundles
        self._began = clock.monotonic()

    async def GetInfo(  # noqa: N802  # the name on the wire
        self, request: debug_pb2.GetInfoRequest, context: Context, caller: Caller
    ) -> debug_pb2.GetInfoResponse:
        """Tell the server's own certificates, its age, and how much it holds."""
        svid = verify_x509_svid(self._identity().chain_der, self._bundles(), now=self._clock.now())
        return debug_pb2.GetInfoResponse(
            svid_chain=[_certificate(one) for one in (*svid.chain, svid.authority)],
            uptime=int(self._clock.monotonic() - self._began),
            agents_count=self._directory.node_count,
            entries_count=len(self._directory),
            federated_bundles_count=self._count_bundles(),
        )


def _certificate(certificate: x509.Certificate) -> debug_pb2.GetInfoResponse.Cert:
    return debug_pb2.GetInfoResponse.Cert(
        id=_id(certificate),
        expires_at=int(certificate.not_valid_after_utc.timestamp()),
        subject=certificate.subject.rfc4514_string(),
    )


def _id(certificate: x509.Certificate) -> spiffeid_pb2.SPIFFEID | None:
    """Give the SPIFFE ID in a certificate; an authority may have none."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names.get_values_for_type(x509.UniformResourceIdentifier)
        return spiffe_id_message(SpiffeId(uri))
    except (x509.ExtensionNotFound, ValueError, Invalid):
        return None
