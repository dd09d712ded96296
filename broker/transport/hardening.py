"""What a program of ours does to itself before it makes a key: no core dumps, no tracing by its own user."""

import ctypes
import resource
from typing import Final

from broker.errors import Misconfigured
from broker.transport.acceptor import raise_file_limit

_PR_SET_DUMPABLE: Final = 4  # prctl(2)


def harden() -> None:
    """Forbid core dumps and tracing, and raise the limit of open files. Call once, in the program's own process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise Misconfigured("the kernel does not let this process forbid core dumps", code="not_hardened")
    raise_file_limit()
