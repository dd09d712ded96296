"""Which container a control group's path names, and which paths name none or too many."""

import itertools
import json
import os
import re
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from broker.attestation.cgroups import (
    Cgroup,
    Place,
    Runtime,
    find_places,
    is_within,
    parse_cgroup_mounts,
    parse_cgroups,
    parse_matcher,
)
from broker.attestation.contract import AttestorFailed
from tests.fakes.kubelet import RECORDINGS, recorded_cgroup

A, B = "0123456789abcdef" * 4, "fedcba9876543210" * 4
POD = "00000000-1111-2222-3333-444444444444"
POD_ = POD.replace("-", "_")
KUBE = f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{POD_}.slice"
MINE = "/user.slice/user-1000.slice/user@1000.service"
VECTORS = os.environ.get("BROKER_VECTORS")

PLACES = [
    # path of the container's own control group, runtime, user, pod
    (f"/docker/{A}", Runtime.DOCKER, None, None),
    (f"/docker-{A}.scope", Runtime.DOCKER, None, None),
    (f"/system.slice/docker-{A}.scope", Runtime.DOCKER, None, None),
    (f"/some.slice/again-a_slice.slice/docker-{A}.scope", Runtime.DOCKER, None, None),
    (f"/ecs/8a7b6c5d4e3f2a1b8a7b6c5d4e3f2a1b/{A}", Runtime.DOCKER, None, None),
    (f"/ecs/cluster/8a7b6c5d4e3f2a1b8a7b6c5d4e3f2a1b/{A}", Runtime.DOCKER, None, None),
    (f"{KUBE}/docker-{A}.scope", Runtime.DOCKER, None, POD),
    (f"{KUBE}/cri-containerd-{A}.scope", Runtime.CONTAINERD, None, POD),
    (f"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod{POD_}.slice/cri-containerd-{A}.scope", Runtime.CONTAINERD, None, POD),
    (f"/system.slice/containerd.service/kubepods-burstable-pod{POD_}.slice:cri-containerd:{A}", Runtime.CONTAINERD, None, POD),
    (f"/kubepods-pod{POD_}.slice:cri-containerd:{A}", Runtime.CONTAINERD, None, POD),
    (f"{KUBE}/crio-{A}.scope", Runtime.CRIO, None, POD),
    (f"/kubepods/burstable/pod{POD}/crio-{A}", Runtime.CRIO, None, POD),
    (f"/kubepods/burstable/pod{POD}/{A}", None, None, POD),
    (f"/kubepods/pod{POD}/{A}", None, None, POD),
    (f"/kubelet/kubepods/besteffort/pod{POD}/{A}", None, None, POD),
    (f"/kubepods/kubepods/besteffort/pod{POD}/{A}", None, None, POD),
    (f"/default/{A}", Runtime.CONTAINERD, None, None),
    (f"/system.slice/nerdctl-{A}.scope", Runtime.CONTAINERD, None, None),
    (f"/machine.slice/libpod-{A}.scope", Runtime.PODMAN, None, None),
    (f"/machine.slice/machine-libpod_pod_{B}.slice/libpod-{A}.scope", Runtime.PODMAN, None, None),
    (f"/libpod_parent/libpod-{A}", Runtime.PODMAN, None, None),
    (f"/libpod_parent/{B}/libpod-{A}", Runtime.PODMAN, None, None),
    (f"/system.slice/web.service/libpod-payload-{A}", Runtime.PODMAN, None, None),
    (f"{MINE}/user.slice/libpod-{A}.scope", Runtime.PODMAN, 1000, None),
    (f"{MINE}/user.slice/user-libpod_pod_{B}.slice/libpod-{A}.scope", Runtime.PODMAN, 1000, None),
    (f"{MINE}/app.slice/web.service/libpod-payload-{A}", Runtime.PODMAN, 1000, None),
    (f"{MINE}/libpod-payload-{A}", Runtime.PODMAN, 1000, None),
    (f"{MINE}/web.service/libpod-payload-{A}", Runtime.PODMAN, 1000, None),
    (f"{MINE}/user.slice/docker-{A}.scope", Runtime.DOCKER, 1000, None),
]  # fmt: skip

