"""What the k8s attestor says of a pod's container, against a kubelet that answers well, badly, late or for another."""

import asyncio
import logging
import os
import time
from pathlib import Path

import pytest
from pydantic import ValidationError

from attestors.workload import k8s as module
from attestors.workload.k8s import K8sAttestor, K8sSettings
from broker.attestation.contract import AttestorFailed
from broker.attestation.kubernetes import Surroundings
from broker.attestation.process import Process
from broker.errors import Misconfigured
from tests.fakes.kubelet import TOKEN, FakeAuthority, FakeKubernetes, pod, status
from tests.fakes.runtime import FakeMachine

ID, OTHER = "0123456789abcdef" * 4, "fedcba9876543210" * 4
UID, OTHER_UID = "11111111-2222-3333-4444-555555555555", "99999999-2222-3333-4444-555555555555"
PLACE = f"/kubepods.slice/kubepods-pod{UID.replace('-', '_')}.slice/cri-containerd-{ID}.scope"
IMAGE, DIGEST = "registry.example/main:1", f"registry.example/main@sha256:{'a' * 64}"
OF_POD = {
    "k8s:ns:shop", "k8s:sa:orders", "k8s:node-name:node-1", f"k8s:pod-uid:{UID}", "k8s:pod-name:orders-5d9f",
    "k8s:pod-label:app:orders", "k8s:pod-label:tier:backend", "k8s:pod-owner:ReplicaSet:orders",
    "k8s:pod-owner-uid:ReplicaSet:owner-1", f"k8s:pod-image:{IMAGE}", f"k8s:pod-image:{DIGEST}",
    "k8s:pod-image-count:1", "k8s:pod-init-image-count:0",
}  # fmt: skip
OF_CONTAINER = {"k8s:container-name:main", f"k8s:container-image:{IMAGE}", f"k8s:container-image:{DIGEST}"}


@pytest.fixture
def kube(tmp_path):
    with FakeKubernetes(tmp_path / "account") as fake:
        fake.pods = [pod(UID, ID)]
        yield fake


class Case:
    """One attestor, one caller in one place, one kubelet."""

    def __init__(self, kube: FakeKubernetes, top: Path, me: Process) -> None:
        self.kube, self.me = kube, me
        self.machine = FakeMachine(top)
        top.mkdir()
        self.environ = {"KUBERNETES_SERVICE_HOST": "localhost", "KUBERNETES_SERVICE_PORT": str(kube.port)}

    def attestor(self, **settings: object) -> K8sAttestor:
        given = {"kubelet_secure_port": self.kube.port, "node_name": "localhost", "poll_retry_interval": "20ms"}
        given = {name: value for name, value in (given | settings).items() if value is not None}
        here = Surroundings(self.environ, self.kube.authority.directory)
        return K8sAttestor(K8sSettings(**given), self.machine.node(), here)

    def process(self, place: str = PLACE) -> Process:
        return self.machine.put(self.me, place)

    async def selectors(self, place: str = PLACE, **settings: object) -> set[str]:
        return {str(one) for one in await self.attestor(**settings).attest(self.process(place))}

    async def refusal(self, place: str = PLACE, **settings: object) -> str:
        with pytest.raises(AttestorFailed) as refused:
            await self.selectors(place, **{"max_poll_attempts": 2, **settings})
        told = f"{refused.value} {refused.value.hint} {refused.value!r} {refused.value.__cause__!r}"
        assert TOKEN not in told
        return refused.value.reason


@pytest.fixture
def case(kube, tmp_path, me) -> Case:
    return Case(kube, tmp_path / "cgroup", me)


# --- selectors


async def test_selectors_are_spires(case) -> None:
    assert await case.selectors() == OF_POD | OF_CONTAINER
    assert case.kube.requests == ["/pods"]


async def test_an_init_container_while_it_runs(case) -> None:
    init = {**status(ID, "migrate"), "name": "migrate"}
    case.kube.pods = [pod(UID, OTHER, initContainerStatuses=[init])]
    found = await case.selectors()
    assert {"k8s:container-name:migrate", "k8s:pod-init-image-count:1"} <= found
    assert {"k8s:pod-init-image:registry.example/migrate:1", "k8s:container-image:registry.example/migrate:1"} <= found


async def test_labels_of_the_namespace_on_request(case) -> None:
    case.kube.things["/api/v1/namespaces/shop"] = {
        "kind": "Namespace",
        "metadata": {"name": "shop", "uid": "n", "labels": {"team": "a:b"}},
    }
    assert await case.selectors(enable_namespace_labels=True) == OF_POD | OF_CONTAINER | {"k8s:ns-label:team:a:b"}
    case.kube.things["/api/v1/namespaces/shop"]["metadata"]["name"] = "other"
    assert await case.refusal(enable_namespace_labels=True) == "api_server_answer"
    del case.kube.things["/api/v1/namespaces/shop"]
    assert await case.refusal(enable_namespace_labels=True) == "api_server_answer"
    case.environ.clear()
    with pytest.raises(Misconfigured):
        case.attestor(enable_namespace_labels=True)


