"""Whole lists of pods as kubelets answer them: which selectors each process in them gets.

Three runtimes' made by hand to their shapes, and what a real kubelet said of one.
"""

import re

import pytest

from attestors.workload.k8s import K8sAttestor, K8sSettings
from broker.attestation.cgroups import parse_cgroups
from broker.attestation.contract import AttestorFailed
from broker.attestation.kubernetes import Surroundings
from broker.attestation.testing import check_selectors
from tests.fakes.kubelet import FakeKubernetes, recorded_cgroup, recording
from tests.fakes.runtime import FakeMachine

CHECKOUT, SHIPPER = "c7761e58-969f-4edd-a981-86641b2021e8", "f9c7af7e-bcbf-498b-af5f-37361d1b168b"
REPORT, LATE, AGAIN = (
    "5e8c9902-207a-4aeb-a120-430c585a445f",
    "089001a3-5679-433e-a3db-0ca350db9b9a",
    "b4c9e140-61c2-4d45-ab36-700e3b0da008",
)
BOUND, API, WEB = (
    "5e1cf428-78df-48fe-a7bf-a45b715b7832",
    "c6406461-4423-4b79-ae88-b3e5492ff5cc",
    "a864ed01-3d12-4c9c-a08c-18a4c1c8e871",
)
STATIC = "2053dbbf6ec7135c4e994d3464c478db"  # the hash of its file: the kubelet's uid for it
IDS = {
    "main": "7223315e8e57664ea7767761898ceb2812410c5a6b49ed0c8fa8462debadffc1",
    "proxy": "1be817391e27c1482515be295819aff595b3a1eacf581cbcb3772d31f008a1e1",
    "migrate": "b7b77d114a2af6a214c8de96cef14def3625928f5f8632d529dff52fed981bc6",
    "debugger": "04cc5eab32fd84bb9f72b0ee05103eb73911207e90a7742287dc12cfd3b27657",
    "shipper": "b2a6e9e16bec676a5b039122afc303a3f06652e1b32d90cb086d1cb974ff6ea7",
    "apiserver": "85f50cc0130175fdde49c432f98670f5ca40a1cb6c22a04dcf5e000cd945f5a0",
    "report": "b8d5e062a0e276e4af161568a589635ec883f706dda61deda582097744f2755f",
    "again": "b03100be75a7d913b8b17f3f2fe6dbc1f6e92b8d44e06a7c8da9eb536e554acd",
    "crio": "93b6df6d053f25fcbb78efcc8aa666c902d8a29e5889065a16d7c6b8b7cc45a9",
    "web": "a0a9b949e6d14d55418b33d7ae37ae9a0256cf3d1613f31939bec2186212ed09",
    "own": "47fe0b8d135de4dc78b45503fc5b5429034891b00894c7ca00bbcd3fc6bce541",
}


def systemd(uid: str, container: str, qos: str = "", runtime: str = "cri-containerd") -> str:
    """Where a kubelet with systemd's driver puts a container; guaranteed pods stand beside the two classes."""
    escaped = uid.replace("-", "_")
    classed = f"/kubepods-{qos}.slice/kubepods-{qos}-pod{escaped}.slice" if qos else f"/kubepods-pod{escaped}.slice"
    return f"/kubepods.slice{classed}/{runtime}-{container}.scope"


def cgroupfs(uid: str, container: str, qos: str = "") -> str:
    return f"/kubepods{f'/{qos}' if qos else ''}/pod{uid}/{container}"


OF_CHECKOUT = {
    "ns:shop",
    "sa:checkout",
    "node-name:worker-1",
    f"pod-uid:{CHECKOUT}",
    "pod-name:checkout-6c8d9f7b54-x2kqp",
    "pod-label:app.kubernetes.io/name:checkout",
    "pod-label:pod-template-hash:6c8d9f7b54",
    "pod-label:team:payments",
    "pod-owner:ReplicaSet:checkout-6c8d9f7b54",
    "pod-image-count:1",
    "pod-image:registry.example/shop/checkout:2.14.0",
    "pod-init-image-count:2",
    "pod-init-image:registry.example/shop/migrate:2.14.0",
    "pod-init-image:docker.io/library/envoy:v1.31",
}
DIGEST = re.compile(r"(.+)@sha256:[0-9a-f]{64}")


