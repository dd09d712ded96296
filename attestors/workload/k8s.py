"""Describes a process by the Kubernetes pod and container that it is in, as this node's kubelet tells it.

Selectors are SPIRE's ``k8s:…``. Which container it is comes from ``broker.attestation.containers``, which trusts neither
names nor the caller; the kubelet must list that container's id as running, in the pod that the control group names. All
who ask at one time share one list of pods. A kubelet reports a container some moments after it has started: the caller
waits for that a little, then is refused with a code that says so. Tokens stand in no message.
"""

import asyncio
import http.client
import io
import logging
import os
import re
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, Self, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from broker.attestation.cgroups import Runtime
from broker.attestation.containers import THIS_NODE, Container, Node, locate, require_owned
from broker.attestation.contract import AttestorFailed, SelectorDoc, Strength
from broker.attestation.process import Process
from broker.attestation.reads import BlockingReads
from broker.attestation.runtime_socket import Deadline
from broker.clock import SystemClock
from broker.errors import Invalid, Misconfigured
from broker.spiffe import Selector
from broker.spiffe.strictjson import loads

NAME = "k8s"
ATTEST_TIMEOUT = 8.0  # seconds, waiting for the kubelet included; the agent gives all attestors ten
FETCH_TIMEOUT = 5.0  # seconds for one answer
LIST_AGE = 0.5  # seconds that a list of pods serves those who come later, a failure to get one too
MAX_ANSWER = 16 << 20  # bytes; 250 pods of some 30 KiB are half of it
MAX_HEAD = 1 << 16  # bytes beside the body
MAX_DEPTH = 64  # of the JSON: managedFields nest as deep as the fields that they speak of, twice
MAX_TOKEN = 1 << 16  # bytes; a service account's has some 1.2 KiB
MAX_WAITING = 32  # callers who wait for the kubelet to catch up: half of what the agent attests at once
MAX_WAITING_PER_CONTAINER = 4  # so that one container's processes do not hold all of these places
KUBELET_PORT = 10250
_TOKEN = re.compile(rb"[\x21-\x7e]+")
_HOST = re.compile(r"[A-Za-z0-9.:_-]{1,253}")
_NAMESPACE = re.compile("[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")  # a DNS label: it becomes part of a path
_LOG = logging.getLogger(__name__)
M = TypeVar("M", bound=BaseModel)


class K8sSettings(BaseModel):
    """How this node's kubelet is reached and what of its answers becomes a selector."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kubelet_secure_port: int | None = Field(default=None, ge=1, le=65535, description="HTTPS port; unset: 10250.")
    kubelet_read_only_port: int | None = Field(default=None, ge=1, le=65535, description="Plain port, on loopback.")
    kubelet_ca_path: Path | None = Field(default=None, description="PEM authorities; unset: the service account's.")
    skip_kubelet_verification: bool = Field(default=False, description="Believe whoever answers. For trials only.")
    token_path: Path | None = Field(default=None, description="Bearer token; unset: the service account's.")
    certificate_path: Path | None = Field(default=None, description="PEM client certificate, instead of a token.")
    private_key_path: Path | None = Field(default=None, description="Its PEM key.")
    use_anonymous_authentication: bool = Field(default=False, description="Send neither token nor certificate.")
    node_name: str = Field(default="", description="This node's name or address; over node_name_env.")
    node_name_env: str = Field(default="MY_NODE_NAME", min_length=1, description="The variable that holds it.")
    max_poll_attempts: int = Field(default=60, ge=1, description="Looks for a container that is not listed yet.")
    poll_retry_interval: str = Field(default="500ms", pattern="^[1-9][0-9]{0,5}m?s$", description="Between two looks.")
    disable_container_selectors: bool = Field(default=False, description="Ask only that the pod is listed.")
    enable_namespace_labels: bool = Field(default=False, description="Give k8s:ns-label; asks the API server.")
    use_new_container_locator: Literal[True] = Field(default=True, description="SPIRE's; there is no other locator.")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.kubelet_secure_port and self.kubelet_read_only_port:
            raise ValueError("use kubelet_secure_port or kubelet_read_only_port, not both")
        if (self.certificate_path is None) != (self.private_key_path is None):
            raise ValueError("certificate_path and private_key_path need each other")
        if sum((self.token_path is not None, self.certificate_path is not None, self.use_anonymous_authentication)) > 1:
            raise ValueError("use a token, a certificate or use_anonymous_authentication, one of them")
        return self

    @property
    def interval(self) -> float:
        """``poll_retry_interval`` in seconds."""
        return int(self.poll_retry_interval.rstrip("ms")) / (1000 if "m" in self.poll_retry_interval else 1)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What Kubernetes gives the agent's own pod: its environment, and its service account's directory."""

    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    service_account: Path = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class _Status(_Model):
    name: str
    image: str = ""
    image_id: str = Field(default="", alias="imageID")
    container_id: str = Field(default="", alias="containerID")
    state: dict[str, object] = {}


