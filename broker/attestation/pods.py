"""Pods and their containers as Kubernetes tells of them, as far as attestors ask; core/v1 of its API.

Strict: a field that is not of its type is no answer. Looks pods up by uid and by container id. Knows no selectors.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from broker.attestation.containers import Container
from broker.attestation.contract import AttestorFailed, AttestorUnavailable
from broker.attestation.kubernetes import Fault


class NotYet(AttestorUnavailable):
    """The kubelet does not show the container yet; it may soon. One that was restarted shows none for a moment."""


class KubernetesObject(BaseModel):
    """What an API server or a kubelet says; it says more than is read here."""

    model_config = ConfigDict(strict=True, frozen=True)


class Owner(KubernetesObject):
    """What made an object, such as a ReplicaSet."""

    kind: str
    name: str
    uid: str


class Metadata(KubernetesObject):
    """What every object has."""

    name: str
    namespace: str = ""  # nodes and namespaces are in none
    uid: str
    labels: dict[str, str] | None = None
    owners: list[Owner] | None = Field(default=None, alias="ownerReferences")


class PodSpec(KubernetesObject):
    """What was wanted. A static pod has no service account; kubelets before 1.34 repeat what its file says."""

    service_account: str = Field(default="", alias="serviceAccountName")
    node_name: str = Field(default="", alias="nodeName")


class ContainerStatus(KubernetesObject):
    """One container. It has no id until the runtime has made it, and no image id until the image is there."""

    name: str
    image: str = ""
    image_id: str = Field(default="", alias="imageID")
    container_id: str = Field(default="", alias="containerID")
    state: dict[str, object] = {}

    @property
    def is_running(self) -> bool:
        """Whether it runs, as far as the kubelet has seen."""
        return self.state.get("running") is not None


class PodStatus(KubernetesObject):
    """What is; a pod that was just bound to its node has none of these yet."""

    host_ip: str = Field(default="", alias="hostIP")
    containers: list[ContainerStatus] | None = Field(default=None, alias="containerStatuses")
    init: list[ContainerStatus] | None = Field(default=None, alias="initContainerStatuses")
    ephemeral: list[ContainerStatus] | None = Field(default=None, alias="ephemeralContainerStatuses")

    def all(self) -> Iterator[ContainerStatus]:
        """Give every container: those of init containers and debuggers, too."""
        for statuses in (self.containers, self.init, self.ephemeral):
            yield from statuses or ()


class Pod(KubernetesObject):
    """A pod. In a kubelet's list it does not say that it is one."""

    metadata: Metadata
    spec: PodSpec
    status: PodStatus = PodStatus()


class PodList(KubernetesObject):
    """What a kubelet answers to ``/pods``: the pods that it runs, static ones under its own uids, no mirrors of them."""

    kind: Literal["PodList"]
    items: list[Pod] | None = None


@dataclass(frozen=True, slots=True)
class Pods:
    """One list, by what is looked for."""

    by_uid: dict[str, Pod]
    by_container: dict[str, list[tuple[Pod, ContainerStatus]]]


def indexed(listed: PodList) -> Pods:
    """Index a list; raises :class:`Fault` for one that names a pod twice, or one without a uid."""
    pods = Pods({}, {})
    for pod in listed.items or ():
        uid = pod.metadata.uid
        if not uid or pods.by_uid.setdefault(uid, pod) is not pod:
            raise Fault("answer", "lists a pod twice, or one without a uid")
        for status in pod.status.all():
            _, separator, container = status.container_id.partition("://")  # such as containerd://<id>
            if separator and container:
                pods.by_container.setdefault(container, []).append((pod, status))
    return pods


def found(pods: Pods, container: Container, *, is_pod_enough: bool) -> tuple[Pod, ContainerStatus | None]:
    """Find a running container, or with ``is_pod_enough`` the pod that its control group names, listed in it or not.

    Raises :class:`NotYet` where a later list may show it, and ``AttestorFailed`` where the list contradicts the kernel.
    """
    listed = pods.by_container.get(container.id, [])
    if len(listed) > 1:
        raise AttestorFailed("the kubelet lists the container more than once", code="container_ambiguous")
    for pod, status in listed:
        if container.pod_uid not in {None, pod.metadata.uid}:
            raise AttestorFailed("the kubelet lists the container in another pod", code="pod_mismatch")
        if status in (pod.status.ephemeral or ()):
            raise AttestorFailed("a debug container is not the pod's workload", code="container_ephemeral")
        if is_pod_enough or status.is_running:
            return pod, status
        raise NotYet("the kubelet does not say that the container is running", code="container_not_running")
    known = pods.by_uid.get(container.pod_uid or "")
    if known is not None and is_pod_enough:
        return known, None
    raise NotYet(
        "the kubelet does not list the process's container" if known else "the kubelet does not list the pod",
        code="container_not_listed" if known else "pod_not_listed",
        hint="a kubelet reports a container some moments after its start; the caller may ask again",
    )