@pytest.fixture
def kube(tmp_path):
    with FakeKubernetes(tmp_path / "account") as fake:
        fake.things["/api/v1/namespaces/shop"] = {
            "kind": "Namespace",
            "apiVersion": "v1",
            "metadata": {
                "name": "shop",
                "uid": "0d7c9b0e-8f4e-4a5b-9a55-0c7e9d0f7f10",
                "resourceVersion": "402",
                "creationTimestamp": "2026-03-01T08:00:00Z",
                "labels": {"kubernetes.io/metadata.name": "shop", "tier": "gold"},
            },
            "spec": {"finalizers": ["kubernetes"]},
            "status": {"phase": "Active"},
        }
        yield fake


@pytest.fixture
def ask(kube, tmp_path, me):
    machine = FakeMachine(tmp_path / "cgroup")
    machine.top.mkdir()

    async def asked(name: str, place: str, **settings: object) -> set[str]:
        whole = recording(name)
        kube.pods = whole.pop("items")
        assert whole == {"kind": "PodList", "apiVersion": "v1", "metadata": {}}  # what the fake adds to its pods
        given = {"kubelet_secure_port": kube.port, "node_name": "localhost", "max_poll_attempts": 2}
        here = Surroundings(
            {"KUBERNETES_SERVICE_HOST": "localhost", "KUBERNETES_SERVICE_PORT": str(kube.port)},
            kube.authority.directory,
        )
        settings = given | {"poll_retry_interval": "20ms"} | settings
        attestor = K8sAttestor(K8sSettings(**settings), machine.node(), here)
        found = check_selectors(attestor, await attestor.attest(machine.put(me, place)))
        return {str(one).removeprefix("k8s:") for one in found}

    return asked


async def refusal(ask, *arguments: str) -> str:
    with pytest.raises(AttestorFailed) as refused:
        await ask(*arguments)
    return refused.value.reason


async def test_every_selector_of_spires(ask, kube) -> None:
    found = await ask("containerd", systemd(CHECKOUT, IDS["main"], "burstable"), enable_namespace_labels=True)
    of_container = {"container-name:main", "container-image:registry.example/shop/checkout:2.14.0"}
    of_namespace = {"ns-label:kubernetes.io/metadata.name:shop", "ns-label:tier:gold"}
    digests = {one for one in found if DIGEST.fullmatch(one)}
    owner_uid = {one for one in found if one.startswith("pod-owner-uid:ReplicaSet:")}
    assert found == OF_CHECKOUT | of_container | of_namespace | digests | owner_uid
    assert {DIGEST.fullmatch(one)[1] for one in digests} == {
        "container-image:registry.example/shop/checkout",
        "pod-image:registry.example/shop/checkout",
        "pod-init-image:registry.example/shop/migrate",
        "pod-init-image:docker.io/library/envoy",
    }
    assert len(owner_uid) == 1
    documented = {doc.form.removeprefix("k8s:").partition(":")[0] for doc in K8sAttestor.selectors}
    assert {one.partition(":")[0] for one in found} == documented
    assert kube.requests == ["/pods", "/api/v1/namespaces/shop"]


async def test_a_side_car_is_an_init_container_that_runs(ask) -> None:
    found = await ask("containerd", systemd(CHECKOUT, IDS["proxy"], "burstable"))
    assert {"container-name:proxy", "container-image:docker.io/library/envoy:v1.31"} <= found
    assert {one for one in found if not one.startswith(("container-", "pod-owner-uid"))} >= OF_CHECKOUT


@pytest.mark.parametrize(
    ("uid", "container", "qos", "code"),
    [
        (CHECKOUT, "migrate", "burstable", "container_not_running"),
        (CHECKOUT, "debugger", "burstable", "container_ephemeral"),
        (SHIPPER, "main", "", "pod_mismatch"),
        (REPORT, "report", "besteffort", "container_not_running"),
        (LATE, "late", "burstable", "container_not_listed"),
        (AGAIN, "again", "burstable", "container_not_running"),
        (BOUND, "bound", "besteffort", "container_not_listed"),
        (STATIC.replace("2", "3"), "gone", "burstable", "pod_not_listed"),
    ],
)
async def test_what_is_not_running_in_that_pod(ask, uid, container, qos, code) -> None:
    place = systemd(uid, IDS.get(container, "e" * 64), qos)
    assert await refusal(ask, "containerd", place) == code