class _Owner(_Model):
    kind: str
    name: str
    uid: str


class _Metadata(_Model):
    name: str
    namespace: str = ""  # a namespace is in none
    uid: str
    labels: dict[str, str] | None = None
    owners: list[_Owner] | None = Field(default=None, alias="ownerReferences")


class _Spec(_Model):
    service_account: str = Field(default="", alias="serviceAccountName")
    node_name: str = Field(default="", alias="nodeName")


class _Statuses(_Model):
    containers: list[_Status] | None = Field(default=None, alias="containerStatuses")
    init: list[_Status] | None = Field(default=None, alias="initContainerStatuses")
    ephemeral: list[_Status] | None = Field(default=None, alias="ephemeralContainerStatuses")


class _Pod(_Model):
    metadata: _Metadata
    spec: _Spec
    status: _Statuses = _Statuses()


class _PodList(_Model):
    kind: Literal["PodList"]
    items: list[_Pod] | None = None


class _Namespace(_Model):
    metadata: _Metadata


class _NotYet(AttestorFailed):
    """The kubelet does not show the container yet; it may soon."""


class K8sAttestor:
    """See the module; ``K8sSettings`` are its settings."""

    name: ClassVar[str] = NAME
    settings: ClassVar[type[BaseModel]] = K8sSettings
    selectors: ClassVar[tuple[SelectorDoc, ...]] = tuple(
        SelectorDoc(f"k8s:{form}", meaning, Strength.RUNTIME)
        for form, meaning in (
            ("ns:<namespace>", "the pod's namespace"),
            ("ns-label:<key>:<value>", "a label of that namespace"),
            ("sa:<name>", "the pod's service account"),
            ("container-name:<name>", "the container's name in the pod"),
            ("container-image:<image>", "the container's image, by name and by digest"),
            ("node-name:<name>", "the node that the pod runs on"),
            ("pod-label:<key>:<value>", "a label of the pod"),
            ("pod-owner:<kind>:<name>", "what made the pod, such as a ReplicaSet"),
            ("pod-owner-uid:<kind>:<uid>", "the same by its uid"),
            ("pod-uid:<uid>", "the pod's uid"),
            ("pod-name:<name>", "the pod's name"),
            ("pod-image:<image>", "the image of any of the pod's containers"),
            ("pod-image-count:<number>", "how many containers the pod has"),
            ("pod-init-image:<image>", "the image of any of its init containers"),
            ("pod-init-image-count:<number>", "how many init containers it has"),
        )
    )

    def __init__(self, settings: K8sSettings, node: Node = THIS_NODE, here: Surroundings | None = None) -> None:
        self._settings = settings
        self._node = node
        here = here or Surroundings()
        self._kubelet = _kubelet(settings, here)
        self._api_server = _api_server(here) if settings.enable_namespace_labels else None
        self._reads = BlockingReads()
        self._fetches = BlockingReads()
        self._lists = _Shared(self._list)
        self._waiting: Counter[str] = Counter()

    async def attest(self, process: Process) -> frozenset[Selector]:
        """Give the selectors of the process's pod and container; none outside of pods.

        Raises ``AttestorFailed``, after eight seconds at the latest.
        """
        container = locate(process.facts.cgroup)
        if container is None or not _is_of_kubernetes(container):
            return frozenset()
        until = SystemClock().monotonic() + ATTEST_TIMEOUT
        try:
            async with asyncio.timeout(ATTEST_TIMEOUT):
                await self._reads.run(process.uid, lambda _: require_owned(container, self._node))
                pod, status = await self._find(container, until)
                labels = await self._namespace_labels(process.uid, pod.metadata.namespace, until)
        except TimeoutError:
            raise AttestorFailed("Kubernetes did not answer in time", code="attestor_timeout") from None
        return frozenset(_selectors(pod, None if self._settings.disable_container_selectors else status, labels))

    async def _find(self, container: Container, until: float) -> tuple[_Pod, _Status | None]:
        interval = self._settings.interval
        moment, looks = SystemClock().monotonic() - LIST_AGE, 0
        while True:
            begun, pods = await self._lists.newer_than(moment)
            moment, looks = begun, looks + 1
            try:
                return self._sought(pods, container)
            except _NotYet:
                now = SystemClock().monotonic()
                is_late = now + interval + (now - begun) >= until  # the next look may take as long as this one
                if is_late or looks >= self._settings.max_poll_attempts or self._is_full(container):
                    raise
            self._waiting[container.id] += 1
            try:
                await asyncio.sleep(max(0.0, begun + interval - now))
            finally:
                self._waiting -= Counter({container.id: 1})  # in place, it drops what has become 0

    def _is_full(self, container: Container) -> bool:
        # NOTE(security): who waits holds one of the agent's places; a container must not take them from the others.
        return self._waiting.total() >= MAX_WAITING or self._waiting[container.id] >= MAX_WAITING_PER_CONTAINER

    def _sought(self, pods: "_Pods", container: Container) -> tuple[_Pod, _Status | None]:
        listed = pods.by_container.get(container.id, [])
        if len(listed) > 1:
            raise AttestorFailed("the kubelet lists the container more than once", code="container_ambiguous")
        for pod, status in listed:
            if container.pod_uid not in {None, pod.metadata.uid}:
                raise AttestorFailed("the kubelet lists the container in another pod", code="pod_mismatch")
            if status in (pod.status.ephemeral or ()):
                raise AttestorFailed("a debug container is not the pod's workload", code="container_ephemeral")
            if self._settings.disable_container_selectors or status.state.get("running") is not None:
                return pod, status
            raise _NotYet("the kubelet does not say that the container is running", code="container_not_running")
        known = pods.by_uid.get(container.pod_uid or "")
        if known is not None and self._settings.disable_container_selectors:
            return known, None
        raise _NotYet(
            "the kubelet does not list the process's container" if known else "the kubelet does not list the pod",
            code="container_not_listed" if known else "pod_not_listed",
            hint="a kubelet reports a container some moments after its start; the caller may ask again",
        )

    async def _list(self) -> "_Pods":
        until = SystemClock().monotonic() + FETCH_TIMEOUT
        async with asyncio.timeout(FETCH_TIMEOUT):
            return await self._fetches.run(0, lambda stop: _pods(self._kubelet.get("/pods", Deadline(until, stop))))

    async def _namespace_labels(self, uid: int, namespace: str, until: float) -> dict[str, str]:
        server = self._api_server
        if server is None:
            return {}
        path = f"/api/v1/namespaces/{namespace}"
        body = await self._reads.run(uid, lambda stop: server.get(path, Deadline(until, stop)))
        metadata = _read(_Namespace, body, "api_server").metadata
        if metadata.name != namespace:
            raise _failed("api_server", "answer", "answered for another namespace")
        return metadata.labels or {}


