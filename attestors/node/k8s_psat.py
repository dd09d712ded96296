"""Node attestation by a projected Kubernetes service account token, both halves; SPIRE's ``k8s_psat`` on the wire.

The agent sends the token that the kubelet projects into its pod. The server has the cluster's API server review it for
the server's own audience, and then asks which pod and which node it was made for: the agent is named after the node's
uid. Whether to believe the API server is TLS's business; the API server's word is all that counts here. A fault on that
side is ``Unavailable``, so that agents ask again; a token that does not prove it is ``NotAttested``.
"""

import asyncio
import base64
import http.client
import io
import json
import os
import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from broker.attestation.contract import AttestedNode, AttestorFailed, ChallengeWith, Evidence
from broker.attestation.reads import BlockingReads
from broker.attestation.runtime_socket import Deadline
from broker.clock import SystemClock
from broker.errors import Invalid, NotAttested, Unavailable
from broker.spiffe import Selector
from broker.spiffe.strictjson import loads

NAME = "k8s_psat"
VERIFY_TIMEOUT = 10.0  # seconds for the three questions; the server gives an attestation thirty
MAX_PAYLOAD = 1 << 15  # bytes; a token has some 1.2 KiB
MAX_ANSWER = 4 << 20  # bytes; a node that lists its images has some 50 KiB, and etcd keeps no object above 1.5 MiB
MAX_HEAD = 1 << 16  # bytes beside the body
MAX_DEPTH = 64  # of the JSON: managedFields nest as deep as the fields that they speak of, twice
MAX_FILE = 1 << 20  # bytes of a token, a certificate or a kubeconfig
_SEGMENT = r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$"  # of a SPIFFE ID's path, and not "." or ".."
_ACCOUNT = r"^[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?:[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?$"
_LABEL_KEY = "^[A-Za-z0-9][A-Za-z0-9._/-]{0,316}$"
_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,8192}\.[A-Za-z0-9_-]{1,16384}\.[A-Za-z0-9_-]{1,2048}")  # a JWS (RFC 7515 §7.1)
_BEARER = re.compile(rb"[\x21-\x7e]+")
_USER = re.compile(r"system:serviceaccount:([a-z0-9-]{1,63}):([a-z0-9.-]{1,253})")
_OBJECT = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?")  # a DNS subdomain: it becomes part of a path
_UID = re.compile("[0-9A-Za-z][0-9A-Za-z-]{0,63}")
_HOST = re.compile(r"[A-Za-z0-9.:_-]{1,253}")
_EXTRA = "authentication.kubernetes.io/"
M = TypeVar("M", bound=BaseModel)
LabelKey = Annotated[str, StringConstraints(pattern=_LABEL_KEY)]


class PsatSettings(BaseModel):
    """Which cluster this is, by the name that the server knows it by, and where the token lies."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cluster: str = Field(pattern=_SEGMENT, description="The cluster's name in the server's settings.")
    token_path: Path = Field(
        default=Path("/var/run/secrets/tokens/spire-agent"), description="The projected token, read at each attempt."
    )


class PsatClusterSettings(BaseModel):
    """Who may attest from one cluster, and how its API server is asked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    service_account_allow_list: tuple[Annotated[str, StringConstraints(pattern=_ACCOUNT)], ...] = Field(
        min_length=1, description="Service accounts of agents, as namespace:name."
    )
    audience: tuple[Annotated[str, StringConstraints(min_length=1)], ...] = Field(
        default=("spire-server",), min_length=1, description="Audiences, one of which the token must be for."
    )
    kube_config_file: Path | None = Field(
        default=None, description="A kubeconfig in JSON; unset: the server's own pod."
    )
    allowed_node_label_keys: frozenset[LabelKey] = Field(default=frozenset(), description="Labels for selectors.")
    allowed_pod_label_keys: frozenset[LabelKey] = Field(default=frozenset(), description="Labels for selectors.")
    use_pod_uid_for_agent_id: bool = Field(default=False, description="Name the agent after its pod, not its node.")


