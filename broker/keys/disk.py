"""Keys that outlive the process: one PKCS#8 file per key (PEM, 0600) in a directory that is the server's alone.

A file appears whole or not at all (written aside, flushed, renamed, the directory flushed). What is unsafe, unreadable or
not ours refuses the start: guessing would make a key of an attacker's file, or lose one of ours. Files change in a thread: a
disk may take seconds, and the event loop serves everybody.
"""

import asyncio
import contextlib
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, final

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from broker.errors import Conflict, Misconfigured, NotFound, Unavailable
from broker.keys.local import LocalSigner, generated
from broker.keys.signer import KeyName, Signer

SUFFIX: Final = ".pem"
ASIDE: Final = ".new-"
"""What a file is called while it is written; one that is found at the start was never finished."""
MAX_FILE: Final = 4096
"""Bytes; a P-256 key in PKCS#8 has some 240."""
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")


@final
class DiskKeys:
    """The key manager whose keys lie in a directory."""

    __slots__ = ("_coming", "_directory", "_files", "_signers")

    def __init__(self, directory: Path) -> None:
        """Make the directory (0700) where there is none, and read every key; raises Misconfigured."""
        self._directory = directory
        with self._refusing():
            directory.mkdir(mode=0o700, exist_ok=True)
            with self._opened() as folder:
                names = sorted(os.listdir(folder))  # noqa: PTH208 - of what was opened, not of the path
                for name in (one for one in names if one.startswith(ASIDE)):
                    os.unlink(name, dir_fd=folder)
                found = [self._read(folder, name) for name in names if name.endswith(SUFFIX)]
        self._signers = {signer.id: signer for signer in found}
        self._coming: set[str] = set()
        self._files = ThreadPoolExecutor(
            1, thread_name_prefix="keys"
        )  # one thread: files change in the order of the calls

    async def generate(self, name: str | KeyName) -> Signer:
        """Make a P-256 key under a new name, on the disk when this returns; raises Conflict, Unavailable."""
        signer = generated(name)
        if _NAME.fullmatch(signer.id) is None:
            raise ValueError(signer.id)
        if signer.id in self._signers or signer.id in self._coming:
            raise Conflict(f"there is a key {signer.id!r} already", code="key_exists")
        self._coming.add(signer.id)
        try:
            await self._in_turn(lambda: self._store(signer))
        except asyncio.CancelledError:
            # Nobody gets it: its file goes when it has come, and never takes away that of a later key.
            self._files.submit(self._unlink, signer.id)
            raise
        except OSError as error:
            raise Unavailable(
                f"the key cannot be kept in {self._directory}: {error.strerror}",
                code="keys_not_written",
                hint="is the disk full or read-only?",
            ) from None
        finally:
            self._coming.discard(signer.id)
        self._signers[signer.id] = signer
        return signer

    def signer(self, key_id: str) -> Signer:
        """Find a key; ``NotFound`` when it is not held here."""
        try:
            return self._signers[key_id]
        except KeyError:
            raise NotFound(f"no key {key_id!r} is held here", code="key_not_found") from None

    def ids(self) -> Iterable[str]:
        """Name every key that is held here."""
        return tuple(self._signers)

    async def remove(self, key_id: str) -> None:
        """Forget a key at once, then its file; a name that is not held is no error. Raises Unavailable when the file stays."""
        if self._signers.pop(key_id, None) is None:
            return
        try:
            # The file goes also if nobody waits for it any more.
            await asyncio.shield(self._in_turn(lambda: self._unlink(key_id)))
        except OSError as error:
            raise Unavailable(f"a key cannot be removed: {error.strerror}", code="keys_not_written") from None

    def _in_turn(self, change: Callable[[], None]) -> asyncio.Future[None]:
        return asyncio.get_running_loop().run_in_executor(self._files, change)

    def _store(self, signer: LocalSigner) -> None:
        with self._opened() as folder:
            signer.keep(lambda text: _write(folder, signer.id + SUFFIX, text))

    def _unlink(self, key_id: str) -> None:
        with self._opened() as folder:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(key_id + SUFFIX, dir_fd=folder)
            os.fsync(folder)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        # NOTE(security): everything is done relative to what was opened and judged, never by the path again.
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        folder = os.open(self._directory, flags)
        try:
            _require_own(os.fstat(folder), self._directory)
            yield folder
        finally:
            os.close(folder)

    def _read(self, folder: int, name: str) -> LocalSigner:
        path = self._directory / name
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with os.fdopen(os.open(name, flags, dir_fd=folder), "rb") as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise Misconfigured(f"{path} is not a file", code="keys_unsafe", hint="remove it")
            _require_own(facts, path)
            text = file.read(MAX_FILE + 1)
        key_id = name.removesuffix(SUFFIX)
        try:
            key = load_pem_private_key(text, password=None)
        except (ValueError, TypeError):
            # ``from None``: the text of the error may quote the file.
            raise _damaged(path) from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
            raise _damaged(path)
        if _NAME.fullmatch(key_id) is None or len(text) > MAX_FILE:
            raise _damaged(path)
        return LocalSigner(key_id, key)

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise Misconfigured(
                f"the keys in {self._directory} cannot be read: {error.strerror}",
                code="keys_unavailable",
                hint="the server's user must own that directory and all in it",
            ) from None

    def __repr__(self) -> str:
        return f"DiskKeys({len(self._signers)} keys, <secret>)"


def _write(folder: int, name: str, text: bytes) -> None:
    aside = ASIDE + secrets.token_hex(8)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(aside, flags, 0o600, dir_fd=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), 0o600)  # whatever the umask says
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.rename(aside, name, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)
    except OSError:
        for left in (aside, name):
            with contextlib.suppress(OSError):
                os.unlink(left, dir_fd=folder)
        raise


def _require_own(facts: os.stat_result, path: Path) -> None:
    if facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
        raise Misconfigured(
            f"{path} is not this user's alone",
            code="keys_unsafe",
            hint="whoever could read it may have the keys: remove them, and taint and revoke the authorities",
        )


def _damaged(path: Path) -> Misconfigured:
    return Misconfigured(
        f"{path} does not hold a P-256 key",
        code="key_damaged",
        hint="restore it from a backup, or remove it: the server then makes a new authority",
    )
