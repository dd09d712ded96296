"""The registration of a launched process: what the launcher writes before its program runs, and the attestor reads.

One small file for each process, ``<pid>-<start_time>.json``, in a directory of the agent's alone. A file counts by who may have
written it: both are looked at through their descriptors. Knows neither how programs are launched nor selectors.
"""

import os
import re
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from broker.attestation.kernel import FileId
from broker.errors import Invalid, Misconfigured
from broker.spiffe.strictjson import loads

VERSION: Final = 1
MAX_LAUNCH: Final = 4096  # bytes of one registration; ours have some 400
DEFAULT_DIRECTORY: Final = Path("/run/broker/agent/private/launches")
NAME: Final = re.compile("[a-z0-9_-]{1,64}")
FILE_NAME: Final = re.compile(r"([1-9][0-9]{0,9})-([0-9]{1,20})\.json")
UNSAFE: Final = "launches_unsafe"

_START_TIME: Final = 19  # field 22 of /proc/<pid>/stat, counted behind the last ')'
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO
_Number = Annotated[int, Field(ge=0, lt=2**64)]
_Id = Annotated[int, Field(ge=0, lt=2**32 - 1)]


class Exe(BaseModel):
    """The executable, whatever its name."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)

    device: _Number
    inode: _Number


class Launch(BaseModel):
    """What was launched, and as which process."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)

    version: int = Field(default=VERSION, ge=VERSION, le=VERSION)
    boot_id: str = Field(pattern="^[0-9a-f-]{36}$")
    pid_namespace: str = Field(pattern=r"^pid:\[[0-9]{1,20}\]$")
    """In which ``pid`` is a number, as the kernel names it."""
    pid: int = Field(ge=1, lt=2**31)
    start_time: _Number
    """Clock ticks since boot."""
    name: str = Field(pattern="^[a-z0-9_-]{1,64}$")
    exe: Exe
    uid: _Id
    gid: _Id
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Of the code: the script, or the executable where there is no script."""
    size: _Number

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """Read a registration; raises ``Invalid`` when it is not one."""
        try:
            return cls.model_validate(loads(text, max_bytes=MAX_LAUNCH, max_depth=2))
        except ValidationError:
            raise Invalid("the registration is not what the launcher writes", code="launch_malformed") from None

    def serialise(self) -> bytes:
        """Write it."""
        return f"{self.model_dump_json()}\n".encode("ascii")

    @property
    def file_id(self) -> FileId:
        """The executable as the kernel's facts have it."""
        return FileId(self.exe.device, self.exe.inode)

    @property
    def file_name(self) -> str:
        """Where it is kept."""
        return file_name(self.pid, self.start_time)


def file_name(pid: int, start_time: int) -> str:
    """Give the name of the file in which a process's registration is kept."""
    return f"{pid}-{start_time}.json"


def open_directory(path: Path, owners: Collection[int], *, within: int | None = None) -> int:
    """Open the directory of registrations, whose last name is looked up in ``within`` where that is given; the caller closes it.

    Raises ``FileNotFoundError``, and ``Misconfigured`` where it is not one of ``owners`` (uids) alone.
    """
    try:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(path if within is None else path.name, flags, dir_fd=within)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Misconfigured(f"{path} cannot be opened: {error.strerror}", code=UNSAFE) from None
    facts = os.fstat(fd)
    if facts.st_uid not in owners or facts.st_mode & _OTHERS:
        os.close(fd)
        raise Misconfigured(
            f"{path} is not a directory of the agent alone",
            code=UNSAFE,
            hint=f"chmod 0700 {path}, and let root or the agent's user own it",
        )
    return fd


def read_launch(directory: int, name: str, owners: Collection[int]) -> Launch | None:
    """Read one registration; ``None``: there is none.

    Raises ``Misconfigured`` where others may have written it, ``Invalid`` where it is malformed.
    """
    try:
        # Without waiting: whatever lies in its place must not hold up anybody.
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY, dir_fd=directory)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Misconfigured(f"the registration {name} cannot be opened: {error.strerror}", code=UNSAFE) from None
    try:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid not in owners or facts.st_mode & _OTHERS:
            raise Misconfigured(f"the registration {name} is not a file of the agent alone", code=UNSAFE)
        text = os.read(fd, MAX_LAUNCH + 1)
    except OSError as error:
        raise Misconfigured(f"the registration {name} cannot be read: {error.strerror}", code=UNSAFE) from None
    finally:
        os.close(fd)
    launch = Launch.parse(text)
    if launch.file_name != name:
        raise Invalid(f"the registration {name} is another process's", code="launch_malformed")
    return launch


def start_time_of(pid: int) -> int | None:
    """Give when the process started, in clock ticks since boot; ``None``: there is no such process to be seen."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - a kernel file
            # NOTE(security): a process may name itself ") S 1 (": the numbers stand behind the last parenthesis.
            return int(file.read().rpartition(b")")[2].split()[_START_TIME])
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None


def boot_id() -> str:
    """Give the kernel's name for this run of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()


def pid_namespace() -> str:
    """Give the kernel's name for the namespace in which our process numbers hold."""
    return os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - a kernel file, opened by its fixed name
