"""Describes a process by the Kubernetes pod and container that it is in, as this node's kubelet tells it.

Selectors are SPIRE's ``k8s:…``. Which container it is comes from ``broker.attestation.containers``, which trusts neither
names nor the caller; the kubelet must list that container's id as running, in the pod that the control group names. All
who ask at one time share one list of pods. A kubelet reports a container some moments after it has started: the caller
waits for that a little, then is refused with a code that says so. Tokens stand in no message.
"""

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from broker.attestation.cgroups import Runtime
from broker.attestation.containers import THIS_NODE, Container, Node, locate, require_owned
from broker.attestation.contract import AttestorUnavailable, SelectorDoc, Strength
from broker.attestation.kubernetes import (
    Fault,
    Server,
    Surroundings,
    bearer,
    is_host,
    present,
    read_file,
    reading_credentials,
    trusting,
    trusting_anybody,
)
from broker.attestation.pods import (
    ContainerStatus,
    KubernetesObject,
    Metadata,
    NotYet,
    Pod,
    PodList,
    Pods,
    found,
    indexed,
)
from broker.attestation.process import Process
from broker.attestation.reads import BlockingReads, Deadline, SharedRead
from broker.clock import SystemClock
from broker.errors import Invalid, Misconfigured
from broker.spiffe import Selector

NAME = "k8s"
ATTEST_TIMEOUT = 8.0  # seconds, waiting for the kubelet included; the agent gives all attestors ten
FETCH_TIMEOUT = 5.0  # seconds for one answer
LIST_AGE = 0.5  # seconds that a list of pods serves those who come later, a failure to get one too
MAX_ANSWER = 16 << 20  # bytes; 250 pods of some 30 KiB are half of it
MAX_WAITING = 32  # callers who wait for the kubelet to catch up: half of what the agent attests at once
MAX_WAITING_PER_CONTAINER = 4  # so that one container's processes do not hold all of these places
KUBELET_PORT = 10250
_NAMESPACE = re.compile("[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")  # a DNS label: it becomes part of a path
_HINTS: Final[Mapping[str, str]] = {
    "denied": "the service account needs get on nodes/proxy, and on namespaces for enable_namespace_labels",
    "untrusted": "check kubelet_ca_path, and that the certificate bears the node's name",
    "credentials": "check kubelet_ca_path, token_path, certificate_path and private_key_path",
}
_LOG = logging.getLogger(__name__)


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


class _Namespace(KubernetesObject):
    kind: Literal["Namespace"]
    metadata: Metadata


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
        self._kubelet = _Kubelet.of(settings, here)
        self._here = here
        if settings.enable_namespace_labels:
            _require_api_server(here)
        self._reads = BlockingReads()
        self._fetches = BlockingReads()
        self._lists = SharedRead(self._list)
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
                require_owned(container, self._node)
                pod, status = await self._find(container, until)
                labels = await self._namespace_labels(process.uid, pod.metadata.namespace, until)
        except TimeoutError:
            raise AttestorUnavailable("Kubernetes did not answer in time", code="attestor_timeout") from None
        return frozenset(_selectors(pod, None if self._settings.disable_container_selectors else status, labels))

    async def _find(self, container: Container, until: float) -> tuple[Pod, ContainerStatus | None]:
        interval = self._settings.interval
        moment, looks = SystemClock().monotonic() - LIST_AGE, 0
        while True:
            begun, pods = await self._lists.newer_than(moment)
            moment, looks = begun, looks + 1
            try:
                return found(pods, container, is_pod_enough=self._settings.disable_container_selectors)
            except NotYet:
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

    async def _list(self) -> Pods:
        until = SystemClock().monotonic() + FETCH_TIMEOUT
        async with asyncio.timeout(FETCH_TIMEOUT):
            return await self._fetches.run(0, lambda stop: self._kubelet.pods(Deadline(until, stop)))

    async def _namespace_labels(self, uid: int, namespace: str, until: float) -> Mapping[str, str]:
        if not self._settings.enable_namespace_labels:
            return {}
        return await self._reads.run(uid, lambda stop: _labels_of(namespace, self._here, Deadline(until, stop)))