class PsatServerSettings(BaseModel):
    """The clusters, by name. Nodes of others are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    clusters: dict[Annotated[str, StringConstraints(pattern=_SEGMENT)], PsatClusterSettings] = Field(
        min_length=1, description="One table per cluster."
    )


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What Kubernetes gives the server's own pod: its environment, and its service account's directory."""

    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    service_account: Path = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class PsatAgent:
    """The agent's half: hands over the token, which the kubelet renews."""

    name: ClassVar[str] = NAME
    settings: ClassVar[type[BaseModel]] = PsatSettings

    def __init__(self, settings: PsatSettings) -> None:
        self._settings = settings

    async def evidence(self) -> Evidence:
        """Give the cluster's name and the token; raises ``AttestorFailed`` when there is none."""
        hint = "project a serviceAccountToken with the server's audience to token_path"
        try:
            token = (await asyncio.to_thread(_file, self._settings.token_path)).decode("ascii").strip()
        except OSError as error:
            raise AttestorFailed(
                f"the service account token cannot be read: {error.strerror}", code="token_unreadable", hint=hint
            ) from None
        except ValueError:
            token = ""
        if _TOKEN.fullmatch(token) is None:
            raise AttestorFailed("the service account token is not one", code="token_unreadable", hint=hint)
        return Evidence(NAME, json.dumps({"cluster": self._settings.cluster, "token": token}).encode())

    async def respond(self, challenge: bytes) -> bytes:
        """Refuse: this attestor has no challenge."""
        raise AttestorFailed("the server challenged a service account token, which has no answer")


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class _Claim(_Model):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    cluster: str
    token: str


class _User(_Model):
    username: str = ""
    extra: dict[str, list[str]] | None = None


class _Status(_Model):
    authenticated: bool = False
    user: _User = _User()
    audiences: list[str] | None = None
    error: str = ""


class _Review(_Model):
    kind: Literal["TokenReview"]
    status: _Status


class _Metadata(_Model):
    name: str
    namespace: str = ""
    uid: str
    labels: dict[str, str] | None = None


class _PodSpec(_Model):
    node_name: str = Field(default="", alias="nodeName")
    service_account: str = Field(default="", alias="serviceAccountName")


class _PodStatus(_Model):
    host_ip: str = Field(default="", alias="hostIP")


class _Pod(_Model):
    kind: Literal["Pod"]
    metadata: _Metadata
    spec: _PodSpec
    status: _PodStatus = _PodStatus()


class _Node(_Model):
    kind: Literal["Node"]
    metadata: _Metadata


class PsatServer:
    """The server's half: has the token reviewed, and names the node after its uid. Nodes may attest again."""

    name: ClassVar[str] = NAME
    settings: ClassVar[type[BaseModel]] = PsatServerSettings

    def __init__(self, settings: PsatServerSettings, here: Surroundings | None = None) -> None:
        self._clusters = settings.clusters
        # By cluster, where the contract speaks of users: one that hangs holds up only its own nodes.
        self._number = {name: number for number, name in enumerate(settings.clusters)}
        self._here = here or Surroundings()
        self._reads = BlockingReads()

    async def verify(self, evidence: Evidence, challenge_with: ChallengeWith) -> AttestedNode:
        """Judge the token; raises ``NotAttested``, and ``Unavailable`` where the API server could not be asked."""
        try:
            claim = _Claim.model_validate(loads(evidence.payload, max_bytes=MAX_PAYLOAD))
        except (ValidationError, Invalid):
            raise NotAttested("the evidence is not a cluster and a token", code="evidence_malformed") from None
        cluster = self._clusters.get(claim.cluster)
        if cluster is None:
            raise NotAttested("this server does not know the cluster", code="cluster_unknown")
        if _TOKEN.fullmatch(claim.token) is None:
            raise _rejected()
        until = SystemClock().monotonic() + VERIFY_TIMEOUT

        def judge(abandoned: Any) -> AttestedNode:
            server = _access(cluster, self._here)
            return _judged(claim, cluster, server, Deadline(until, abandoned))

        try:
            async with asyncio.timeout(VERIFY_TIMEOUT):
                return await self._reads.run(self._number[claim.cluster], judge)
        except TimeoutError:
            raise Unavailable("the API server did not answer in time", code="api_server_timeout") from None


