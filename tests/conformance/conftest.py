"""One house for the whole package: a real server, a real node agent, and this process as a workload of it."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance import house as houses
from tests.conformance.house import House


@pytest.fixture(scope="session")
def house() -> Iterator[House]:
    # Short: a Unix socket's path has at most 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="broker", dir="/tmp"))
    try:
        with houses.running(directory) as one:
            yield one
    finally:
        shutil.rmtree(directory)