async def test_without_container_selectors_the_pod_is_enough(case) -> None:
    assert await case.selectors(disable_container_selectors=True) == OF_POD
    case.kube.pods = [pod(UID, "", containerStatuses=[status("", state="waiting")])]
    found = await case.selectors(disable_container_selectors=True)
    assert {"k8s:ns:shop", f"k8s:pod-uid:{UID}"} <= found and not [one for one in found if "container" in one]
    case.kube.pods = [pod(UID, "", containerStatuses=[status(ID, state="waiting")])]
    assert await case.selectors(disable_container_selectors=True) == found
    case.kube.pods = []
    assert await case.refusal(disable_container_selectors=True) == "pod_not_listed"


@pytest.mark.bears("A17")
async def test_no_two_labels_are_one_selector(case) -> None:
    case.kube.pods[0]["metadata"]["labels"] = {"a": "b:c", "a:b": "c", "": "x", "e": "", "n": "x\ny", "z": "x" * 5000}
    labels = {one for one in await case.selectors() if ":pod-label:" in one}
    assert labels == {"k8s:pod-label:a:b:c", "k8s:pod-label:e:"}


async def test_a_static_pod_has_the_kubelets_own_uid(case) -> None:
    uid = "0123456789abcdef0123456789abcdef"
    case.kube.pods = [pod(uid, ID)]
    found = await case.selectors(f"/kubepods/burstable/pod{uid}/{ID}")
    assert f"k8s:pod-uid:{uid}" in found


async def test_a_cri_container_whose_path_names_no_pod(case) -> None:
    for place in (f"/system.slice/crio-{ID}.scope", f"/k8s.io/{ID}", f"/system.slice/cri-containerd-{ID}.scope"):
        assert await case.selectors(place) == OF_POD | OF_CONTAINER
        assert await case.refusal(place.replace(ID, OTHER)) == "pod_not_listed"


# --- whose processes


async def test_a_process_in_no_pod_costs_no_question(case) -> None:
    uid = os.geteuid()
    places = (
        "/",
        "/user.slice/user-1000.slice/session-1.scope",
        f"/system.slice/docker-{ID}.scope",
        f"/machine.slice/libpod-{ID}.scope",
        f"/default/{ID}",
        # A user's own service manager can make any name.
        f"/user.slice/user-{uid}.slice/user@{uid}.service/kubepods.slice/kubepods-podx.slice/docker-{ID}.scope",
    )
    for place in places:
        assert await case.selectors(place) == set()
    assert case.kube.requests == []


@pytest.mark.bears("A15")
async def test_a_place_that_is_not_the_runtimes(case) -> None:
    process = case.process()
    (case.machine.top / PLACE[1:]).chmod(0o777)
    with pytest.raises(AttestorFailed) as refused:
        await case.attestor().attest(process)
    assert refused.value.reason == "container_not_anchored"
    assert await case.refusal(f"{PLACE}/docker-{OTHER}.scope") == "container_ambiguous"
    assert case.kube.requests == []


@pytest.mark.bears("A15")
async def test_another_pods_uid_refuses(case) -> None:
    case.kube.pods = [pod(OTHER_UID, ID), pod(UID, OTHER)]
    assert await case.refusal() == "pod_mismatch"
    assert await case.refusal(disable_container_selectors=True) == "pod_mismatch"


async def test_a_container_listed_twice_refuses(case) -> None:
    case.kube.pods = [pod(UID, ID), pod(OTHER_UID, ID)]
    assert await case.refusal() == "container_ambiguous"
    case.kube.pods = [pod(UID, ID, initContainerStatuses=[status(ID, "again")])]
    assert await case.refusal() == "container_ambiguous"
    case.kube.pods = [pod(UID, ID), pod(UID, OTHER)]
    assert await case.refusal() == "kubelet_answer"


async def test_a_debug_container_is_not_the_workload(case) -> None:
    case.kube.pods = [pod(UID, OTHER, ephemeralContainerStatuses=[status(ID, "debugger")])]
    assert await case.refusal() == "container_ephemeral"


# --- a kubelet that lags


@pytest.mark.parametrize(
    ("pods", "code"),
    [
        ([], "pod_not_listed"),
        ([pod(OTHER_UID, OTHER)], "pod_not_listed"),
        ([pod(UID, OTHER)], "container_not_listed"),
        ([pod(UID, "", containerStatuses=None)], "container_not_listed"),
        ([pod(UID, "", containerStatuses=[status(ID, state="terminated")])], "container_not_running"),
    ],
)
async def test_what_the_kubelet_does_not_show_is_refused_with_a_code(case, pods, code) -> None:
    case.kube.pods = pods
    assert await case.refusal(max_poll_attempts=3) == code
    assert case.kube.requests == ["/pods"] * 3