def _is_of_kubernetes(container: Container) -> bool:
    """Say whether the kubelet made it, as its control group's name has it; a user's own containers are not."""
    if container.user is not None:
        return False
    by_cri = any("cri-containerd" in place.home or place.home.startswith("/k8s.io/") for place in container.places)
    return container.pod_uid is not None or container.runtime is Runtime.CRIO or by_cri


def _selectors(pod: Pod, status: ContainerStatus | None, namespace_labels: Mapping[str, str]) -> Iterator[Selector]:
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


def _images(kind: str, *statuses: ContainerStatus) -> Iterator[Selector]:
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
class _Kubelet:
    """This node's kubelet: where it is, and the files by which it and we are known."""

    settings: K8sSettings
    here: Surroundings
    node: str  # empty: over loopback, where nobody knows what name its certificate bears

    @classmethod
    def of(cls, settings: K8sSettings, here: Surroundings) -> Self:
        """Check what can be checked at the start; raises ``Misconfigured``."""
        if settings.kubelet_read_only_port is not None:
            return cls(settings, here, "")
        node = settings.node_name or here.environ.get(settings.node_name_env, "")
        if node and not is_host(node):
            raise Misconfigured("the node's name is no name or address", hint="check node_name and node_name_env")
        if settings.skip_kubelet_verification:
            _LOG.warning(
                "skip_kubelet_verification: whoever answers on the kubelet's port is believed, and gets the token"
            )
        return cls(settings, here, node)

    def pods(self, deadline: Deadline) -> Pods:
        """Ask for the list; blocks. Raises ``AttestorFailed``, and ``TimeoutError``."""
        try:
            pods = indexed(self._server().ask(PodList, "/pods", deadline))
        except Fault as fault:
            raise _failed("kubelet", fault) from None
        if any(_NAMESPACE.fullmatch(pod.metadata.namespace) is None for pod in pods.by_uid.values()):
            raise _failed("kubelet", Fault("answer", "lists a pod in no namespace"))
        return pods

    def _server(self) -> Server:
        settings, port = self.settings, self.settings.kubelet_secure_port or KUBELET_PORT
        if settings.kubelet_read_only_port is not None:
            return Server("127.0.0.1", settings.kubelet_read_only_port, None, None, MAX_ANSWER)
        with reading_credentials():
            if settings.skip_kubelet_verification:
                context = trusting_anybody()
            else:
                authorities = read_file(settings.kubelet_ca_path or self.here.authorities_path)
                context = trusting(authorities, by_name=bool(self.node))
            token = None
            if settings.certificate_path is not None and settings.private_key_path is not None:
                present(context, read_file(settings.certificate_path), read_file(settings.private_key_path))
            elif not settings.use_anonymous_authentication:
                token = bearer(read_file(settings.token_path or self.here.token_path))
            return Server(self.node or "127.0.0.1", port, context, token, MAX_ANSWER)


def _require_api_server(here: Surroundings) -> None:
    try:
        here.api_server_address()
    except ValueError:
        raise Misconfigured(
            "enable_namespace_labels needs the API server, and the agent does not run in a pod",
            hint="KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are set in every pod",
        ) from None


def _labels_of(namespace: str, here: Surroundings, deadline: Deadline) -> Mapping[str, str]:
    try:
        server = here.api_server(MAX_ANSWER)
        metadata = server.ask(_Namespace, f"/api/v1/namespaces/{namespace}", deadline).metadata
    except Fault as fault:
        raise _failed("api_server", fault) from None
    if metadata.name != namespace:
        raise _failed("api_server", Fault("answer", "answered for another namespace"))
    return metadata.labels or {}


def _failed(who: Literal["kubelet", "api_server"], fault: Fault) -> AttestorUnavailable:
    name = {"kubelet": "kubelet", "api_server": "API server"}[who]
    return AttestorUnavailable(
        f"the {name} {fault.what}", code=f"{who}_{fault.kind}", hint=fault.hint or _HINTS.get(fault.kind, "")
    )
