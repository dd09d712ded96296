"""Short directories for sockets, and things that end with their test."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def short(tmp_path: Path) -> Iterator[Path]:
    """A 0700 directory whose path leaves room for a socket's name."""
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    yield directory
    shutil.rmtree(directory)
