"""Describes a process by its Unix user and groups, and, where switched on, by its executable file.

Selectors are SPIRE's: ``unix:uid unix:user unix:gid unix:group unix:supplementary_gid unix:supplementary_group``, and
with ``discover_workload_path`` also ``unix:path`` and ``unix:sha256``. Names are the agent's own user database. The text
of the link to the executable proves nothing (an unprivileged mount namespace forges it), so a path is given only when
the file of that name on this host is the running image itself.
"""

import asyncio
import grp
import hashlib
import os
import pwd
import stat
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from broker.attestation.contract import AttestorFailed, AttestorUnavailable, SelectorDoc, Strength
from broker.attestation.kernel import FileId, file_id
from broker.attestation.process import OVERFLOW_ID, Process, is_in_user_namespace
from broker.attestation.reads import Abandoned, BlockingReads
from broker.errors import Invalid
from broker.spiffe import Selector

NAME = "unix"
ATTEST_TIMEOUT = 5.0  # seconds: a hung file system or user database refuses its own users, and nobody else
MAX_DIGESTS = 1024  # remembered digests, some 200 bytes each
HASH_BLOCK = 1 << 20
_FROM_ROOT = -100  # AT_FDCWD; the paths looked up from it are absolute


class UnixSettings(BaseModel):
    """How much of the executable is looked at."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    discover_workload_path: bool = Field(
        default=False, description="Give unix:path and unix:sha256; the agent reads each caller's executable."
    )
    workload_size_limit: int = Field(
        default=0,
        description="Largest executable to hash, in bytes; a larger one refuses its caller. 0: no limit; below 0: never hash.",
    )


class FileState(NamedTuple):
    """What must be unchanged for a remembered digest to hold."""

    file: FileId
    size: int
    changed_ns: int


@dataclass(frozen=True, slots=True)
class _Account:
    """Names behind the numbers of one process."""

    user: str | None
    groups: dict[int, str]


class UnixAttestor:
    """See the module; ``UnixSettings`` are its settings."""

    name: ClassVar[str] = NAME
    settings: ClassVar[type[BaseModel]] = UnixSettings
    selectors: ClassVar[tuple[SelectorDoc, ...]] = (
        SelectorDoc("unix:uid:<number>", "the effective user id at connection", Strength.KERNEL),
        SelectorDoc("unix:user:<name>", "that user's name on this node", Strength.KERNEL),
        SelectorDoc("unix:gid:<number>", "the effective group id at connection", Strength.KERNEL),
        SelectorDoc("unix:group:<name>", "that group's name on this node", Strength.KERNEL),
        SelectorDoc("unix:supplementary_gid:<number>", "one of the supplementary group ids", Strength.KERNEL),
        SelectorDoc("unix:supplementary_group:<name>", "the name of one of them", Strength.KERNEL),
        SelectorDoc("unix:path:<path>", "the executable, where the host's file of that name is it", Strength.KERNEL),
        SelectorDoc("unix:sha256:<hex>", "the SHA-256 of the running executable's file", Strength.KERNEL),
    )

    def __init__(self, settings: UnixSettings) -> None:
        self._settings = settings
        self._reads = BlockingReads()
        self._digests: OrderedDict[FileState, str] = OrderedDict()

    async def attest(self, process: Process) -> frozenset[Selector]:
        """Give the selectors of user, groups and executable; raises ``AttestorFailed`` after five seconds."""
        try:
            async with asyncio.timeout(ATTEST_TIMEOUT):
                # A thread takes turns with the loop: who asks another process is to have asked before, and waits meanwhile.
                await asyncio.sleep(0)
                return await self._reads.run(process.uid, lambda stop: frozenset(self._selectors(process, stop)))
        except TimeoutError:
            raise AttestorUnavailable("the process could not be described in time", code="attestor_timeout") from None

    def _selectors(self, process: Process, abandoned: Abandoned) -> Iterator[Selector]:
        # NOTE(security): in a user namespace every group without a number there looks like this one; it is none of them.
        unknown = {OVERFLOW_ID} if is_in_user_namespace() else set()
        primary, supplementary = {process.gid} - unknown, process.facts.groups - unknown
        account = _account(process.uid, primary | supplementary)
        yield Selector.of(NAME, f"uid:{process.uid}")
        yield from _named("user", account.user)
        for group in primary:
            yield Selector.of(NAME, f"gid:{group}")
            yield from _named("group", account.groups.get(group))
        for group in supplementary:
            yield Selector.of(NAME, f"supplementary_gid:{group}")
            yield from _named("supplementary_group", account.groups.get(group))
        if self._settings.discover_workload_path:
            yield from _path(process)
            if self._settings.workload_size_limit >= 0:
                yield Selector.of(NAME, f"sha256:{self._digest(process, abandoned)}")

    def _digest(self, process: Process, abandoned: Abandoned) -> str:
        fd = process.open_file("exe")
        try:
            before = _state(fd)
            if before.file != process.facts.exe:
                raise AttestorFailed("the executable changed while it was looked at")
            limit = self._settings.workload_size_limit
            if 0 < limit < before.size:
                raise AttestorFailed("the executable is larger than workload_size_limit", code="executable_too_large")
            if (known := self._digests.get(before)) is not None:
                return known
            digest = _hash(fd, before.size, abandoned)
            if _state(fd) != before:
                raise AttestorFailed("the executable changed while it was hashed")
        except OSError as error:
            raise AttestorFailed("the executable cannot be read") from error
        finally:
            os.close(fd)
        self._digests[before] = digest
        while len(self._digests) > MAX_DIGESTS:
            self._digests.popitem(last=False)
        return digest


def _account(uid: int, gids: set[int]) -> _Account:
    """Look names up in this node's databases; a number without a name has no name selector."""
    try:
        user: str | None = pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        user = None
    groups: dict[int, str] = {}
    for gid in gids:
        with suppress(KeyError, OverflowError):
            groups[gid] = grp.getgrgid(gid).gr_name
    return _Account(user, groups)


def _named(kind: str, name: str | None) -> Iterator[Selector]:
    """A name that cannot be a selector's value (control characters, not UTF-8) gives none."""
    if name:
        with suppress(Invalid):
            yield Selector.of(NAME, f"{kind}:{name}")


def _path(process: Process) -> Iterator[Selector]:
    path = process.link("exe")
    if not path.startswith("/"):
        return
    try:
        named = file_id(_FROM_ROOT, path)
    except OSError:
        return
    # NOTE(security): the name counts only where this host's file of that name is the running image.
    if named == process.facts.exe:
        yield from _named("path", path)


def _state(fd: int) -> FileState:
    facts = os.fstat(fd)
    if not stat.S_ISREG(facts.st_mode):
        raise AttestorFailed("the executable is not a regular file")
    return FileState(FileId(facts.st_dev, facts.st_ino), facts.st_size, facts.st_ctime_ns)


def _hash(fd: int, size: int, abandoned: Abandoned) -> str:
    digest = hashlib.sha256()
    left = size
    while left > 0 and (block := os.read(fd, min(HASH_BLOCK, left))):
        if abandoned():
            raise AttestorUnavailable("the executable could not be hashed in time", code="attestor_timeout")
        digest.update(block)
        left -= len(block)
    return digest.hexdigest()
