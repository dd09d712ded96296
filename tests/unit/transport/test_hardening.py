"""Hardening changes a whole process, so it is seen in one of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import ctypes, json, resource
from broker.transport.hardening import harden
harden()
print(json.dumps([ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), *resource.getrlimit(resource.RLIMIT_CORE), *resource.getrlimit(resource.RLIMIT_NOFILE)]))
"""


@pytest.mark.bears("A25")
def test_no_dumps_and_all_the_files_there_may_be() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, check=True, cwd=Path(__file__).resolve().parents[3]
    )
    dumpable, soft_core, hard_core, soft_files, hard_files = json.loads(done.stdout)
    assert (dumpable, soft_core, hard_core) == (0, 0, 0)
    assert soft_files == hard_files
