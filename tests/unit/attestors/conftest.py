"""The caller whom attestors describe: this very process, in whatever place a test says."""

import os
from collections.abc import Iterator

import pytest

from broker.attestation.process import Process


@pytest.fixture
def me() -> Iterator[Process]:
    pidfd = os.pidfd_open(os.getpid())
    process = Process.open(pid=os.getpid(), uid=os.geteuid(), gid=os.getegid(), pidfd=pidfd)
    os.close(pidfd)
    yield process
    process.close()
