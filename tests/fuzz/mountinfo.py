"""``/proc/self/mountinfo``, and an operator's own patterns: read, or refused in our own words."""

import os

from tests.fuzz import engine

with engine.instrumented(__name__):
    from broker.attestation.cgroups import parse_cgroup_mounts, parse_matcher
    from broker.attestation.contract import AttestorFailed

SEEDS = (
    b"1 0 0:2 / / rw - ext4 /dev/root rw\n",
    b"30 1 0:68 / /local rw,relatime - tmpfs  rw,size=8192k\n",
    b"31 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:3 master:4 - cgroup cgroup rw,cpu,cpuacct\n",
    b"32 30 0:30 /x /odd\\040place\\134 rw - cgroup2 cgroup2 rw,nsdelegate\n",
    b"33 30 0:31 / /home/a\\040-\\040cgroup rw - ext4 x - cgroup rw\n",
    b"/my.slice/*/<id>",
    b"/docker/<id>/*",
)


def target(data: bytes) -> None:
    """Read it as mounts, and as a pattern."""
    try:
        for mount in parse_cgroup_mounts(data):
            assert os.makedev(*mount.device) >= 0
    except AttestorFailed as refused:
        if refused.reason != "cgroup_unreadable":
            raise
    try:
        pattern = parse_matcher(data.decode("utf-8")).pattern  # an operator's, so from TOML: text
    except ValueError:
        return
    assert pattern.fullmatch("/" + "a/" * 60 + "b" * 64) is None or b"<id>" in data


if __name__ == "__main__":
    # Without the hook for patterns: atheris guesses wrongly at those that the input itself has made.
    engine.run("mountinfo", target, [*SEEDS, *engine.recorded("mountinfo")], hooks=("str",))
