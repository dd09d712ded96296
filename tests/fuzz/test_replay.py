"""The fuzz targets without a fuzzer: every seed, and some thousand mutations that are the same in each run."""

import pytest

from tests.fuzz import cgroups, engine, mountinfo, pods, process

TARGETS = [
    pytest.param(cgroups.target, [*cgroups.SEEDS, *engine.recorded("cgroup")], 6000, id="cgroups"),
    pytest.param(mountinfo.target, [*mountinfo.SEEDS, *engine.recorded("mountinfo")], 6000, id="mountinfo"),
    pytest.param(process.target, list(process.SEEDS), 1500, id="process"),
    pytest.param(pods.target, list(pods.SEEDS), 1500, id="pods"),
]


@pytest.mark.bears("M06")
@pytest.mark.parametrize(("target", "seeds", "mutations"), TARGETS)
def test_seeds_and_their_mutations(target, seeds, mutations) -> None:
    engine.replay(target, seeds, mutations)


def test_a_target_that_breaks_its_rule_fails() -> None:
    def broken(data: bytes) -> None:
        assert b"\xff" not in data

    with pytest.raises(AssertionError):
        engine.replay(broken, [b"0::/\n"], 2000)