def _is_of_kubernetes(container: Container) -> bool:
    """Say whether the kubelet made it, as its control group's name has it; a user's own containers are not."""
    if container.user is not None:
        return False
    by_cri = any("cri-containerd" in place.home or place.home.startswith("/k8s.io/") for place in container.places)
    return container.pod_uid is not None or container.runtime is Runtime.CRIO or by_cri


def _selectors(pod: _Pod, status: _Status | None, namespace_labels: Mapping[str, str]) -> Iterator[Selector]:
    metadata, containers, init = pod.metadata, pod.status.containers or [], pod.status.init or []
    yield from _one("ns", metadata.namespace)
    yield from _one("sa", pod.spec.service_account)
    yield from _one("node-name", pod.spec.node_name)
    yield from _one("pod-uid", metadata.uid)
    yield from _one("pod-name", metadata.name)
    yield from _one("pod-image-count", str(len(containers)))
    yield from _one("pod-init-image-count", str(len(init)))
    yield from _images("pod-image", *containers)
    yield from _images("pod-init-image", *init)
    if status is not None:
        yield from _one("container-name", status.name)
        yield from _images("container-image", status)
    yield from _pairs("pod-label", metadata.labels or {})
    yield from _pairs("ns-label", namespace_labels)
    for owner in metadata.owners or ():
        yield from _pairs("pod-owner", {owner.kind: owner.name})
        yield from _pairs("pod-owner-uid", {owner.kind: owner.uid})


