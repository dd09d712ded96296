"""A task's token and the certificate that it is bound to, as files for a command that knows neither broker nor SPIFFE.

Token, certificate and key belong together, so they change together: each set is a directory of its own, and the link
``current`` moves from one to the next. Directories 0700, files 0600, in memory where there is such a place. Asks nobody.
"""

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509 import load_der_x509_certificate

from broker.attestation.launches import start_time_of
from broker.sdk.workload import Identity
from broker.spiffe import Bundle

FILES: Final[Mapping[str, str]] = {
    "BROKER_TASK_TOKEN_FILE": "token",
    "BROKER_SVID_FILE": "svid.pem",
    "BROKER_SVID_KEY_FILE": "svid.key",
    "BROKER_BUNDLE_FILE": "bundle.pem",
}
"""Variable of the command's environment, and the file whose path it holds."""

KEPT_SETS: Final = 2
"""The newest, and the one before: who has looked up the link a moment ago still finds its files."""

_DIRECTORY: Final = re.compile(r"broker-task-([1-9][0-9]{0,9})-([0-9]{1,20})-[a-z0-9_]{8}")


class TaskFiles:
    """The files of one task, removed with the block."""

    def __init__(self, parent: Path) -> None:
        """``parent`` is where the directory is made; what ended commands of this user left there is removed."""
        _sweep(parent)
        own = os.getpid()
        self.directory = Path(tempfile.mkdtemp(prefix=f"broker-task-{own}-{start_time_of(own)}-", dir=parent))
        self._number = 0

    def __enter__(self) -> Self:
        """Nothing is written yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove everything."""
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def environment(self) -> Mapping[str, str]:
        """What the command is told: where the files are, never what is in them."""
        return {variable: str(self.directory / "current" / name) for variable, name in FILES.items()}

    def write(self, token: str, identity: Identity, bundle: Bundle) -> None:
        """Put a new set in place of the old one: a reader of the link finds the one or the other. Raises OSError."""
        self._number += 1
        made = self.directory / str(self._number)
        made.mkdir(mode=0o700)
        for name, content in _contents(token, identity, bundle).items():
            fd = os.open(made / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(content)
        beside = self.directory / "next"
        beside.symlink_to(made.name)
        beside.replace(self.directory / "current")
        shutil.rmtree(self.directory / str(self._number - KEPT_SETS), ignore_errors=True)

    def withdraw(self) -> None:
        """Remove what was written, of which nothing may be used any more; what is written next is found as before."""
        (self.directory / "current").unlink(missing_ok=True)
        for number in range(max(self._number - KEPT_SETS, 0), self._number + 1):
            shutil.rmtree(self.directory / str(number), ignore_errors=True)


def place(environ: Mapping[str, str]) -> tuple[Path, bool]:
    """Choose where the directory is made, and say whether that is in memory."""
    session = environ.get("XDG_RUNTIME_DIR", "")
    with suppress(OSError):
        if session.startswith("/") and os.stat(session).st_uid == os.geteuid():  # noqa: PTH116 - as below
            return Path(session), True
    shared = Path("/dev/shm")  # noqa: S108 - mkdtemp makes our own directory there
    if shared.is_dir() and os.access(shared, os.W_OK | os.X_OK):
        return shared, True
    return Path(tempfile.gettempdir()), False


def _contents(token: str, identity: Identity, bundle: Bundle) -> Mapping[str, bytes]:
    chain = [load_der_x509_certificate(one) for one in identity.tls.chain_der]
    return {
        "token": token.encode("ascii"),
        "svid.pem": b"".join(one.public_bytes(Encoding.PEM) for one in chain),
        "svid.key": identity.tls.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        "bundle.pem": b"".join(one.public_bytes(Encoding.PEM) for one in bundle.x509_authorities),
    }


def _sweep(parent: Path) -> None:
    """A command that was killed could remove nothing."""
    with suppress(OSError):
        for entry in os.scandir(parent):
            match = _DIRECTORY.fullmatch(entry.name)
            if match is None:
                continue
            pid, start_time = map(int, match.groups())
            with suppress(OSError):
                facts = entry.stat(follow_symlinks=False)
                ours = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid()
                if ours and start_time_of(pid) != start_time:
                    shutil.rmtree(entry.path, ignore_errors=True)