def _judged(claim: _Claim, cluster: PsatClusterSettings, server: "_Server", deadline: Deadline) -> AttestedNode:
    spec = {"token": claim.token, "audiences": list(cluster.audience)}
    question = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}
    status = server.ask(_Review, "/apis/authentication.k8s.io/v1/tokenreviews", deadline, question).status
    if not status.authenticated or status.error:
        raise _rejected()
    # NOTE(security): an API server that knows no audiences reviews the token for its own, and names none here.
    if not set(status.audiences or ()) & set(cluster.audience):
        raise NotAttested("the token is for another audience", code="token_audience")
    user = _USER.fullmatch(status.user.username)
    if user is None or f"{user[1]}:{user[2]}" not in cluster.service_account_allow_list:
        raise NotAttested(
            "the token is not an agent's", code="service_account_refused", hint="service_account_allow_list"
        )
    pod = _pod(status.user, user[1], user[2], server, deadline)
    node_name = pod.spec.node_name
    if _OBJECT.fullmatch(node_name) is None:
        raise NotAttested("the pod is on no node", code="node_unknown")
    node = server.ask(_Node, f"/api/v1/nodes/{node_name}", deadline).metadata
    # Newer API servers bind the token to its node as well.
    bound = (_extra(status.user, "node-name") or node_name, _extra(status.user, "node-uid") or node.uid)
    if node.name != node_name or _UID.fullmatch(node.uid) is None or bound != (node.name, node.uid):
        raise NotAttested("the token, its pod and the node do not agree", code="node_mismatch")
    by_pod = cluster.use_pod_uid_for_agent_id
    return AttestedNode(
        path=f"/{NAME}/{claim.cluster}/" + (f"pod/{pod.metadata.uid}" if by_pod else node.uid),
        selectors=frozenset(_selectors(claim.cluster, cluster, pod, node)),
        reattestable=True,
    )


def _pod(user: _User, namespace: str, account: str, server: "_Server", deadline: Deadline) -> _Pod:
    name, uid = _extra(user, "pod-name"), _extra(user, "pod-uid")
    if name is None or uid is None or _OBJECT.fullmatch(name) is None or _UID.fullmatch(uid) is None:
        raise NotAttested("the token is not bound to a pod", code="token_unbound", hint="send a projected token")
    pod = server.ask(_Pod, f"/api/v1/namespaces/{namespace}/pods/{name}", deadline)
    told = pod.metadata
    if (told.namespace, told.name, told.uid, pod.spec.service_account) != (namespace, name, uid, account):
        raise NotAttested("the token's pod is not the one of that name", code="pod_mismatch")
    return pod


def _extra(user: _User, name: str) -> str | None:
    """Give the one value that the review has of it; none or several are none."""
    values = (user.extra or {}).get(f"{_EXTRA}{name}", [])
    return values[0] if len(values) == 1 else None


def _selectors(name: str, cluster: PsatClusterSettings, pod: _Pod, node: _Metadata) -> Iterator[Selector]:
    facts = {
        "cluster": name,
        "agent_ns": pod.metadata.namespace,
        "agent_sa": pod.spec.service_account,
        "agent_pod_name": pod.metadata.name,
        "agent_pod_uid": pod.metadata.uid,
        "agent_node_ip": pod.status.host_ip,
        "agent_node_name": node.name,
        "agent_node_uid": node.uid,
    }
    for kind, value in facts.items():
        if value:
            yield from _one(f"{kind}:{value}")
    for kind, labels, allowed in (
        ("agent_node_label", node.labels, cluster.allowed_node_label_keys),
        ("agent_pod_label", pod.metadata.labels, cluster.allowed_pod_label_keys),
    ):
        for key, value in (labels or {}).items():
            if key in allowed:  # which hold no colon, so that no two labels are one text
                yield from _one(f"{kind}:{key}:{value}")


def _one(value: str) -> Iterator[Selector]:
    """A value that cannot be a selector's gives none."""
    with suppress(Invalid):
        yield Selector.of(NAME, value)


