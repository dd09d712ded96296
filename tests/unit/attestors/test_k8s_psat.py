"""Projected service account tokens, both halves, against an API server that answers well, badly, late or for another."""

import json
import time

import pytest
from pydantic import ValidationError

from attestors.node import k8s_psat as module
from attestors.node.k8s_psat import (
    PsatAgent,
    PsatClusterSettings,
    PsatServer,
    PsatServerSettings,
    PsatSettings,
)
from broker.attestation.contract import AttestedNode, AttestorFailed, Evidence
from broker.attestation.kubernetes import Surroundings
from broker.errors import NotAttested, Unavailable
from broker.spiffe import SpiffeId, TrustDomain
from tests.fakes.kubelet import TOKEN, FakeAuthority, FakeKubernetes, pod, recording

PSAT = "eyJhbGciOiJSUzI1NiJ9.eyJzZWNyZXQiOiJodW50ZXIyIn0.c2ln"
POD_UID, NODE_UID = "11111111-2222-3333-4444-555555555555", "22222222-2222-3333-4444-555555555555"
POD_PATH, NODE_PATH = "/api/v1/namespaces/shop/pods/orders-5d9f", "/api/v1/nodes/node-1"
REVIEWS = "/apis/authentication.k8s.io/v1/tokenreviews"
EXTRA = "authentication.kubernetes.io/"
SELECTORS = {
    "k8s_psat:cluster:demo", "k8s_psat:agent_ns:shop", "k8s_psat:agent_sa:orders",
    "k8s_psat:agent_pod_name:orders-5d9f", f"k8s_psat:agent_pod_uid:{POD_UID}", "k8s_psat:agent_node_ip:10.0.0.1",
    "k8s_psat:agent_node_name:node-1", f"k8s_psat:agent_node_uid:{NODE_UID}",
}  # fmt: skip


def evidence(cluster: str = "demo", token: str = PSAT) -> Evidence:
    return Evidence("k8s_psat", json.dumps({"cluster": cluster, "token": token}).encode())


async def challenge(text: bytes) -> bytes:
    raise AssertionError("a service account token is never challenged")


class Case:
    """One server half, one cluster whose API server accepts one token."""

    def __init__(self, kube: FakeKubernetes) -> None:
        self.kube = kube
        self.status = {
            "authenticated": True,
            "audiences": ["spire-server"],
            "user": {
                "username": "system:serviceaccount:shop:orders",
                "uid": "account",
                "groups": ["system:serviceaccounts"],
                "extra": {f"{EXTRA}pod-name": ["orders-5d9f"], f"{EXTRA}pod-uid": [POD_UID]},
            },
        }
        kube.review = lambda spec: self.status if spec["token"] == PSAT else {"authenticated": False, "error": "no"}
        self.pod = {"kind": "Pod", "apiVersion": "v1", **pod(POD_UID, "c" * 64)}
        self.node = {
            "kind": "Node",
            "metadata": {"name": "node-1", "uid": NODE_UID, "labels": {"zone": "a", "gpu": "yes"}},
            "status": {"images": []},
        }
        kube.things = {POD_PATH: self.pod, NODE_PATH: self.node}
        self.environ = {"KUBERNETES_SERVICE_HOST": "localhost", "KUBERNETES_SERVICE_PORT": str(kube.port)}

    @property
    def extra(self) -> dict:
        return self.status["user"]["extra"]

    def server(self, **settings: object) -> PsatServer:
        table = {"demo": {"service_account_allow_list": ["spire:agent", "shop:orders"], **settings}}
        return PsatServer(PsatServerSettings(clusters=table), Surroundings(self.environ, self.kube.authority.directory))

    async def node_of(self, given: Evidence | None = None, **settings: object) -> AttestedNode:
        return await self.server(**settings).verify(given or evidence(), challenge)

    async def refusal(self, given: Evidence | None = None, **settings: object) -> str:
        return await self._raised(NotAttested, given, **settings)

    async def unavailable(self, **settings: object) -> str:
        return await self._raised(Unavailable, None, **settings)

    async def _raised(self, kind: type, given: Evidence | None, **settings: object) -> str:
        with pytest.raises(kind) as raised:
            await self.node_of(given, **settings)
        told = f"{raised.value} {raised.value.hint} {raised.value!r} {raised.value.__cause__!r}"
        assert TOKEN not in told and PSAT not in told
        return raised.value.reason