async def test_a_guaranteed_pod_of_a_daemon_set(ask) -> None:
    found = await ask("containerd", systemd(SHIPPER, IDS["shipper"]))
    assert {"ns:kube-system", "sa:log-shipper", "container-name:shipper", "pod-owner:DaemonSet:log-shipper"} <= found


async def test_a_static_pod_has_no_owner_and_no_service_account(ask) -> None:
    found = await ask("containerd", systemd(STATIC, IDS["apiserver"], "burstable"))
    assert {one for one in found if not DIGEST.fullmatch(one)} == {
        "ns:kube-system",
        "node-name:worker-1",
        f"pod-uid:{STATIC}",
        "pod-name:kube-apiserver-worker-1",
        "pod-label:component:kube-apiserver",
        "pod-label:tier:control-plane",
        "pod-image-count:1",
        "pod-init-image-count:0",
        "pod-image:registry.k8s.io/kube-apiserver:v1.33.1",
        "container-image:registry.k8s.io/kube-apiserver:v1.33.1",
        "container-name:kube-apiserver",
    }


@pytest.mark.parametrize("below", ["", "/container"])  # crun puts the processes one deeper
async def test_cri_o(ask, below) -> None:
    found = await ask("crio", systemd(API, IDS["crio"], "burstable", "crio") + below)
    assert {"sa:api", "container-name:api", "container-image:registry.example/shop/api:9"} <= found
    assert f"pod-uid:{API}" in found


async def test_docker_and_an_image_that_no_registry_knows(ask) -> None:
    found = await ask("docker", cgroupfs(WEB, IDS["web"], "besteffort"))
    assert {"container-image:nginx:1.27", "pod-image:own:latest", "pod-image-count:2", "pod-label:run:web"} <= found
    images = {one for one in found if one.startswith("container-image:docker-pullable://nginx@sha256:")}
    assert len(images) == 1 and not [one for one in found if one.startswith("pod-owner")]
    own = await ask("docker", cgroupfs(WEB, IDS["own"], "besteffort"))
    assert [one for one in own if one.startswith("container-image:docker://sha256:")]


@pytest.mark.parametrize("name", ["containerd", "crio", "docker"])
async def test_a_process_of_the_host_is_in_none_of_them(ask, name) -> None:
    assert await ask(name, "/system.slice/kubelet.service") == set()


# --- a real kubelet's (tests/fakes/recordings/kubelet)

WEB_UID, ORDERS_UID = "f187c76cd7877af5eadd89b892e1d8c9", "f47f5825-cc35-47e6-b7ed-6491e78feb62"
ORDERS_IMAGE, PROXY_IMAGE = (
    ("registry.example/shop/orders:1.4.2", "registry.example/shop/orders@sha256:10a6b85058e87ec83d654eee4ab0940f5b497a34f6e6f4f71d8b7b52ac0f8bc9"),
    ("registry.example/shop/proxy:0.9", "registry.example/shop/proxy@sha256:4241095a8c89f6151819a4bfa8ae3522e5e5003b948d7cf483e242203066df40"),
)  # fmt: skip
# An image that was loaded from a file and has no digest of a registry: the runtime's own name for its content.
MIGRATE_IMAGE = (
    "registry.example/shop/migrate:1.4.2",
    "sha256:9ff6e7983f0db1020595163737cbc4c714789b6773a21b45fb3fbfec979f028a",
)
OF_BOTH = {
    "ns:shop",
    "node-name:worker-7",
    "pod-image-count:2",
    "pod-init-image-count:2",
    *(f"pod-image:{image}" for image in ORDERS_IMAGE),
    *(f"pod-init-image:{image}" for image in MIGRATE_IMAGE + PROXY_IMAGE),
}
OF_WEB = OF_BOTH | {
    f"pod-uid:{WEB_UID}",
    "pod-name:web-worker-7",
    "pod-label:app.kubernetes.io/name:web",
    "pod-label:tier:front",
}
OF_ORDERS = OF_BOTH | {
    f"pod-uid:{ORDERS_UID}",
    "pod-name:orders-5d9f7c6b8-k2x7q",
    "sa:orders",
    "pod-label:app.kubernetes.io/name:orders",
    "pod-label:pod-template-hash:5d9f7c6b8",
    "pod-label:tier:backend",
    "pod-owner:ReplicaSet:orders-5d9f7c6b8",
    "pod-owner-uid:ReplicaSet:4b4e4d0e-5d0b-4a44-93bb-5f1f3ab1c2d7",
    *(f"pod-image:{image}" for image in PROXY_IMAGE),
}