def _rejected() -> NotAttested:
    return NotAttested("the cluster does not accept the token", code="token_rejected")


@dataclass(frozen=True, slots=True, repr=False)
class _Server:
    """One cluster's API server: where it is, how it is known, and how we are."""

    host: str
    port: int
    name: str  # that its certificate must bear
    prefix: str
    context: ssl.SSLContext
    token: bytes | None

    def ask(self, model: type[M], path: str, deadline: Deadline, question: Mapping[str, object] | None = None) -> M:
        """Get a thing, or post a question; blocks. Raises ``NotAttested`` where there is no such thing, ``Unavailable``."""
        status, body = self._answer(self._request(path, question), deadline)
        if status == http.HTTPStatus.NOT_FOUND and question is None:
            raise NotAttested("the token's pod or its node is gone", code="pod_unknown")
        if status in {http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN}:
            hint = "the server's service account needs create on tokenreviews, and get on pods and nodes"
            raise _unavailable("denied", "does not let the server ask", hint)
        if status not in {http.HTTPStatus.OK, http.HTTPStatus.CREATED}:
            raise _unavailable("answer", f"answered {status}")
        try:
            return model.model_validate(loads(body, max_bytes=MAX_ANSWER, max_depth=MAX_DEPTH))
        except (ValidationError, Invalid):
            raise _unavailable("answer", "gave an answer that is not what it should be") from None

    def _request(self, path: str, question: Mapping[str, object] | None) -> bytes:
        body = b"" if question is None else json.dumps(question).encode()
        host = f"[{self.host}]" if ":" in self.host else self.host
        head = (
            f"{'GET' if question is None else 'POST'} {self.prefix}{path} HTTP/1.1\r\nHost: {host}:{self.port}\r\n"
            f"Accept: application/json\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n"
        ).encode("ascii")
        bearer = b"" if self.token is None else b"Authorization: Bearer " + self.token + b"\r\n"
        return head + bearer + b"\r\n" + body

    def _answer(self, request: bytes, deadline: Deadline) -> tuple[int, bytes]:
        try:
            with (
                socket.create_connection((self.host, self.port), deadline.left()) as plain,
                self.context.wrap_socket(plain, server_hostname=self.name) as secured,
            ):
                received = _Received(_exchange(secured, request, deadline))
            response = http.client.HTTPResponse(cast("socket.socket", received))
            response.begin()
            return response.status, response.read()  # IncompleteRead where it is cut short
        except TimeoutError:
            raise
        except ssl.SSLCertVerificationError:
            raise _unavailable("untrusted", "has a certificate that does not verify") from None
        except http.client.HTTPException:  # its text could hold a piece of the answer
            raise _unavailable("answer", "gave an answer that is too long, cut short or not HTTP") from None
        except OSError:
            raise _unavailable("unreachable", "cannot be asked") from None


class _Received(io.BytesIO):
    """A whole answer, as ``http.client`` wants to be given it."""

    def makefile(self, mode: str) -> io.BytesIO:
        return self


def _exchange(connection: socket.socket, request: bytes, deadline: Deadline) -> bytes:
    """Send, then read to the end, each read bounded by the deadline and all of them by a budget."""
    connection.settimeout(deadline.left())
    connection.sendall(request)
    answer = bytearray()
    while part := connection.recv(1 << 16):
        answer += part
        if len(answer) > MAX_ANSWER + MAX_HEAD:
            raise http.client.HTTPException("too long")
        connection.settimeout(deadline.left())
    return bytes(answer)


def _unavailable(kind: str, what: str, hint: str = "") -> Unavailable:
    return Unavailable(f"the API server {what}", code=f"api_server_{kind}", hint=hint)