@pytest.fixture
def case(tmp_path):
    with FakeKubernetes(tmp_path / "account") as kube:
        yield Case(kube)


# --- the agent's half


async def test_the_payload_is_spires_and_the_token_is_read_anew(tmp_path) -> None:
    path = tmp_path / "token"
    agent = PsatAgent(PsatSettings(cluster="demo", token_path=path))
    for token in (PSAT, "a.b.c"):
        path.write_text(f"{token}\n")
        given = await agent.evidence()
        assert given.type == "k8s_psat" and json.loads(given.payload) == {"cluster": "demo", "token": token}
        assert token not in repr(given)


@pytest.mark.parametrize("text", [None, b"", b"secret", b"a.b.c\nd.e.f", b"\xff\xfe", b"a.b.c" * 300_000])
async def test_what_is_no_token_is_never_sent(tmp_path, text) -> None:
    path = tmp_path / "token"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(AttestorFailed) as refused:
        await PsatAgent(PsatSettings(cluster="demo", token_path=path)).evidence()
    assert refused.value.reason == "token_unreadable" and "secret" not in str(refused.value)
    with pytest.raises(AttestorFailed):
        await PsatAgent(PsatSettings(cluster="demo")).respond(b"prove it")


# --- a node that proves itself


async def test_the_node_is_named_after_its_uid(case) -> None:
    node = await case.node_of()
    assert (node.path, node.reattestable, node.consumes) == (f"/k8s_psat/demo/{NODE_UID}", True, None)
    assert {str(one) for one in node.selectors} == SELECTORS
    assert case.kube.requests == [REVIEWS, POD_PATH, NODE_PATH]
    assert case.kube.reviewed == [{"token": PSAT, "audiences": ["spire-server"]}]
    assert SpiffeId.of(TrustDomain("example.org"), f"/spire/agent{node.path}")


async def test_or_after_its_pod(case) -> None:
    assert (await case.node_of(use_pod_uid_for_agent_id=True)).path == f"/k8s_psat/demo/pod/{POD_UID}"


async def test_only_allowed_labels_become_selectors(case) -> None:
    node = await case.node_of(allowed_node_label_keys=["zone", "missing"], allowed_pod_label_keys=["app"])
    labels = {"k8s_psat:agent_node_label:zone:a", "k8s_psat:agent_pod_label:app:orders"}
    assert {str(one) for one in node.selectors} == SELECTORS | labels


@pytest.mark.parametrize("name", ["node-name", "node-uid"])
async def test_a_token_that_newer_api_servers_bind_to_its_node(case, name: str) -> None:
    case.extra.update({f"{EXTRA}node-name": ["node-1"], f"{EXTRA}node-uid": [NODE_UID]})
    await case.node_of()
    for others in (["another"], [*case.extra[f"{EXTRA}{name}"], "another"], [""]):
        case.extra[f"{EXTRA}{name}"] = others
        assert await case.refusal() == "node_mismatch"


async def test_a_review_and_objects_as_kubernetes_writes_them(case) -> None:
    review, node = recording("tokenreview"), recording("node")
    (described,) = (one for one in recording("containerd")["items"] if one["metadata"]["name"].startswith("checkout-"))
    case.kube.review = lambda spec: review["status"] if spec["token"] == PSAT else {"user": {}, "error": "[no]"}
    path = f"/api/v1/namespaces/shop/pods/{described['metadata']['name']}"
    case.kube.things = {path: {"kind": "Pod", "apiVersion": "v1", **described}, "/api/v1/nodes/worker-1": node}
    settings = {
        "service_account_allow_list": ["shop:checkout"],
        "allowed_node_label_keys": ["topology.kubernetes.io/zone"],
    }
    found = await case.node_of(**settings)
    assert found.path == f"/k8s_psat/demo/{node['metadata']['uid']}"
    assert {
        "k8s_psat:agent_pod_name:checkout-6c8d9f7b54-x2kqp",
        "k8s_psat:agent_node_ip:192.0.2.17",
        "k8s_psat:agent_node_label:topology.kubernetes.io/zone:b",
    } <= {str(one) for one in found.selectors}
    assert await case.refusal(evidence(token="a.b.c"), **settings) == "token_rejected"