def _images(kind: str, *statuses: _Status) -> Iterator[Selector]:
    for status in statuses:
        yield from _one(kind, status.image)
        yield from _one(kind, status.image_id)


def _pairs(kind: str, pairs: Mapping[str, str]) -> Iterator[Selector]:
    for key, value in pairs.items():
        # NOTE(security): "a" with "b:c" and "a:b" with "c" would be one text; a key with a colon gives none.
        if key and ":" not in key:
            with suppress(Invalid):
                yield Selector.of(NAME, f"{kind}:{key}:{value}")


def _one(kind: str, value: str) -> Iterator[Selector]:
    """A value that is empty or cannot be a selector's gives none."""
    if value:
        with suppress(Invalid):
            yield Selector.of(NAME, f"{kind}:{value}")


@dataclass(frozen=True, slots=True)
class _Pods:
    """One answer of the kubelet, by what is looked for."""

    by_uid: dict[str, _Pod]
    by_container: dict[str, list[tuple[_Pod, _Status]]]


def _pods(body: bytes) -> _Pods:
    by_uid: dict[str, _Pod] = {}
    by_container: dict[str, list[tuple[_Pod, _Status]]] = {}
    for pod in _read(_PodList, body, "kubelet").items or ():
        about = pod.metadata
        if (
            not about.uid
            or _NAMESPACE.fullmatch(about.namespace) is None
            or by_uid.setdefault(about.uid, pod) is not pod
        ):
            raise _failed("kubelet", "answer", "lists a pod twice, or one without a name")
        told = pod.status
        for status in (*(told.containers or ()), *(told.init or ()), *(told.ephemeral or ())):
            _, separator, container = status.container_id.partition("://")  # such as containerd://<id>
            if separator and container:
                by_container.setdefault(container, []).append((pod, status))
    return _Pods(by_uid, by_container)


class _Shared:
    """One fetch for all who ask at a time, and never two at once. Failures are shared like answers."""

    def __init__(self, fetch: Callable[[], Awaitable[_Pods]]) -> None:
        self._fetch = fetch
        self._current: tuple[float, asyncio.Future[_Pods]] | None = None

    async def newer_than(self, moment: float) -> tuple[float, _Pods]:
        """Give an answer to a question asked after that monotonic time, and when it was asked; raises what it raised."""
        while True:
            begun, task = self._current or (moment, None)
            if task is not None and begun > moment:
                return begun, await asyncio.shield(task)
            if task is not None and not task.done():
                await asyncio.wait({task})
                continue
            task = asyncio.ensure_future(self._fetch())
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, though nobody waits
            self._current = (SystemClock().monotonic(), task)