NO_CONTAINER = [
    "/",
    "/not-a-match",
    "/system.slice/docker.service",
    "/user.slice/user-1000.slice/session-3.scope",
    f"/docker/{A[:-1]}",
    f"/docker/{A}0",
    f"/docker/{A.upper()}",
    "/docker/buildkit/abcdefghijklmnopqrstuvwxy",
    f"/machine.slice/libpod-conmon-{A}.scope",
    f"/system.slice/crio-conmon-{A}.scope",
    f"{MINE}/user.slice/libpod-conmon-{A}.scope",
]

NOT_ANCHORED = [
    f"/{A}",
    f"/x/{A}",
    f"/docker/{A} (deleted)",
    f"/Docker/{A}",
    f"/docker/x/{A}",
    f"/docker-{A}",
    f"/system.slice/docker-{A}.service",
    f"/system.slice/ssh.service/docker/{A}",
    f"/system.slice/ssh.service/docker-{A}.scope",
    f"/system.slice/evil-{A}.scope",
    f"/user.slice/user-1000.slice/session-3.scope/docker/{A}",
    f"{MINE}/docker/{A}",
    f"{MINE}/app.slice/docker-{A}.service",
    f"{MINE}/app.slice/run-1.scope/docker/{A}",
    f"{MINE}/app.slice/run-1.scope/system.slice/docker-{A}.scope",
    f"/user.slice/user-1000.slice/user@1001.service/user.slice/libpod-{A}.scope",
    f"{MINE}/libpod_parent/libpod-{A}",
    f"/lxc.payload.guest/docker/{A}",
    f"/x-{B}/libpod-conmon-{A}.scope",
]

TWO = [
    f"/docker/{A}/docker/{B}",
    f"/docker/{A}/docker/{A}",
    f"/docker/{A}/{B}",
    f"/docker/{A}/system.slice/docker-{B}.scope",
    f"/machine.slice/libpod-{A}.scope/libpod-conmon-{B}.scope",
    f"/a-{B}.slice/docker-{A}.scope",
    f"/ecs/{B}/{A}",
    f"/machine.slice/machine-libpod_pod_{B}.slice/libpod-{A}.scope/x-{A}",
]


def at(*paths: str) -> tuple[Place, ...]:
    return find_places([Cgroup(number, frozenset({f"c{number}"}), path) for number, path in enumerate(paths)])


def refusal(*paths: str) -> str:
    with pytest.raises(AttestorFailed) as refused:
        at(*paths)
    assert not any(path in refused.value.message for path in paths)
    return refused.value.reason


@pytest.mark.parametrize("below", ["", "/init.scope", "/container", "/system.slice/web.service"])
@pytest.mark.parametrize(("home", "runtime", "user", "pod"), PLACES)
def test_the_shapes_of_the_runtimes(
    home: str, runtime: Runtime | None, user: int | None, pod: str | None, below: str
) -> None:
    (place,) = at(home + below)
    assert (place.id, place.home, place.runtime, place.user, place.pod_uid) == (A, home, runtime, user, pod)


@pytest.mark.parametrize("path", NO_CONTAINER)
def test_no_container(path: str) -> None:
    assert at(path) == ()


@pytest.mark.bears("A15")
@pytest.mark.parametrize("path", NOT_ANCHORED)
def test_an_id_in_any_other_place_is_refused(path: str) -> None:
    assert refusal(path) == "container_not_anchored"


@pytest.mark.bears("A15")
@pytest.mark.parametrize("path", TWO)
def test_two_candidates_in_one_path_are_refused(path: str) -> None:
    assert refusal(path) == "container_ambiguous"