async def test_another_audience_when_the_settings_say_so(case) -> None:
    case.status["audiences"] = ["broker-server"]
    assert await case.refusal() == "token_audience"
    await case.node_of(audience=["broker-server", "spire-server"])
    assert case.kube.reviewed[-1]["audiences"] == ["broker-server", "spire-server"]


# --- one that does not


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"[]",
        b'{"cluster":"demo"}',
        b'{"cluster":"demo","token":7}',
        b'{"cluster":"demo","cluster":"demo","token":"a.b.c"}',
        b'{"cluster":"demo","token":"a.b.c","more":1}',
        b'{"cluster":"demo","token":"a.b.c"}' + b" " * 40_000,
    ],
)
async def test_evidence_that_is_none(case, payload) -> None:
    assert await case.refusal(Evidence("k8s_psat", payload)) == "evidence_malformed"
    assert case.kube.requests == []


async def test_an_unknown_cluster_and_a_token_that_is_none(case) -> None:
    assert await case.refusal(evidence("other")) == "cluster_unknown"
    for token in ("", "a.b", "a.b.c\n", "a.b.c\r\nX: y", "ſ.b.c"):
        assert await case.refusal(evidence(token=token)) == "token_rejected"
    assert case.kube.requests == []
    assert await case.refusal(evidence(token="a.b.c")) == "token_rejected"


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda one: one.status.update(authenticated=False), "token_rejected"),
        (lambda one: one.status.pop("authenticated"), "token_rejected"),
        (lambda one: one.status.update(error="expired"), "token_rejected"),
        (lambda one: one.status.update(audiences=["https://kubernetes.default.svc"]), "token_audience"),
        (lambda one: one.status.update(audiences=[]), "token_audience"),
        (lambda one: one.status.pop("audiences"), "token_audience"),
        (lambda one: one.status["user"].update(username="system:serviceaccount:shop:other"), "service_account_refused"),
        (
            lambda one: one.status["user"].update(username="system:serviceaccount:shop:orders:x"),
            "service_account_refused",
        ),
        (lambda one: one.status["user"].update(username="shop:orders"), "service_account_refused"),
        (lambda one: one.status["user"].update(username="system:node:node-1"), "service_account_refused"),
        (lambda one: one.status.update(user={}), "service_account_refused"),
        (lambda one: one.status["user"].pop("extra"), "token_unbound"),
        (lambda one: one.extra.pop(f"{EXTRA}pod-uid"), "token_unbound"),
        (lambda one: one.extra.update({f"{EXTRA}pod-name": []}), "token_unbound"),
        (lambda one: one.extra.update({f"{EXTRA}pod-uid": [POD_UID, "x"]}), "token_unbound"),
        (lambda one: one.extra.update({f"{EXTRA}pod-name": ["../../nodes/node-1"]}), "token_unbound"),
        (lambda one: one.pod["metadata"].update(uid="made-again"), "pod_mismatch"),
        (lambda one: one.pod["metadata"].update(namespace="other"), "pod_mismatch"),
        (lambda one: one.pod["metadata"].update(name="other"), "pod_mismatch"),
        (lambda one: one.pod["spec"].update(serviceAccountName="other"), "pod_mismatch"),
        (lambda one: one.pod["spec"].pop("nodeName"), "node_unknown"),
        (lambda one: one.pod["spec"].update(nodeName="../pods"), "node_unknown"),
        (lambda one: one.node["metadata"].update(name="node-2"), "node_mismatch"),
        (lambda one: one.node["metadata"].update(uid=""), "node_mismatch"),
        (lambda one: one.node["metadata"].update(uid="../../join_token/x"), "node_mismatch"),
        (lambda one: one.kube.things.pop(POD_PATH), "pod_unknown"),
        (lambda one: one.kube.things.pop(NODE_PATH), "pod_unknown"),
    ],
)
async def test_a_token_that_does_not_prove_it(case, spoil, code) -> None:
    spoil(case)
    assert await case.refusal() == code


# --- an API server that answers badly