class _File(BaseModel):
    """A part of a kubeconfig. What is not known here could change who is asked, or as whom: it is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    extensions: Any = None


class _ClusterOfFile(_File):
    server: str
    ca: Path | None = Field(default=None, alias="certificate-authority")
    ca_data: str = Field(default="", alias="certificate-authority-data")
    tls_server_name: str = Field(default="", alias="tls-server-name")
    skip: Literal[False] = Field(default=False, alias="insecure-skip-tls-verify")
    compression: Any = Field(default=None, alias="disable-compression")


class _UserOfFile(_File):
    token: str = ""
    token_file: Path | None = Field(default=None, alias="tokenFile")
    certificate: Path | None = Field(default=None, alias="client-certificate")
    certificate_data: str = Field(default="", alias="client-certificate-data")
    key: Path | None = Field(default=None, alias="client-key")
    key_data: str = Field(default="", alias="client-key-data")


def _access(cluster: PsatClusterSettings, here: Surroundings) -> _Server:
    """Read how the API server is reached, anew each time: tokens and authorities are renewed. Raises ``Unavailable``."""
    try:
        if cluster.kube_config_file is not None:
            return _from_file(cluster.kube_config_file)
        return _from_pod(here)
    except (OSError, ValueError, LookupError, TypeError, Invalid):  # not their texts: they may quote a secret
        raise _unavailable(
            "credentials",
            "cannot be found or its authorities and our token cannot be read",
            "run the server in a pod, or set kube_config_file: kubectl config view --raw --minify --flatten -o json",
        ) from None


def _from_pod(here: Surroundings) -> _Server:
    host, port = (here.environ.get(f"KUBERNETES_SERVICE_{name}", "") for name in ("HOST", "PORT"))
    if _HOST.fullmatch(host) is None or re.fullmatch("[0-9]{1,5}", port) is None:
        raise ValueError("not in a pod")
    context = _context(_file(here.service_account / "ca.crt"))
    return _Server(host, int(port), host, "", context, _bearer(_file(here.service_account / "token")))


def _from_file(path: Path) -> _Server:
    whole: Any = loads(_file(path))
    context = _entry(whole, "context", whole["current-context"])
    cluster = _ClusterOfFile.model_validate(_entry(whole, "cluster", context["cluster"]))
    user = _UserOfFile.model_validate(_entry(whole, "user", context["user"]))
    url = urlsplit(cluster.server)
    host = url.hostname or ""
    if url.scheme != "https" or _HOST.fullmatch(host) is None or url.query or url.fragment or url.username is not None:
        raise ValueError("not an https address")
    if re.fullmatch(r"(?:/[A-Za-z0-9._~-]+)*/?", url.path) is None:
        raise ValueError("not a path")
    below = path.parent
    tls = _context(
        _data(cluster.ca_data, cluster.ca, below),
        _data(user.certificate_data, user.certificate, below),
        _data(user.key_data, user.key, below),
    )
    token = _file(below / user.token_file) if user.token_file is not None else user.token.encode()
    name = cluster.tls_server_name or host
    return _Server(host, url.port or 443, name, url.path.rstrip("/"), tls, _bearer(token) if token else None)


def _entry(whole: Any, kind: str, name: str) -> Any:
    (found,) = (one[kind] for one in whole[f"{kind}s"] if one["name"] == name)
    return found


def _data(encoded: str, path: Path | None, below: Path) -> bytes:
    if encoded:
        return base64.b64decode(encoded, validate=True)
    return b"" if path is None else _file(below / path)


def _context(authorities: bytes, certificate: bytes = b"", key: bytes = b"") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if authorities:
        context.load_verify_locations(cadata=authorities.decode("ascii"))
    else:
        context.load_default_certs()  # as kubectl does, for API servers with a public certificate
    if certificate:
        # OpenSSL reads a key from a file only, and this one is in memory.
        with open(os.memfd_create("client", os.MFD_CLOEXEC), "wb") as memory:  # noqa: PTH123 - a descriptor
            memory.write(key + b"\n" + certificate)
            memory.flush()
            context.load_cert_chain(f"/proc/self/fd/{memory.fileno()}", password="")  # never asks a terminal
    return context


def _bearer(token: bytes) -> bytes:
    if _BEARER.fullmatch(token := token.strip()) is None:
        raise ValueError("not a token")
    return token


def _file(path: Path) -> bytes:
    with path.open("rb") as secret:
        content = secret.read(MAX_FILE + 1)
    if len(content) > MAX_FILE:
        raise ValueError("the file is too long")
    return content