@pytest.mark.bears("A15")
@pytest.mark.parametrize(
    "paths",
    [
        (f"/docker/{A}", f"/docker/{B}"),
        (f"/docker/{A}", f"/system.slice/libpod-{A}.scope"),
        (f"/machine.slice/libpod-{A}.scope", f"{MINE}/user.slice/libpod-{A}.scope"),
        (f"/kubepods/pod{POD}/{A}", f"/kubepods/podx/{A}"),
    ],
)
def test_hierarchies_that_disagree_are_refused(paths: tuple[str, ...]) -> None:
    assert refusal(*paths) == "container_ambiguous"
    assert refusal(*reversed(paths)) == "container_ambiguous"


# What people saw on their nodes and reported to SPIRE, by the number of the issue; ids are ours.
REPORTED = [
    (949, f"11:blkio:{KUBE}/docker-{A}.scope\n", A, POD),
    (1081, f"12:pids:/docker/{B}/kubepods/besteffort/pod{POD}/{A}\n", "container_ambiguous", None),
    (1535, f"4:cpu:/kubepods/pod{POD}/{A}\n", A, POD),
    (1547, f"4:cpu:/kubepods/kubepods/besteffort/pod{POD}/{A}\n", A, POD),
    (1580, f"4:cpu:/kubepods-besteffort-pod{POD_}.slice:cri-containerd:{A}\n", A, POD),
    (2578, f"0::/../../pod{POD}/{A}\n", "cgroup_namespace", None),
    (2578, f"0::/../../../burstable/pod{POD}/{A}\n", "cgroup_namespace", None),
    (2578, "0::/../../../../../system.slice/containerd.service\n", None, None),
    (3183, f"5:pids:/system.slice/crio-{A}.scope\n1:name=systemd:/system.slice/crio-{A}.scope\n", A, None),
    (4004, "0::/\n", None, None),
    (4088, f"12:pids:/system.slice/crio-conmon-{A}.scope\n11:hugetlb:/\n0::/system.slice/crio.service\n", None, None),
    (7288, "0::/\n", None, None),
]


@pytest.mark.bears("A15")
@pytest.mark.parametrize(("issue", "text", "answer", "pod"), REPORTED)
def test_what_was_reported_to_spire(issue: int, text: str, answer: str | None, pod: str | None) -> None:
    if answer not in {None, A}:
        with pytest.raises(AttestorFailed) as refused:
            find_places(parse_cgroups(text.encode()))
        assert refused.value.reason == answer and refused.value.hint
        return
    places = find_places(parse_cgroups(text.encode()))
    assert {(place.id, place.pod_uid) for place in places} == ({(answer, pod)} if answer else set())


def test_hierarchies_without_an_id_have_no_say() -> None:
    assert [
        place.cgroup.hierarchy for place in at("/", f"/docker/{A}", "/system.slice/docker.service", f"/docker/{A}/x")
    ] == [1, 3]
    assert refusal(f"/docker/{A}", f"/x/{A}") == "container_not_anchored"


def test_from_within_a_control_group_namespace() -> None:
    (place,) = at(f"/../{A}/x")
    assert (place.id, place.home, place.runtime) == (A, f"/../{A}", None)
    (place,) = at(f"/../../system.slice/docker-{A}.scope")
    assert (place.id, place.home, place.runtime) == (A, f"/../../system.slice/docker-{A}.scope", Runtime.DOCKER)
    assert at("/..", "/../..", "/../x") == ()
    # Of the way from the top the last steps are seen alone: no runtime's shape is whole, and nobody's directory is seen.
    for path in (f"/../../pod{POD}/{A}", f"/../../../burstable/pod{POD}/{A}", f"/../x/{A}"):
        assert refusal(path) == "cgroup_namespace"
    assert at("/../../../../../init.scope", "/../../../../../system.slice/kubelet.service") == ()
    assert refusal(f"/..x/{A}") == "container_not_anchored"
    assert refusal(f"/docker/../{A}") == "container_not_anchored"