@pytest.mark.bears("A16")
@pytest.mark.parametrize("fault", ["status", "redirect", "cut", "garbage", "duplicate", "not-http", "huge"])
async def test_an_answer_that_is_not_what_it_should_be(case, fault) -> None:
    case.kube.fault = fault
    assert await case.unavailable() == "api_server_answer"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda one: one.status.update(authenticated="true"),
        lambda one: one.status.update(audiences="spire-server"),
        lambda one: one.node.update(kind="NodeList"),
        lambda one: one.pod.update(kind="Status"),
        lambda one: one.pod["metadata"].update(uid=None),
    ],
)
async def test_an_object_that_is_none(case, spoil) -> None:
    spoil(case)
    assert await case.unavailable() == "api_server_answer"


@pytest.mark.parametrize("fault", ["hang", "slow"])
async def test_a_slow_api_server_is_left_in_time(case, monkeypatch, fault) -> None:
    monkeypatch.setattr(module, "VERIFY_TIMEOUT", 0.2)
    case.kube.fault = fault
    started = time.monotonic()
    assert await case.unavailable() == "api_server_timeout"
    assert time.monotonic() - started < 20


async def test_one_that_is_not_there_not_known_or_does_not_know_us(case, tmp_path) -> None:
    account = case.kube.authority.directory
    (account / "token").write_text("another")
    assert await case.unavailable() == "api_server_denied"
    (account / "token").write_text("two\nlines")
    assert await case.unavailable() == "api_server_credentials"
    (account / "token").write_text(TOKEN)
    case.environ["KUBERNETES_SERVICE_HOST"] = "127.0.0.1"  # which its certificate does not bear
    assert await case.unavailable() == "api_server_untrusted"
    case.environ["KUBERNETES_SERVICE_HOST"] = "localhost"
    asked = len(case.kube.requests)
    (account / "ca.crt").write_bytes(FakeAuthority(tmp_path / "other").path.read_bytes())
    assert await case.unavailable() == "api_server_untrusted"
    case.environ["KUBERNETES_SERVICE_PORT"] = "1"
    assert await case.unavailable() == "api_server_unreachable"
    case.environ.clear()
    assert await case.unavailable() == "api_server_credentials"
    assert len(case.kube.requests) == asked


# --- a kubeconfig


async def test_a_kubeconfig_instead_of_the_servers_own_pod(case, tmp_path) -> None:
    case.environ.clear()
    path = tmp_path / "kubeconfig"
    path.write_text(
        "apiVersion: v1\nkind: Config\ncurrent-context: here\n"
        "contexts:\n- name: here\n  context: {cluster: c, user: u}\n"
        f"clusters:\n- name: c\n  cluster:\n    server: https://localhost:{case.kube.port}\n"
        "    certificate-authority: account/ca.crt\n"
        f"users:\n- name: u\n  user:\n    token: {TOKEN}\n"
    )
    assert (await case.node_of(kube_config_file=path)).path == f"/k8s_psat/demo/{NODE_UID}"
    path.write_text(path.read_text().replace(f"token: {TOKEN}", "exec: {command: aws}"))
    with pytest.raises(Unavailable, match="kubeconfig") as raised:
        await case.node_of(kube_config_file=path)
    assert raised.value.reason == "api_server_credentials" and "exec" in raised.value.hint
    assert await case.unavailable(kube_config_file=tmp_path / "missing") == "api_server_credentials"


# --- settings


@pytest.mark.parametrize(
    "table",
    [
        {},
        {"service_account_allow_list": []},
        {"service_account_allow_list": ["agent"]},
        {"service_account_allow_list": ["a:b:c"]},
        {"service_account_allow_list": ["*:*"]},
        {"service_account_allow_list": ["a:b"], "audience": []},
        {"service_account_allow_list": ["a:b"], "audience": [""]},
        {"service_account_allow_list": ["a:b"], "allowed_node_label_keys": ["a:b"]},
        {"service_account_allow_list": ["a:b"], "typo": 1},
    ],
)
def test_settings_that_are_refused(table) -> None:
    with pytest.raises(ValidationError):
        PsatClusterSettings(**table)


def test_names_of_clusters() -> None:
    for name in ("", "a/b", "..", ".", "a b", "a\n"):
        with pytest.raises(ValidationError):
            PsatSettings(cluster=name)
        with pytest.raises(ValidationError):
            PsatServerSettings(clusters={name: {"service_account_allow_list": ["a:b"]}})
    with pytest.raises(ValidationError):
        PsatServerSettings(clusters={})