@dataclass(frozen=True, slots=True)
class _Server:
    """Whom to ask over HTTP, and how to know it. Files are read for each question: they are renewed at any time."""

    who: Literal["kubelet", "api_server"]
    host: str
    port: int
    ca: Path | None  # None: plain HTTP, or nobody vouches
    is_plain: bool = False
    is_named: bool = True  # whether the certificate must bear the host's name
    token: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def get(self, path: str, deadline: Deadline) -> bytes:
        """Give the body of a 200; blocks. Raises ``AttestorFailed``, and ``TimeoutError`` when it is late."""
        try:
            request = f"GET {path} HTTP/1.1\r\n{self._headers()}\r\n".encode("ascii")
            context = None if self.is_plain else self._context()
        except (OSError, ValueError):  # ssl.SSLError is an OSError
            raise _failed(self.who, "credentials", "has a CA, certificate or token file that cannot be read") from None
        try:
            with socket.create_connection((self.host, self.port), deadline.left()) as plain:
                if context is None:
                    return self._body(_exchange(plain, request, deadline))
                with context.wrap_socket(plain, server_hostname=self.host) as secured:
                    return self._body(_exchange(secured, request, deadline))
        except TimeoutError:
            raise
        except ssl.SSLCertVerificationError:
            hint = "check kubelet_ca_path, and that the certificate bears the node's name"
            raise _failed(self.who, "untrusted", "has a certificate that does not verify", hint) from None
        except http.client.HTTPException:  # its text could hold a piece of the answer
            raise _failed(self.who, "answer", "gave an answer that is too long, cut short or not HTTP") from None
        except OSError:
            raise _failed(self.who, "unreachable", "cannot be asked") from None

    def _headers(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        headers = f"Host: {host}:{self.port}\r\nAccept: application/json\r\nConnection: close\r\n"
        if self.token is None:
            return headers
        with self.token.open("rb") as token_file:
            token = token_file.read(MAX_TOKEN).strip()
        if _TOKEN.fullmatch(token) is None:
            raise ValueError("not a token")
        return f"{headers}Authorization: Bearer {token.decode('ascii')}\r\n"

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.check_hostname = self.is_named and self.ca is not None
        if self.ca is None:
            context.verify_mode = ssl.CERT_NONE  # skip_kubelet_verification: the start has warned of it
        else:
            context.load_verify_locations(cafile=self.ca)
        if self.certificate is not None:
            context.load_cert_chain(self.certificate, self.key, password="")  # never asks a terminal
        return context

    def _body(self, answer: bytes) -> bytes:
        response = http.client.HTTPResponse(cast("socket.socket", _Received(answer)), method="GET")
        response.begin()
        if response.status in {http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN}:
            hint = "the service account needs get on nodes/proxy, and on namespaces for enable_namespace_labels"
            raise _failed(self.who, "denied", "does not let the agent ask", hint)
        if response.status != http.HTTPStatus.OK:
            raise _failed(self.who, "answer", f"answered {response.status}")
        return response.read()  # IncompleteRead where it is cut short


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


def _kubelet(settings: K8sSettings, here: Surroundings) -> _Server:
    if settings.kubelet_read_only_port is not None:
        return _Server("kubelet", "127.0.0.1", settings.kubelet_read_only_port, None, is_plain=True)
    name = settings.node_name or here.environ.get(settings.node_name_env, "")
    if name and _HOST.fullmatch(name) is None:
        raise Misconfigured("the node's name is no name or address", hint="check node_name and node_name_env")
    if settings.skip_kubelet_verification:
        _LOG.warning("skip_kubelet_verification: whoever answers on the kubelet's port is believed, and gets the token")
    is_secret = settings.certificate_path is None and not settings.use_anonymous_authentication
    return _Server(
        "kubelet",
        name or "127.0.0.1",
        settings.kubelet_secure_port or KUBELET_PORT,
        None if settings.skip_kubelet_verification else settings.kubelet_ca_path or here.service_account / "ca.crt",
        is_named=bool(name),
        token=(settings.token_path or here.service_account / "token") if is_secret else None,
        certificate=settings.certificate_path,
        key=settings.private_key_path,
    )


def _api_server(here: Surroundings) -> _Server:
    host, port = (here.environ.get(f"KUBERNETES_SERVICE_{name}", "") for name in ("HOST", "PORT"))
    if _HOST.fullmatch(host) is None or re.fullmatch("[0-9]{1,5}", port) is None:
        raise Misconfigured(
            "enable_namespace_labels needs the API server, and the agent does not run in a pod",
            hint="KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are set in every pod",
        )
    return _Server("api_server", host, int(port), here.service_account / "ca.crt", token=here.service_account / "token")


def _read(model: type[M], body: bytes, who: str) -> M:
    try:
        return model.model_validate(loads(body, max_bytes=MAX_ANSWER, max_depth=MAX_DEPTH))
    except (ValidationError, Invalid):
        raise _failed(who, "answer", "gave an answer that is not what it should be") from None


def _failed(who: str, kind: str, what: str, hint: str = "") -> AttestorFailed:
    return AttestorFailed(f"the {who.replace('_', ' ')} {what}", code=f"{who}_{kind}", hint=hint)