def test_an_operators_own_place() -> None:
    matchers = (parse_matcher("/my.d/*/<id>"), parse_matcher("/sub/<id>/*"))
    lines = [Cgroup(0, frozenset(), f"/my.d/x+y/{A}")]
    (place,) = find_places(lines, matchers)
    assert (place.id, place.home, place.runtime) == (A, f"/my.d/x+y/{A}", Runtime.DOCKER)
    (place,) = find_places([Cgroup(0, frozenset(), f"/sub/{A}/y")], matchers)
    assert place.home == f"/sub/{A}"
    for path in (f"/my-d/x/{A}", f"/my.d/x/y/{A}", f"/my.d/x/{A}/y", f"/sub/{A}", f"/a/my.d/x/{A}"):
        with pytest.raises(AttestorFailed):
            find_places([Cgroup(0, frozenset(), path)], matchers)
    pods = (parse_matcher("/libpod_parent/<id>/*"),)  # what Podman calls a pod there, this calls a container
    for path, own in ((f"/my.d/{B}/{A}", matchers), (f"/libpod_parent/{B}/libpod-{A}", pods)):
        with pytest.raises(AttestorFailed) as refused:
            find_places([Cgroup(0, frozenset(), path)], own)
        assert refused.value.reason == "container_ambiguous"


@pytest.mark.parametrize(
    "text", ["", "/", "/<id>", "docker/<id>", "/docker", "/docker/x<id>", "/a/<id>/<id>", "/a//<id>", "/../<id>", "/a*/<id>", "/a/<id>/", "x/docker/<id>", "/" + "a" * 600 + "/<id>"]
)  # fmt: skip
def test_a_pattern_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_matcher(text)


def test_lines_of_the_kernel() -> None:
    assert parse_cgroups(b"") == ()
    assert parse_cgroups(b"12:cpu,cpuacct:/a:b\n1:name=systemd:/\n0::/\xff \n") == (
        Cgroup(12, frozenset({"cpu", "cpuacct"}), "/a:b"),
        Cgroup(1, frozenset({"name=systemd"}), "/"),
        Cgroup(0, frozenset(), "/\udcff "),
    )


@pytest.mark.parametrize(
    "text", [b"0::/", b"\n", b"x::/\n", b"0:/\n", b"0::x\n", b"0::\n", b"-1::/\n", b"0::/\n0::/a\n", b"0::/" + b"a" * 4096 + b"\n", "\u0664::/\n".encode(), b"".join(b"%d::/\n" % number for number in range(5000))]
)  # fmt: skip
def test_lines_that_no_kernel_writes_are_refused(text: bytes) -> None:
    with pytest.raises(AttestorFailed) as refused:
        parse_cgroups(text)
    assert refused.value.reason == "cgroup_unreadable"


MOUNTS = (
    b"1 0 0:2 / / rw - ext4 /dev/root rw\n"
    b"30 1 0:68 / /local rw,relatime - tmpfs  rw,size=8192k\n"
    b"31 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:3 master:4 - cgroup cgroup rw,cpu,cpuacct\n"
    b"32 30 0:30 /x /odd\\040place\\134 rw - cgroup2 cgroup2 rw,nsdelegate\n"
    b"33 30 0:31 / /home/a\\040-\\040cgroup rw - ext4 x - cgroup rw\n"
    b"34 30 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n"
)


