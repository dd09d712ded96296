"""Whose directories a container's control groups are, and whether the runtime's process lives in them."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from broker.attestation.containers import Container, Node, locate, require_member, require_owned
from broker.attestation.contract import AttestorFailed
from tests.fakes.runtime import FakeMachine

ID, OTHER = "0123456789abcdef" * 4, "fedcba9876543210" * 4
SCOPE = f"/system.slice/docker-{ID}.scope"


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    made = FakeMachine(tmp_path / "cgroup")
    made.top.mkdir()
    return made


def found(path: str) -> Container:
    container = locate(f"0::{path}\n".encode())
    assert container is not None
    return container


def reason(work) -> str:
    with pytest.raises(AttestorFailed) as refused:
        work()
    return refused.value.reason


def test_a_process_in_no_container() -> None:
    assert locate(b"4:memory:/jobs/17\n0::/user.slice\n") is None


def test_hybrid_and_version_1() -> None:
    container = locate(
        f"9:name=systemd:/docker/{ID}\n4:memory:/docker/{ID}\n2:misc:/\n0::/system.slice/docker.service\n".encode()
    )
    assert container.id == ID
    assert [place.cgroup.hierarchy for place in container.places] == [9, 4]


@pytest.mark.bears("A15")
def test_two_containers_are_refused() -> None:
    assert reason(lambda: locate(f"4:memory:/docker/{ID}\n0::/docker/{OTHER}\n".encode())) == "container_ambiguous"


def test_directories_of_root(machine) -> None:
    machine.make(f"{SCOPE}/init.scope")
    require_owned(found(SCOPE), machine.node())
    require_owned(found(f"{SCOPE}/init.scope"), machine.node())


@pytest.mark.bears("A15")
def test_directories_of_somebody_else(machine) -> None:
    machine.make(SCOPE)
    assert reason(lambda: require_owned(found(SCOPE), machine.node(root=os.geteuid() + 1))) == "container_not_anchored"


@pytest.mark.bears("A15")
@pytest.mark.parametrize("open_to_all", ["", "/system.slice", SCOPE, f"{SCOPE}/sub"])
def test_a_directory_that_others_may_write(machine, open_to_all: str) -> None:
    machine.make(f"{SCOPE}/sub")
    (machine.top / open_to_all.lstrip("/")).chmod(0o775)
    assert reason(lambda: require_owned(found(f"{SCOPE}/sub"), machine.node())) == "container_not_anchored"


@pytest.mark.bears("A15")
@pytest.mark.parametrize("name", ["cgroup.procs", "cgroup.threads", "tasks"])
def test_a_membership_that_others_may_write(machine, name: str) -> None:
    membership = machine.make(SCOPE) / name
    membership.touch(0o644)
    require_owned(found(SCOPE), machine.node())
    membership.chmod(0o666)
    assert reason(lambda: require_owned(found(SCOPE), machine.node())) == "container_not_anchored"


@pytest.mark.root("directories of another user")
@pytest.mark.bears("A15")
@pytest.mark.parametrize("given", ["/system.slice", SCOPE, f"{SCOPE}/cgroup.procs"])
def test_one_part_that_belongs_to_a_user(machine, given: str) -> None:
    (machine.make(SCOPE) / "cgroup.procs").touch(0o644)
    os.chown(machine.top / given[1:], 4002, 4002)
    assert reason(lambda: require_owned(found(SCOPE), machine.node())) == "container_not_anchored"


@pytest.mark.root("directories of another user")
def test_a_rootless_container_may_be_its_users_own(machine) -> None:
    path = f"/user.slice/user-4002.slice/user@4002.service/user.slice/libpod-{ID}.scope"
    directory = machine.make(path)
    os.chown(directory, 4002, 4002)
    require_owned(found(path), machine.node())
    os.chown(directory, 4003, 4003)
    assert reason(lambda: require_owned(found(path), machine.node())) == "container_not_anchored"


def test_a_link_is_not_followed(machine) -> None:
    machine.make(f"/real/docker-{ID}.scope")
    (machine.top / "system.slice").symlink_to(machine.top / "real")
    assert reason(lambda: require_owned(found(SCOPE), machine.node())) == "cgroup_unreadable"


@pytest.mark.root("mounts")
def test_another_file_system_on_the_path(machine) -> None:
    machine.make(SCOPE)
    over = machine.top / "system.slice"
    if (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(over)], capture_output=True, check=False
        ).returncode
        != 0
    ):
        pytest.skip("mounts are not allowed here")
    try:
        machine.make(SCOPE)
        assert reason(lambda: require_owned(found(SCOPE), machine.node())) == "container_not_anchored"
    finally:
        subprocess.run(["umount", str(over)], check=True)


def test_a_control_group_that_is_gone(machine) -> None:
    assert reason(lambda: require_owned(found(SCOPE), machine.node())) == "cgroup_unreadable"


@pytest.mark.parametrize(
    "mountinfo",
    [
        b"",
        b"31 22 0:1 / /nowhere rw - cgroup2 cgroup2 rw\n",
        b"31 22 0:4095 / /tmp rw - cgroup2 cgroup2 rw\n",  # another file system lies over it
        b"31 22 0:1 / /tmp rw - cgroup cgroup rw,memory\n",
    ],
    ids=["none", "missing", "covered", "version 1"],
)
def test_a_hierarchy_that_is_not_mounted_here(machine, mountinfo: bytes) -> None:
    machine.make(SCOPE)
    node = replace(machine.node(), mountinfo=lambda: mountinfo)
    assert reason(lambda: require_owned(found(SCOPE), node)) == "cgroup_unreadable"


def test_a_part_of_a_hierarchy_is_not_enough(machine) -> None:
    machine.make(SCOPE)
    part = machine.mountinfo().replace(f" / {machine.top} ".encode(), f" /system.slice {machine.top} ".encode())
    assert part != machine.mountinfo()
    assert (
        reason(lambda: require_owned(found(SCOPE), replace(machine.node(), mountinfo=lambda: part)))
        == "cgroup_unreadable"
    )


def test_a_second_mount_serves_where_the_first_is_covered(machine) -> None:
    machine.make(SCOPE)
    covered = b"30 22 0:4095 / /tmp rw - cgroup2 cgroup2 rw\n"
    require_owned(found(SCOPE), replace(machine.node(), mountinfo=lambda: covered + machine.mountinfo()))


def test_an_agent_in_a_control_group_namespace_says_so(machine) -> None:
    with pytest.raises(AttestorFailed) as refused:
        require_owned(found(f"/../{ID}"), machine.node())
    assert refused.value.reason == "cgroup_namespace"
    assert "--cgroupns=host" in refused.value.hint


def member(container: Container, text: str) -> None:
    require_member(container, 7, Node(cgroup_of=lambda pid: text.encode()))


@pytest.mark.bears("A15")
def test_the_runtimes_process_lives_there_too() -> None:
    container = found(f"{SCOPE}/system.slice/web.service")
    member(container, f"0::{SCOPE}\n")
    member(container, f"0::{SCOPE}/init.scope\n")
    for elsewhere in (
        f"/docker/{ID}",
        "/system.slice",
        "/",
        f"{SCOPE}x",
        f"/x{SCOPE}",
        f"/system.slice/docker-{OTHER}.scope",
        f"/user.slice{SCOPE}",
    ):
        assert reason(lambda path=elsewhere: member(container, f"0::{path}\n")) == "container_mismatch"
    assert reason(lambda: member(container, "")) == "container_mismatch"
    assert reason(lambda: member(container, f"4:memory:{SCOPE}\n")) == "container_mismatch"
    assert reason(lambda: member(container, "nonsense")) == "cgroup_unreadable"


@pytest.mark.bears("A15")
def test_every_hierarchy_that_names_the_container_counts() -> None:
    container = locate(f"4:memory:/docker/{ID}\n0::/docker/{ID}/a\n".encode())
    member(container, f"4:memory:/docker/{ID}\n3:cpu:/\n0::/docker/{ID}\n")
    assert reason(lambda: member(container, f"4:memory:/docker/{ID}\n0::/\n")) == "container_mismatch"


def test_a_runtimes_process_that_is_gone(machine) -> None:
    assert reason(lambda: require_member(found(SCOPE), 7, machine.node())) == "container_mismatch"


def test_this_machine_can_be_asked() -> None:
    node = Node()
    assert b" / " in node.mountinfo()
    assert b":/" in node.cgroup_of(os.getpid())
    assert reason(lambda: require_member(found(SCOPE), os.getpid(), node)) == "container_mismatch"


MOUNTS = """
import subprocess, sys
from broker.attestation.containers import OwnMounts
asked = OwnMounts()
first = asked()
assert asked() is first, "read again, though nothing has changed"
for _ in range(2):
    subprocess.run(["mount", "-t", "tmpfs", "here", sys.argv[1]], check=True)
    assert asked().count(b" - tmpfs here ") == first.count(b" - tmpfs here ") + 1
    assert asked() is asked()
    subprocess.run(["umount", sys.argv[1]], check=True)
    assert asked() == first
"""


def test_own_mounts_are_read_again_when_they_change(tmp_path: Path) -> None:
    apart = ["unshare", "-Urm"]
    if (probe := subprocess.run([*apart, "true"], capture_output=True, check=False)).returncode:
        pytest.skip(f"no user namespaces here: {probe.stderr.decode().strip()}")
    subprocess.run([*apart, sys.executable, "-c", MOUNTS, str(tmp_path)], check=True)
