"""The name of this replica: it stands beside the authorities whose keys it holds.

Kept in the data directory, so that a restarted server knows its own, and knows at once which of them are lost. The file is
locked for the life of the process: two servers over one data directory would each retire the other's authorities.
"""

import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from broker.errors import Misconfigured

FILE_NAME: Final = "replica"
_NAME: Final = re.compile(r"[0-9a-f]{32}")


@contextmanager
def replica_name(directory: Path) -> Iterator[str]:
    """Give the name for as long as the block lasts, making one where there is none; raises Misconfigured."""
    path = directory / FILE_NAME
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Misconfigured(f"{path}: {error.strerror}", code="data_dir_unusable", hint="set data_dir") from None
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise Misconfigured(f"{path} is another user's", code="data_dir_unusable", hint="set data_dir")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Misconfigured(
                f"another server uses {directory}", code="data_dir_in_use", hint="give each server its own data_dir"
            ) from None
        yield _read(descriptor) or _write(descriptor)
    finally:
        os.close(descriptor)


def _read(descriptor: int) -> str:
    text = os.pread(descriptor, 64, 0).decode("ascii", "replace").strip()
    return text if _NAME.fullmatch(text) else ""


def _write(descriptor: int) -> str:
    # A name that cannot be read is lost: the authorities under it are retired when its lease ends.
    name = secrets.token_hex(16)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, name.encode(), 0)
    os.fsync(descriptor)
    return name
