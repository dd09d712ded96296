"""Node attestation by a projected Kubernetes service account token, both halves; SPIRE's ``k8s_psat`` on the wire.

The agent sends the token that the kubelet projects into its pod. The server has the cluster's API server review it for
the server's own audience, and then asks which pod and which node it was made for: the agent is named after the node's
uid. Whether to believe the API server is TLS's business; the API server's word is all that counts here. A fault on that
side is ``Unavailable``, so that agents ask again; a token that does not prove it is ``NotAttested``.
"""

import asyncio
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from broker.attestation.contract import AttestedNode, AttestorFailed, ChallengeWith, Evidence
from broker.attestation.kubeconfig import read_kubeconfig
from broker.attestation.kubernetes import Fault, NotFound, Server, Surroundings, read_file
from broker.attestation.pods import KubernetesObject, Metadata, Pod
from broker.attestation.reads import BlockingReads, Deadline
from broker.clock import SystemClock
from broker.errors import Invalid, NotAttested, Unavailable
from broker.spiffe import Selector
from broker.spiffe.strictjson import loads

NAME = "k8s_psat"
VERIFY_TIMEOUT = 10.0  # seconds for the three questions; the server gives an attestation thirty
MAX_PAYLOAD = 1 << 15  # bytes; a token has some 1.2 KiB
MAX_ANSWER = 4 << 20  # bytes; a node that lists its images has some 50 KiB, and etcd keeps no object above 1.5 MiB
_SEGMENT = r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$"  # of a SPIFFE ID's path, and not "." or ".."
_ACCOUNT = r"^[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?:[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?$"
_LABEL_KEY = "^[A-Za-z0-9][A-Za-z0-9._/-]{0,316}$"
_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,8192}\.[A-Za-z0-9_-]{1,16384}\.[A-Za-z0-9_-]{1,2048}")  # a JWS (RFC 7515 §7.1)
_USER = re.compile(r"system:serviceaccount:([a-z0-9-]{1,63}):([a-z0-9.-]{1,253})")
_OBJECT = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?")  # a DNS subdomain: it becomes part of a path
_UID = re.compile("[0-9A-Za-z][0-9A-Za-z-]{0,63}")
_EXTRA = "authentication.kubernetes.io/"
_HINTS: Final[Mapping[str, str]] = {
    "denied": "the server's service account needs create on tokenreviews, and get on pods and nodes",
    "credentials": "run the server in a pod, or set kube_config_file",
}
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
    kube_config_file: Path | None = Field(default=None, description="A kubeconfig; unset: the server's own pod.")
    allowed_node_label_keys: frozenset[LabelKey] = Field(default=frozenset(), description="Labels for selectors.")
    allowed_pod_label_keys: frozenset[LabelKey] = Field(default=frozenset(), description="Labels for selectors.")
    use_pod_uid_for_agent_id: bool = Field(default=False, description="Name the agent after its pod, not its node.")


class PsatServerSettings(BaseModel):
    """The clusters, by name. Nodes of others are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    clusters: dict[Annotated[str, StringConstraints(pattern=_SEGMENT)], PsatClusterSettings] = Field(
        min_length=1, description="One table per cluster."
    )


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
            token = (await asyncio.to_thread(read_file, self._settings.token_path)).decode("ascii").strip()
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


class _Claim(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    cluster: str
    token: str


class _User(KubernetesObject):
    username: str = ""
    extra: dict[str, list[str]] | None = None


class _Status(KubernetesObject):
    authenticated: bool = False
    user: _User = _User()
    audiences: list[str] | None = None
    error: str = ""


class _Review(KubernetesObject):
    kind: Literal["TokenReview"]
    status: _Status


class _Pod(Pod):
    kind: Literal["Pod"]


class _Node(KubernetesObject):
    kind: Literal["Node"]
    metadata: Metadata


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
            try:
                server = _access(cluster, self._here)
                return _judged(claim, cluster, server, Deadline(until, abandoned))
            except NotFound:
                raise NotAttested("the token's pod or its node is gone", code="pod_unknown") from None
            except Fault as fault:
                raise _unavailable(fault) from None

        try:
            async with asyncio.timeout(VERIFY_TIMEOUT):
                return await self._reads.run(self._number[claim.cluster], judge)
        except TimeoutError:
            raise Unavailable("the API server did not answer in time", code="api_server_timeout") from None


def _judged(claim: _Claim, cluster: PsatClusterSettings, server: Server, deadline: Deadline) -> AttestedNode:
    spec = {"token": claim.token, "audiences": list(cluster.audience)}
    question = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}
    status = _reviewed(server, deadline, question)
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
    # Newer API servers bind the token to its node as well: to this one, or it is not this token's.
    extra, facts = status.user.extra or {}, (("node-name", node.name), ("node-uid", node.uid))
    agrees = all(extra.get(f"{_EXTRA}{name}", [value]) == [value] for name, value in facts)
    if node.name != node_name or _UID.fullmatch(node.uid) is None or not agrees:
        raise NotAttested("the token, its pod and the node do not agree", code="node_mismatch")
    by_pod = cluster.use_pod_uid_for_agent_id
    return AttestedNode(
        path=f"/{NAME}/{claim.cluster}/" + (f"pod/{pod.metadata.uid}" if by_pod else node.uid),
        selectors=frozenset(_selectors(claim.cluster, cluster, pod, node)),
        reattestable=True,
    )


def _pod(user: _User, namespace: str, account: str, server: Server, deadline: Deadline) -> _Pod:
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


def _selectors(name: str, cluster: PsatClusterSettings, pod: _Pod, node: Metadata) -> Iterator[Selector]:
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


def _unavailable(fault: Fault) -> Unavailable:
    return Unavailable(
        f"the API server {fault.what}",
        code=f"api_server_{fault.kind}",
        hint=fault.hint or _HINTS.get(fault.kind, ""),
    )


def _access(cluster: PsatClusterSettings, here: Surroundings) -> Server:
    """Read how the API server is asked, anew each time: tokens and authorities are renewed. Raises ``Fault``."""
    if cluster.kube_config_file is not None:
        return read_kubeconfig(cluster.kube_config_file, MAX_ANSWER)
    return here.api_server(MAX_ANSWER)


def _reviewed(server: Server, deadline: Deadline, question: Mapping[str, object]) -> _Status:
    try:
        return server.ask(_Review, "/apis/authentication.k8s.io/v1/tokenreviews", deadline, question).status
    except NotFound as fault:  # no such interface, which is not the token's fault
        raise Fault(fault.kind, fault.what) from None
