"""``/proc/<pid>/cgroup``: whatever stands there, one container in its place, or none, or a refusal of our own kind."""

import re
from contextlib import suppress

from tests.fuzz import engine

with engine.instrumented(__name__):
    from broker.attestation.cgroups import find_places, is_within, parse_cgroups, parse_matcher
    from broker.attestation.contract import AttestorFailed

A, B = "0123456789abcdef" * 4, "fedcba9876543210" * 4
WORD = re.compile("(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")  # an id has so many digits, not more
POD = "00000000-1111-2222-3333-444444444444"
MATCHERS = (parse_matcher("/my.slice/*/<id>"),)
SEEDS = (
    b"",
    b"0::/\n",
    f"0::/system.slice/docker-{A}.scope\n".encode(),
    f"0::/../{A}/init.scope\n".encode(),
    f"0::/my.slice/x/{A}\n".encode(),
    f"12:cpu,cpuacct:/docker/{A}\n1:name=systemd:/docker/{A}\n0::/\n".encode(),
    f"0::/kubepods.slice/kubepods-pod{POD.replace('-', '_')}.slice/cri-containerd-{A}.scope\n".encode(),
    f"3:pids:/kubepods/burstable/pod{POD}/{A}\n".encode(),
    f"0::/user.slice/user-7.slice/user@7.service/user.slice/libpod-{A}.scope/container\n".encode(),
    f"0::/machine.slice/machine-libpod_pod_{B}.slice/libpod-{A}.scope\n".encode(),
    f"0::/machine.slice/libpod-conmon-{A}.scope\n".encode(),
    f"0::/docker/{A}/docker/{B}\n".encode(),
)


def target(data: bytes) -> None:
    """Read the lines, and look for a container in them."""
    try:
        places = find_places(parse_cgroups(data), MATCHERS)
    except AttestorFailed as refused:
        if refused.reason not in {
            "cgroup_unreadable",
            "container_ambiguous",
            "container_not_anchored",
            "cgroup_namespace",
        }:
            raise
        return
    assert len({(place.id, place.runtime, place.user, place.pod_uid) for place in places}) <= 1
    for place in places:
        last = place.home.rpartition("/")[2]
        assert WORD.findall(last) == [place.id]
        assert is_within(place.cgroup.path, place.home)
        assert not WORD.search(place.cgroup.path[len(place.home) :])
        assert place.home.startswith(("/user.slice/", "/../")) or place.user is None
        # The whole path, said by another line too, is the same container; said of another one, it is none.
        with suppress(AttestorFailed):
            both = find_places(parse_cgroups(data + f"99:other:/docker/{B}\n".encode()), MATCHERS)
            assert {one.id for one in both} == {place.id} == {B}


if __name__ == "__main__":
    engine.run("cgroups", target, [*SEEDS, *engine.recorded("cgroup")])
