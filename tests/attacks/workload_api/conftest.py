"""One agent for a module's attacks, each of which must leave it as it was."""

from collections.abc import Iterator

import pytest

from tests.attacks.workload_api.rig import Bystander, Rig, rig


@pytest.fixture(scope="module")
def agent() -> Iterator[Rig]:
    with rig() as one:
        yield one
        said = one.said()
        assert "Traceback" not in said, said
        assert "defect" not in said, said


@pytest.fixture(scope="module")
def bystander(agent: Rig) -> Iterator[Bystander]:
    one = Bystander(agent.socket)
    yield one
    one.close()