async def test_it_waits_for_the_kubelet_to_catch_up(case) -> None:
    case.kube.pods = []

    def catch_up(path: str) -> None:
        if len(case.kube.requests) == 3:
            case.kube.pods = [pod(UID, ID)]

    case.kube.asked = catch_up
    assert await case.selectors() == OF_POD | OF_CONTAINER
    assert len(case.kube.requests) == 3


async def test_it_does_not_wait_beyond_the_agents_patience(case, monkeypatch) -> None:
    monkeypatch.setattr(module, "ATTEST_TIMEOUT", 1.0)
    case.kube.pods = []
    started = time.monotonic()
    assert await case.refusal(max_poll_attempts=1000, poll_retry_interval="400ms") == "pod_not_listed"
    assert time.monotonic() - started < 20


async def test_who_waits_is_bounded_by_container(case, monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 3)
    monkeypatch.setattr(module, "MAX_WAITING_PER_CONTAINER", 2)
    case.kube.pods = []
    attestor = case.attestor(poll_retry_interval="60s")
    monkeypatch.setattr(module, "ATTEST_TIMEOUT", 100.0)
    process, other = case.process(), case.process(PLACE.replace(ID, OTHER))
    waiting = [asyncio.create_task(attestor.attest(process)) for _ in range(4)]
    async with asyncio.timeout(30):
        while sum(task.done() for task in waiting) < 2:
            await asyncio.sleep(0.01)
    assert {task.exception().reason for task in waiting if task.done()} == {"pod_not_listed"}
    others = [asyncio.create_task(attestor.attest(other)) for _ in range(2)]
    async with asyncio.timeout(30):
        while sum(task.done() for task in others) < 1:
            await asyncio.sleep(0.01)
    for task in (*waiting, *others):
        task.cancel()
    await asyncio.gather(*waiting, *others, return_exceptions=True)
    assert not attestor._waiting


async def test_all_who_ask_at_one_time_share_one_list(case) -> None:
    attestor = case.attestor()
    found = await asyncio.gather(*(attestor.attest(case.process()) for _ in range(20)))
    assert len(set(found)) == 1 and case.kube.requests == ["/pods"]