def test_mounts_of_the_kernel() -> None:
    cpu, unified, systemd = parse_cgroup_mounts(MOUNTS)
    assert (cpu.device, cpu.root, cpu.point, cpu.is_unified) == ((0, 29), "/", "/sys/fs/cgroup/cpu,cpuacct", False)
    assert (unified.device, unified.root, unified.point, unified.is_unified) == ((0, 30), "/x", "/odd place\\", True)
    assert cpu.holds(Cgroup(2, frozenset({"cpuacct", "cpu"}), "/a"))
    assert not cpu.holds(Cgroup(2, frozenset({"cpu", "memory"}), "/a"))
    assert not cpu.holds(Cgroup(0, frozenset(), "/a"))
    assert not unified.holds(Cgroup(0, frozenset(), "/x/a"))  # only a part of the hierarchy is seen
    assert systemd.holds(Cgroup(1, frozenset({"name=systemd"}), "/a"))
    assert not systemd.holds(Cgroup(1, frozenset({"systemd"}), "/a"))


@pytest.mark.parametrize(
    "line",
    [
        b"1 2 - cgroup",
        b"1 2 x:y / / rw - cgroup cgroup rw",
        b"1 2 0 / / rw - cgroup cgroup rw",
        b"1 2 0:1 / / rw - cgroup cgroup",
        b"1 2 -1:2 / / rw - cgroup cgroup rw",
        b"1 2 0:99999999 / / rw - cgroup cgroup rw",
        "1 2 \u0661:2 / / rw - cgroup cgroup rw".encode(),
    ],
)
def test_mounts_that_no_kernel_writes_are_refused(line: bytes) -> None:
    with pytest.raises(AttestorFailed):
        parse_cgroup_mounts(line)


def test_within_is_by_component() -> None:
    assert is_within("/a/b", "/a") and is_within("/a", "/a")
    assert not is_within("/ab", "/a") and not is_within("/", "/a")


def test_no_path_is_slow_to_read() -> None:
    pieces = (
        "/a.slice",
        "/kubepods-",
        "kubepods-pod",
        "/kubepods/",
        "/libpod_pod_",
        "/..",
        "/user@",
        "/docker-",
        "-pod",
    )
    tails = ("", f"/{A}", f"/docker-{A}.scope", f".slice:cri-containerd:{A}", f"/libpod-conmon-{A}")
    matchers = (parse_matcher("/*/*/*/*/<id>"),)
    for piece, tail in itertools.product(pieces, tails):
        path = f"/{piece * 4096}".replace("//", "/")[: 4096 - len(tail)] + tail
        began = time.thread_time()
        with suppress(AttestorFailed):
            find_places([Cgroup(number, frozenset({str(number)}), path) for number in range(16)], matchers)
        assert time.thread_time() - began < 20.0, path[:40]  # some 10 ms; a pattern that backtracks takes minutes


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for read in (parse_cgroups, parse_cgroup_mounts):
        with suppress(AttestorFailed):
            read(data)


COMPONENT = st.one_of(
    st.sampled_from(["docker", "system.slice", "kubepods", f"pod{POD}", "..", "user.slice", "user-1000.slice", "user@1000.service", A, B]),
    st.sampled_from(["docker-%s.scope", "libpod-%s.scope", "libpod-payload-%s", "machine-libpod_pod_%s.slice", "x.slice:cri-containerd:%s", "%s (deleted)", "%s\n"]).flatmap(
        lambda form: st.sampled_from([form % A, form % B])
    ),
    st.text(st.characters(exclude_characters="/\n"), min_size=1, max_size=8),
)  # fmt: skip


@settings(deadline=None)
@example([["docker", A], ["docker", B]])
@given(st.lists(st.lists(COMPONENT, max_size=6), max_size=4))
def test_whatever_is_found_is_one_id_in_its_place(paths: list[list[str]]) -> None:
    whole = ["/" + "/".join(path) for path in paths]
    places: tuple[Place, ...] = ()
    with suppress(AttestorFailed):
        places = at(*whole)
    assert len({(place.id, place.runtime, place.user) for place in places}) <= 1
    for place in places:
        last = place.home.rpartition("/")[2]
        assert place.id in last and len(re.findall("[0-9a-f]{64}", last)) == 1
        assert is_within(place.cgroup.path, place.home)
        assert not re.search("[0-9a-f]{64}", place.cgroup.path[len(place.home) :])
        assert ("user@" not in place.home) or place.user == 1000


