"""What a program of ours does to itself before it makes a key: no core dumps, no tracing by its own user.

Nor does a burst of a hostile caller stay in its memory, or gRPC's core write to its log whatever a caller makes it say.
"""

import ctypes
import gc
import os
import resource
from typing import Final

from broker.errors import Misconfigured
from broker.transport.acceptor import raise_file_limit

_PR_SET_DUMPABLE: Final = 4  # prctl(2)
_M_TRIM_THRESHOLD, _M_ARENA_MAX = -1, -8  # mallopt(3)
ARENAS: Final = (
    1  # gRPC's threads would each keep one, full of holes: an HPACK bomb left 4 MiB behind, and the next 4 more
)
TRIM: Final = 1024 * 1024  # bytes free at the end of the heap that go back to the system


def harden() -> None:
    """Forbid core dumps and tracing, raise the limit of open files, give freed memory back.

    Call it once, in the program's own process, before there are threads.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise Misconfigured("the kernel does not let this process forbid core dumps", code="not_hardened")
    raise_file_limit()
    if hasattr(libc, "mallopt"):  # glibc's
        libc.mallopt(_M_ARENA_MAX, ARENAS)
        libc.mallopt(_M_TRIM_THRESHOLD, TRIM)


def settle() -> None:
    """Have the collector of garbage leave alone what is there: a program that has started keeps nearly all of it until it ends.

    A full round looks at everything else, and meanwhile nobody is answered: 30 to 70 ms for what a program has when it starts.
    """
    gc.freeze()


def silence_grpc() -> None:
    """Have gRPC's core write nothing: it has a line for every malformed header that somebody sends it, without a limit.

    Call it before gRPC is imported, which reads the environment then. An operator's own GRPC_VERBOSITY holds.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