async def test_one_who_gives_up_does_not_take_the_list_from_the_others(case) -> None:
    attestor = case.attestor()
    first, second = (asyncio.create_task(attestor.attest(case.process())) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    assert {str(one) for one in await second} == OF_POD | OF_CONTAINER
    assert first.cancelled() and case.kube.requests == ["/pods"]


async def test_a_list_is_soon_too_old(case, monkeypatch) -> None:
    monkeypatch.setattr(module, "LIST_AGE", 0.0)
    attestor = case.attestor()
    await attestor.attest(case.process())
    case.kube.pods[0]["metadata"]["labels"] = {}
    assert "k8s:pod-label:app:orders" not in {str(one) for one in await attestor.attest(case.process())}


# --- a kubelet that answers badly


@pytest.mark.bears("A16")
@pytest.mark.parametrize("fault", ["status", "redirect", "cut", "garbage", "duplicate", "not-http", "huge"])
async def test_an_answer_that_is_not_what_it_should_be(case, monkeypatch, fault: str) -> None:
    monkeypatch.setattr(module, "MAX_ANSWER", 3 << 20)
    case.kube.fault = fault
    assert await case.refusal() == "kubelet_answer"


@pytest.mark.bears("A16")
@pytest.mark.parametrize(
    "spoil",
    [
        lambda one: one["metadata"].update(uid=7),
        lambda one: one["metadata"].update(uid=""),
        lambda one: one["metadata"].update(namespace="../../pods"),
        lambda one: one["metadata"].update(labels={"a": None}),
        lambda one: one["metadata"].pop("name"),
        lambda one: one.update(status=[]),
        lambda one: one["status"].update(containerStatuses=[{"name": 1}]),
        lambda one: one["metadata"].update(name="\ud800"),
    ],
)
async def test_a_pod_that_is_none(case, spoil) -> None:
    spoil(case.kube.pods[0])
    assert await case.refusal() == "kubelet_answer"


@pytest.mark.bears("A16")
@pytest.mark.parametrize("fault", ["hang", "slow"])
async def test_a_slow_kubelet_refuses_in_time_and_only_pods(case, monkeypatch, fault: str) -> None:
    monkeypatch.setattr(module, "FETCH_TIMEOUT", 0.2)
    case.kube.fault = fault
    attestor = case.attestor()
    started = time.monotonic()
    with pytest.raises(AttestorFailed) as refused:
        await attestor.attest(case.process())
    assert refused.value.reason == "attestor_timeout" and time.monotonic() - started < 20
    assert await attestor.attest(case.process("/system.slice/sshd.service")) == frozenset()
    case.kube.fault = ""
    monkeypatch.setattr(module, "LIST_AGE", 0.0)
    monkeypatch.setattr(module, "FETCH_TIMEOUT", 5.0)
    assert {str(one) for one in await attestor.attest(case.process())} == OF_POD | OF_CONTAINER


async def test_nobody_listens(case) -> None:
    assert await case.refusal(kubelet_secure_port=1) == "kubelet_unreachable"


# --- who is asked, and as whom


async def test_another_ca_refuses_before_the_token_is_sent(case, tmp_path) -> None:
    other = FakeAuthority(tmp_path / "other")
    assert await case.refusal(kubelet_ca_path=other.path) == "kubelet_untrusted"
    assert case.kube.requests == []


async def test_the_certificate_must_bear_the_nodes_name(case) -> None:
    assert await case.refusal(node_name="127.0.0.1") == "kubelet_untrusted"
    # Over loopback, without a name, the authority alone counts, as in SPIRE.
    assert await case.selectors(node_name=None) == OF_POD | OF_CONTAINER
    case.environ["MY_NODE_NAME"] = "127.0.0.1"
    assert await case.refusal(node_name=None) == "kubelet_untrusted"
    case.environ["NODE"] = "localhost"
    assert await case.selectors(node_name=None, node_name_env="NODE") == OF_POD | OF_CONTAINER
    with pytest.raises(Misconfigured):
        case.attestor(node_name="a\r\nb")


async def test_verification_can_be_skipped_and_says_so(case, tmp_path, caplog) -> None:
    (case.kube.authority.directory / "ca.crt").unlink()
    assert await case.refusal() == "kubelet_credentials"
    with caplog.at_level(logging.WARNING):
        assert await case.selectors(skip_kubelet_verification=True) == OF_POD | OF_CONTAINER
    assert "skip_kubelet_verification" in caplog.text


async def test_the_token_is_read_for_each_question(case, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "LIST_AGE", 0.0)
    path = tmp_path / "renewed"
    attestor = case.attestor(token_path=path)
    for text, code in ((None, "kubelet_credentials"), ("old", "kubelet_denied"), ("a\nb", "kubelet_credentials")):
        if text is not None:
            path.write_text(text)
        with pytest.raises(AttestorFailed) as refused:
            await attestor.attest(case.process())
        assert refused.value.reason == code
    path.write_text(TOKEN)
    assert {str(one) for one in await attestor.attest(case.process())} == OF_POD | OF_CONTAINER


async def test_a_client_certificate_instead_of_a_token(case) -> None:
    certificate, key = case.kube.authority.leaf("agent", "agent")
    case.kube.want_certificate()
    assert await case.selectors(certificate_path=certificate, private_key_path=key) == OF_POD | OF_CONTAINER
    assert await case.refusal() in {"kubelet_unreachable", "kubelet_answer"}


async def test_nothing_is_sent_to_whom_wants_nothing(case) -> None:
    assert await case.refusal(use_anonymous_authentication=True) == "kubelet_denied"
    case.kube.token = None
    assert await case.selectors(use_anonymous_authentication=True) == OF_POD | OF_CONTAINER


async def test_the_read_only_port(tmp_path, me) -> None:
    with FakeKubernetes(tmp_path / "account", is_plain=True) as kube:
        kube.pods, kube.token = [pod(UID, ID)], None
        plain = {"kubelet_secure_port": None, "kubelet_read_only_port": kube.port, "node_name": "elsewhere.invalid"}
        assert await Case(kube, tmp_path / "cgroup", me).selectors(**plain) == OF_POD | OF_CONTAINER


@pytest.mark.parametrize(
    "settings",
    [
        {"kubelet_secure_port": 10250, "kubelet_read_only_port": 10255},
        {"certificate_path": "/x"},
        {"private_key_path": "/x"},
        {"use_anonymous_authentication": True, "token_path": "/x"},
        {"certificate_path": "/x", "private_key_path": "/x", "token_path": "/x"},
        {"poll_retry_interval": "0s"},
        {"poll_retry_interval": "500"},
        {"poll_retry_interval": "5s\n"},
        {"max_poll_attempts": 0},
        {"use_new_container_locator": False},
        {"kubelet_port": 1},
    ],
)
def test_settings_that_contradict_themselves(settings) -> None:
    with pytest.raises(ValidationError):
        K8sSettings(**settings)


def test_intervals() -> None:
    for text, seconds in (("500ms", 0.5), ("2s", 2.0), ("1500ms", 1.5)):
        assert K8sSettings(poll_retry_interval=text).interval == seconds
