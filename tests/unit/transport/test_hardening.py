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


SETTLING = """
import gc, json, weakref
from broker.transport.hardening import settle
class Node: pass
def ring():
    node = Node()
    node.itself = node
    return weakref.ref(node)
before = len(gc.get_objects())
settle()
later = ring()
gc.collect()
print(json.dumps([before, gc.get_freeze_count(), len(gc.get_objects()), later() is None]))
"""


def test_what_is_there_is_looked_at_no_more_and_what_comes_later_is() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SETTLING], capture_output=True, check=True, cwd=Path(__file__).resolve().parents[3]
    )
    before, frozen, looked_at, is_collected = json.loads(done.stdout)
    assert frozen >= before
    assert looked_at < before / 10
    assert is_collected
