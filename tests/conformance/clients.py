"""One Workload API, three clients: calls by hand (gRPC), this product's SDK, and an independent library (PyPI ``spiffe``).

Each gives the same things in the same form, so that one test runs with all of them. Run as a module, by another program, it
prints as JSON what each is refused.
"""

import asyncio
import json
import sys
import warnings
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, load_der_private_key
from google.protobuf.json_format import MessageToDict

from broker._proto.service import Stub
from broker._proto.spiffe import workload_pb2
from broker.agent.listener import WORKLOAD
from broker.errors import BrokerError
from broker.sdk import Workload
from broker.spiffe import Bundle
from broker.spiffe.x509svid import split_der

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its generated messages are older than the installed protobuf
    import spiffe
    from spiffe.errors import PySpiffeError

T = TypeVar("T")
SECONDS = 30.0
HEADER = (("workload.spiffe.io", "true"),)


class Refused(Exception):
    """The call was refused, by the client or by the agent."""


class Client(Protocol):
    """What a workload wants of its client. Every method raises Refused."""

    def svids(self) -> list[tuple[str, bytes]]:
        """SPIFFE IDs and leaves (DER) in the agent's order; each key fits its leaf."""

    def authorities(self) -> Mapping[str, frozenset[bytes]]:
        """X.509 authorities (DER) by name of trust domain."""

    def jwt(self, audience: str, spiffe_id: str = "") -> tuple[str, str]:
        """A JWT-SVID: its SPIFFE ID and its text."""

    def validate(self, token: str, audience: str) -> tuple[str, Mapping[str, Any]]:
        """The subject and the claims of a good token."""

    def close(self) -> None: ...


class ByHand:
    """The standard's messages, by method path."""

    def __init__(self, socket: str) -> None:
        self._channel = grpc.insecure_channel(f"unix:{socket}", options=(("grpc.use_local_subchannel_pool", 1),))
        self._stub = Stub(self._channel, WORKLOAD)

    def close(self) -> None:
        self._channel.close()

    def _first(self, method: str, request: Any) -> Any:
        try:
            call = getattr(self._stub, method)(request, metadata=HEADER, timeout=SECONDS)
            if not WORKLOAD.methods[method].streams_out:
                return call
            with suppress(grpc.RpcError):
                return next(call)
            raise Refused(f"{call.code().name}: {call.details()}")
        except grpc.RpcError as error:
            raise Refused(f"{error.code().name}: {error.details()}") from error

    def svids(self) -> list[tuple[str, bytes]]:
        told = []
        for one in self._first("FetchX509SVID", workload_pb2.X509SVIDRequest()).svids:
            leaf = split_der(one.x509_svid)[0]
            key = load_der_private_key(one.x509_svid_key, None)
            assert key.public_key() == x509.load_der_x509_certificate(leaf).public_key()
            told.append((one.spiffe_id, leaf))
        return told

    def authorities(self) -> Mapping[str, frozenset[bytes]]:
        told = self._first("FetchX509Bundles", workload_pb2.X509BundlesRequest()).bundles
        return {name.removeprefix("spiffe://"): frozenset(split_der(der)) for name, der in told.items()}

    def jwt(self, audience: str, spiffe_id: str = "") -> tuple[str, str]:
        request = workload_pb2.JWTSVIDRequest(audience=[audience], spiffe_id=spiffe_id)
        first = self._first("FetchJWTSVID", request).svids[0]
        return first.spiffe_id, first.svid

    def validate(self, token: str, audience: str) -> tuple[str, Mapping[str, Any]]:
        answer = self._first("ValidateJWTSVID", workload_pb2.ValidateJWTSVIDRequest(audience=audience, svid=token))
        return answer.spiffe_id, MessageToDict(answer.claims)


class Ours:
    """This product's SDK, which follows its streams all the time."""

    def __init__(self, socket: str) -> None:
        self._runner = asyncio.Runner()
        self._me = Workload.connect(f"unix://{socket}")
        self._runner.run(self._me.__aenter__())

    def close(self) -> None:
        self._runner.run(self._me.__aexit__(None, None, None))
        self._runner.close()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        try:
            return self._runner.run(coroutine)
        except BrokerError as error:
            raise Refused(error.reason) from error

    def svids(self) -> list[tuple[str, bytes]]:
        self._run(self._me.identity())
        for one in self._me._identities:
            assert one.tls.key.public_key() == x509.load_der_x509_certificate(one.tls.chain_der[0]).public_key()
        return [(str(one.id), one.tls.chain_der[0]) for one in self._me._identities]

    def authorities(self) -> Mapping[str, frozenset[bytes]]:
        self._run(self._me.identity())
        return {name.name: _der(bundle) for name, bundle in self._me.bundles.items()}

    def jwt(self, audience: str, spiffe_id: str = "") -> tuple[str, str]:
        told = self._run(self._me.jwt_svid(audience, spiffe_id=spiffe_id))
        return str(told.id), told.token

    def validate(self, token: str, audience: str) -> tuple[str, Mapping[str, Any]]:
        subject, claims = self._run(self._me.validate_jwt_svid(token, audience=audience))
        return str(subject), claims


def _der(bundle: Bundle) -> frozenset[bytes]:
    return frozenset(one.public_bytes(Encoding.DER) for one in bundle.x509_authorities)


class Theirs:
    """The independent library."""

    def __init__(self, socket: str) -> None:
        self._client = spiffe.WorkloadApiClient(f"unix://{socket}", default_timeout=SECONDS)

    def close(self) -> None:
        self._client.close()

    @staticmethod
    def _run(call: Callable[[], T]) -> T:
        try:
            return call()
        except PySpiffeError as error:
            raise Refused(str(error)) from error

    def svids(self) -> list[tuple[str, bytes]]:
        told = self._run(self._client.fetch_x509_svids)
        assert all(one.private_key.public_key() == one.leaf.public_key() for one in told)
        return [(str(one.spiffe_id), one.leaf.public_bytes(Encoding.DER)) for one in told]

    def authorities(self) -> Mapping[str, frozenset[bytes]]:
        told = self._run(self._client.fetch_x509_bundles).bundles
        return {
            str(one.trust_domain).removeprefix("spiffe://"): frozenset(
                root.public_bytes(Encoding.DER) for root in one.x509_authorities
            )
            for one in told
        }

    def jwt(self, audience: str, spiffe_id: str = "") -> tuple[str, str]:
        subject = spiffe.SpiffeId(spiffe_id) if spiffe_id else None
        told = self._run(lambda: self._client.fetch_jwt_svid({audience}, subject))
        return str(told.spiffe_id), told.token

    def validate(self, token: str, audience: str) -> tuple[str, Mapping[str, Any]]:
        told = self._run(lambda: self._client.validate_jwt_svid(token, audience))
        return str(told.spiffe_id), told._claims


CLIENTS: Mapping[str, Callable[[str], Client]] = {"gRPC": ByHand, "SDK": Ours, "py-spiffe": Theirs}


def main(socket: str) -> None:
    """Ask everything with each client; print what each was refused, empty where it was served."""
    told: dict[str, dict[str, str]] = {}
    for name, make in CLIENTS.items():
        client = make(socket)
        for asked in (client.svids, client.authorities, lambda one=client: one.jwt("tests")):
            words = ""
            try:
                asked()
            except Refused as refused:
                words = str(refused)
            told.setdefault(name, {})[getattr(asked, "__name__", "jwt")] = words
        client.close()
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1])
