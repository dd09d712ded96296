"""How a node proves itself to the server, and how what comes back is judged: one attestation, without a memory of it."""

import asyncio
from datetime import datetime
from typing import Final

import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from broker._proto.spire.api.server.agent.v1 import agent_pb2
from broker._proto.spire.api.server.bundle.v1 import bundle_pb2
from broker._proto.spire.api.types import attestation_pb2
from broker.agent import wire
from broker.agent.upstream import RPC_TIMEOUT, Upstream, answered
from broker.attestation.contract import AttestorFailed, AttestorUnavailable, Evidence, NodeAgentAttestor
from broker.errors import InvalidSvid, Misconfigured, NotAttested, Refused, Unavailable
from broker.spiffe import Bundle, BundleSet, TrustDomain, X509Svid, verify_x509_svid
from broker.transport.rpc_errors import from_rpc_error

AGENT_PATH: Final = "/spire/agent"


async def prove(
    upstream: Upstream, attestor: NodeAgentAttestor, key: ec.EllipticCurvePrivateKey
) -> tuple[str, agent_pb2.AttestAgentResponse.Result]:
    """Attest with fresh evidence; give its type and what the server answers. Raises BrokerError."""
    evidence = await _evidence(attestor)
    params = agent_pb2.AttestAgentRequest.Params(
        data=attestation_pb2.AttestationData(type=evidence.type, payload=evidence.payload),
        params=agent_pb2.AgentX509SVIDParams(csr=csr(key)),
    )
    try:
        async with asyncio.timeout(RPC_TIMEOUT):
            return evidence.type, await _converse(upstream, attestor, params)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
    except TimeoutError:
        raise Unavailable("the server did not answer the attestation in time") from None


async def _evidence(attestor: NodeAgentAttestor) -> Evidence:
    try:
        return await attestor.evidence()
    except AttestorUnavailable:
        raise
    except AttestorFailed as error:
        # It is this node's own: a token, a file or a device that is not there or cannot be read.
        hint = error.hint or f"see [agent.attestors.node.{attestor.name}]"
        raise Misconfigured(error.message, code=error.reason, hint=hint) from error


async def _converse(
    upstream: Upstream, attestor: NodeAgentAttestor, params: agent_pb2.AttestAgentRequest.Params
) -> agent_pb2.AttestAgentResponse.Result:
    call = upstream.agent.AttestAgent(timeout=RPC_TIMEOUT)
    try:
        await call.write(agent_pb2.AttestAgentRequest(params=params))
        while True:
            response = await call.read()
            if response is grpc.aio.EOF:
                raise NotAttested("the server ended the attestation without a result")
            if response.WhichOneof("step") == "result":
                result: agent_pb2.AttestAgentResponse.Result = response.result
                return result
            answer = await attestor.respond(response.challenge)
            await call.write(agent_pb2.AttestAgentRequest(challenge_response=answer))
    finally:
        call.cancel()


async def fetch_bundle(upstream: Upstream, trust_domain: TrustDomain) -> Bundle:
    """Ask for the bundle over a connection that was trusted without one; raises Refused, Unavailable."""
    told = wire.bundle(
        await answered(upstream.bundle.GetBundle(bundle_pb2.GetBundleRequest(), timeout=RPC_TIMEOUT))
    ).bundle
    if told.trust_domain != trust_domain or not told.x509_authorities:
        raise Refused("the server is of another trust domain", code="wrong_trust_domain", hint="check trust_domain")
    return told


def csr(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Ask for a certificate of this key, and for nothing else: the rest is the server's to say (DER)."""
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return request.public_bytes(Encoding.DER)


def judged(chain: tuple[bytes, ...], key: object, bundles: BundleSet, now: datetime) -> X509Svid:
    """Verify an SVID of an agent and that the key is its own; raises InvalidSvid."""
    svid = verify_x509_svid(chain, bundles, now=now)
    if not svid.id.path.startswith(f"{AGENT_PATH}/"):
        raise InvalidSvid("it is not the identity of an agent", code="svid_wrong_id")
    ours = key.public_key() if isinstance(key, ec.EllipticCurvePrivateKey) else None
    theirs = svid.leaf.public_key()
    if ours is None or not isinstance(theirs, ec.EllipticCurvePublicKey) or _spki(ours) != _spki(theirs):
        raise InvalidSvid("it is the identity of another key", code="svid_wrong_key")
    return svid


def _spki(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