# Where SPIRE once believed the caller's mounts and we never do: they are his to arrange (0018). SPIRE gave them up as well.
MOUNTS_ALONE = {
    "spire: docker/v1",
    "spire: docker/v2",
    "spire: docker/cgroup-mount-at-slash/v1",
    "spire: docker/cgroup-mount-at-slash/v2",
    "spire: docker/tmpfs-empty-source",
    "spire: docker/container-id-conflict",
    "spire: other/mountinfo-fallback",
}


def test_control_groups_of_a_real_kubelets_containers() -> None:
    recorded = sorted(path.stem for path in (RECORDINGS / "kubelet" / "cgroup").iterdir())
    assert len(recorded) == 17
    for name in recorded:
        cgroups = parse_cgroups(recorded_cgroup(name))
        places = find_places(cgroups)
        assert [place.cgroup for place in places] == list(cgroups) and len(cgroups) == 10
        (where,) = {(place.home, place.id, place.runtime, place.user, place.pod_uid) for place in places}
        home, container, *rest, pod = where
        classed = {"log": "", "crash": "/besteffort", "refused": "/besteffort", "report": "/besteffort"}.get(
            name.partition("-")[0], "/burstable"
        )
        assert home == f"/kubepods{classed}/pod{pod}/{container}" and rest == [None, None]


def _cases() -> list[dict]:
    return json.loads((Path(VECTORS) / "container_cases.json").read_text())["cases"]


@pytest.mark.skipif(not VECTORS, reason="BROKER_VECTORS names no folder of public vectors")
@pytest.mark.bears("A15")
def test_containers_that_others_recorded() -> None:
    cases = _cases()
    assert len(cases) >= 11 and {case["name"] for case in cases} >= MOUNTS_ALONE
    for case in cases:
        # All that the attestors read of a caller; the kernel ends each line.
        text = case["files"].get("cgroup", "").strip()
        places = find_places(parse_cgroups(f"{text}\n".encode() if text else b""))
        expected = case["expect"]["container_id"]
        wanted = None if case["name"] in MOUNTS_ALONE or expected is None else expected[:64]
        assert {place.id for place in places} == ({wanted} if wanted else set()), case["name"]


@pytest.mark.skipif(not VECTORS, reason="BROKER_VECTORS names no folder of public vectors")
def test_the_roots_of_recorded_mounts_have_our_shapes() -> None:
    # A mount's root is a path of the same form, written by a real runtime.
    for case in _cases():
        expected = case["expect"]["container_id"]
        roots = [one.root for one in parse_cgroup_mounts(case["files"]["mountinfo"].encode()) if one.root != "/"]
        if "cgroup" in case["files"]:
            continue
        if expected == "ERROR":
            assert refusal(*roots) == "container_ambiguous", case["name"]
        else:
            assert {place.id for place in at(*roots)} == ({expected} if expected else set()), case["name"]


@pytest.mark.skipif(not VECTORS, reason="BROKER_VECTORS names no folder of public vectors")
@pytest.mark.parametrize(
    "name", ["k8s/v1", "k8s/v2", "k8s/container-id-conflict", "k8s/no-cgroup-mount", "docker/v1", "docker/v2"]
)
def test_mounts_that_others_recorded(name: str) -> None:
    roots = [
        mount.root
        for mount in parse_cgroup_mounts((Path(VECTORS) / "spire-procfs" / name / "proc/123/mountinfo").read_bytes())
        if mount.root != "/"
    ]
    if "conflict" in name:
        assert refusal(*roots) == "container_ambiguous"
    elif "no-cgroup" in name:
        assert roots == []
    else:
        assert {place.id for place in at(*roots)} == {A}