def in_container(name: str) -> str:
    """The place in which the kernel had that container's process, in all of its hierarchies."""
    (path,) = {one.path for one in parse_cgroups(recorded_cgroup(name))}
    return path


def container(name: str, images: tuple[str, ...]) -> set[str]:
    return {f"container-name:{name}", *(f"container-image:{image}" for image in images)}


@pytest.mark.parametrize(
    ("moment", "process", "of_pod", "name", "images"),
    [
        ("static-running", "web-main", OF_WEB, "main", ORDERS_IMAGE),
        ("static-running", "web-helper", OF_WEB, "helper", ORDERS_IMAGE),
        ("static-running", "web-proxy", OF_WEB, "proxy", PROXY_IMAGE),
        ("static-restarted", "web-helper-again", OF_WEB, "helper", ORDERS_IMAGE),
        ("bound-running", "orders-main", OF_ORDERS, "main", ORDERS_IMAGE),
        ("bound-running", "orders-helper", OF_ORDERS, "helper", PROXY_IMAGE),
        ("bound-running", "orders-proxy", OF_ORDERS, "proxy", PROXY_IMAGE),
        ("bound-debugged", "orders-helper-again", OF_ORDERS, "helper", PROXY_IMAGE),
        ("bound-terminating", "orders-main", OF_ORDERS, "main", ORDERS_IMAGE),  # it ends; it has not ended
    ],
)
async def test_processes_that_a_real_kubelet_ran(ask, moment, process, of_pod, name, images) -> None:
    assert await ask(f"kubelet/{moment}", in_container(process)) == of_pod | container(name, images)


@pytest.mark.parametrize("moment", ["static-running", "static-removed", "bound-waiting", "bound-ended"])
async def test_a_real_kubelets_static_pod_beside_an_api_server_and_without(ask, moment) -> None:
    found = await ask(f"kubelet/{moment}", in_container("log-shipper"))
    assert {one for one in found if "image" not in one} == {
        "ns:kube-system",
        "node-name:worker-7",
        "pod-uid:26e12ccd32e23e1596f46e6b4b0f600a",
        "pod-name:log-shipper-worker-7",
        "pod-label:component:log-shipper",
        "container-name:shipper",
    }


async def test_older_kubelets_repeat_the_service_account_of_a_static_pods_file(ask) -> None:
    assert {"ns:batch", "sa:admin"} <= await ask("kubelet/static-account", in_container("refused"))


@pytest.mark.parametrize(
    ("moment", "process", "code"),
    [
        ("static-waiting", "web-migrate", "container_not_listed"),
        ("static-waiting", "web-main", "container_not_listed"),
        ("static-running", "web-migrate", "container_not_running"),
        ("static-running", "web-sandbox", "container_not_listed"),
        ("static-running", "crash", "container_not_running"),
        ("static-running", "orders-main", "pod_not_listed"),
        ("static-restarted", "web-helper", "container_not_listed"),
        ("static-removed", "web-main", "pod_not_listed"),
        ("bound-waiting", "orders-main", "container_not_listed"),
        ("bound-running", "report", "container_not_running"),
        ("bound-running", "orders-sandbox", "container_not_listed"),
        ("bound-debugged", "orders-debugger", "container_ephemeral"),
        ("bound-debugged", "orders-helper", "container_not_listed"),
        ("bound-terminating", "orders-debugger", "container_ephemeral"),
        ("bound-ended", "orders-main", "container_not_running"),
    ],
)
async def test_processes_that_a_real_kubelet_does_not_call_running(ask, moment, process, code) -> None:
    assert await refusal(ask, f"kubelet/{moment}", in_container(process)) == code
