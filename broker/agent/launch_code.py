"""What a command line would run, read once and held fast: the code whose digest is taken is the code that runs.

A script is copied into sealed memory, and so is its interpreter: a process of this launch has an executable like no other
process's, not even like that of another script under the same interpreter. Any other program is hashed and run through one
descriptor. Whatever cannot be told for certain is refused. Starts nothing.
"""

import os
import re
import shutil
import stat
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Final

from broker.attestation.kernel import FileId
from broker.attestation.sealed import TooLarge, digest, executable_memory, fill, seal
from broker.errors import Invalid, Misconfigured, Refused

MAX_SEALED: Final = (
    64 << 20
)  # bytes, held in memory while it runs: a large interpreter has 30 MiB, a bundle of modules less
MAX_EXECUTABLE: Final = 1 << 30  # bytes, read once at the start: the largest programs have some 500 MiB
SCRIPT_FD: Final = 3
"""The script's descriptor in the launched process: an interpreter opens it by this number."""

_SCRIPT_PATH: Final = f"/proc/self/fd/{SCRIPT_FD}"
_PYTHON: Final = re.compile(r"python[0-9.]*[td]?(?:-dbg)?")
_SHELL: Final = re.compile(r"sh|dash|bash")
_OTHER: Final = re.compile(
    r"(?:node|nodejs|deno|bun|ruby|perl|php|lua|luajit|java|pypy|zsh|ksh|fish|[gm]?awk|tclsh|Rscript|busybox|env)[0-9.]*"
    r"|ld[.-].*so.*"
)
"""Programs that run other files, in ways that are not known here: their own digest would pass for those files'."""
_FLAGS: Final = re.compile(r"-[bBdEIOPqsSuv]+")
_JOINED: Final = re.compile(r"-[XW].+", re.DOTALL)
_WITH_VALUE: Final = frozenset({"-X", "-W", "--check-hash-based-pycs"})
_SHEBANG: Final = re.compile(rb"#![ \t]*([^ \t\r\n]+)[ \t]*([^\r\n]*)")
_MAX_SHEBANG: Final = 256  # bytes, as the kernel reads them (BINPRM_BUF_SIZE)
_READABLE, _EXECUTE_ONLY = 0o555, 0o111


@dataclass(frozen=True, slots=True)
class Code:
    """A program ready to run; the descriptors are the holder's."""

    image: int
    """What the kernel is to execute."""
    script: int | None
    """What goes to ``SCRIPT_FD``; ``None``: the image is the code."""
    arguments: tuple[str, ...]
    sha256: str
    size: int
    state: tuple[int, int, int]
    """Size, modification and change of the image when it was hashed."""

    @property
    def exe(self) -> FileId:
        """The executable as the kernel will name it."""
        facts = os.fstat(self.image)
        return FileId(facts.st_dev, facts.st_ino)

    def is_unchanged(self) -> bool:
        """Whether the image is what it was when it was hashed."""
        return _state(self.image) == self.state


def prepare(command: Sequence[str], name: str, stack: ExitStack, *, hide: bool) -> Code:
    """Read what ``command`` runs; ``stack`` closes its descriptors.

    ``hide`` lets nobody but root and us read the interpreter's image. The kernel then treats a process of it as it treats
    a program that its user may not read: nobody of that user can trace it, or read its memory (execve(2), prctl(2)).

    Raises:
        Invalid: it is not said which file runs, or there is none.
        Refused: others may write that file.
        Misconfigured: the kernel gives no memory to run from.
    """
    path = _found(command[0])
    program, words = path, list(command[1:])
    file = _opened(path, stack)
    if (line := _shebang(file)) is not None:
        if _PYTHON.fullmatch(os.path.basename(path)):  # noqa: PTH119 - text; as below
            raise Invalid(
                f"{path} is a script that runs some Python",
                code="launch_interpreter",
                hint="name the interpreter itself",
            )
        program, words = _found(line[0]), [*line[1:], path, *words]
        file = _opened(program, stack)
    kind = _kind(program)
    if kind == "plain" and line is None:
        return _plain(file, (path, *words))
    if kind == "plain" or _shebang(file) is not None:
        raise Invalid(
            f"the interpreter {program} is not known here",
            code="launch_interpreter",
            hint="Python, sh, dash and bash run from sealed memory; use a container image's digest for the others",
        )
    options, script, arguments = _python(words) if kind == "python" else _shell(words)
    code = _sealed(_opened(script, stack), name, _READABLE, stack)
    image = _sealed(file, name, _EXECUTE_ONLY if hide else _READABLE, stack)
    line_of = (program, *options, _SCRIPT_PATH, *arguments)
    return Code(image, code, line_of, digest(code), os.fstat(code).st_size, _state(image))


def _kind(path: str) -> str:
    # A link's target is what runs; its own name is what people mean by it.
    for name in (os.path.basename(path), os.path.basename(os.path.realpath(path))):  # noqa: PTH119
        if _PYTHON.fullmatch(name):
            return "python"
        if _SHELL.fullmatch(name):
            return "shell"
        if _OTHER.fullmatch(name):
            raise Invalid(
                f"{name} runs other files, and which one is not known here",
                code="launch_interpreter",
                hint="launch Python, sh, dash or bash with a script, or a program of its own; or use a container image's digest",
            )
    return "plain"


def _python(words: Sequence[str]) -> tuple[list[str], str, list[str]]:
    """Split the words behind Python: options, script, arguments. Isolated mode is not left to choice."""
    options, rest = ["-I"], list(words)
    while rest and rest[0].startswith("-"):
        word = rest.pop(0)
        if word in _WITH_VALUE and rest:
            options += [word, rest.pop(0)]
        elif _FLAGS.fullmatch(word) or _JOINED.fullmatch(word):
            options.append(word)
        else:
            raise _no_script(word)
    if not rest:
        raise _no_script("")
    return options, rest[0], rest[1:]


def _shell(words: Sequence[str]) -> tuple[list[str], str, list[str]]:
    if not words or words[0].startswith(("-", "+")):
        raise _no_script(words[0] if words else "")
    return [], words[0], list(words[1:])


def _no_script(word: str) -> Invalid:
    hints = {
        "-m": "write a script that imports it and calls its main function, or make one file of it: python3 -m zipapp",
        "-c": "write the code into a file",
    }
    said = f"the interpreter's option {word!r}" if word else "an interpreter alone"
    return Invalid(
        f"{said} does not say which one file is the code",
        code="launch_no_script",
        hint=hints.get(word, "write it as: python3 SCRIPT ARGUMENTS"),
    )


def _found(command: str) -> str:
    path = shutil.which(command)
    if path is None:
        raise Invalid(f"{command!r} is no program that can be run", code="launch_not_found", hint="name it by its path")
    return os.path.abspath(path)  # noqa: PTH100 - not resolved: a virtual environment is known by the link's own place


def _opened(path: str, stack: ExitStack) -> int:
    """Open a regular file that only root and we may write."""
    try:
        # Without waiting: a FIFO in that place must not hold us up.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no name of a file"
        raise Invalid(f"{path} cannot be read: {reason}", code="launch_not_found") from None
    stack.callback(os.close, fd)
    facts = os.fstat(fd)
    if not stat.S_ISREG(facts.st_mode):
        raise Invalid(
            f"{path} is not a regular file", code="launch_not_a_file", hint="name one file: python3 -m zipapp"
        )
    # NOTE(security): a name that others may give a content is no name.
    if facts.st_uid not in {0, os.geteuid()} or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Refused(
            f"{path} can be written by others",
            code="launch_code_unsafe",
            hint=f"let root own it: chown root {path}; chmod go-w {path}",
        )
    return fd


def _shebang(file: int) -> list[str] | None:
    head = os.pread(file, _MAX_SHEBANG, 0)
    if not head.startswith(b"#!"):
        return None
    match = _SHEBANG.match(head)
    if match is None:
        raise _no_interpreter()
    interpreter, rest = (os.fsdecode(part) for part in match.groups())
    words = [interpreter, *([rest.rstrip()] if rest.strip() else [])]
    if os.path.basename(interpreter) == "env":  # noqa: PTH119 - text
        # env(1): one name, or with -S several words.
        words = rest.split()[1:] if rest.split()[:1] == ["-S"] else rest.split()[:1]
    if not words or words[0].startswith("-") or "=" in words[0]:
        raise _no_interpreter()
    return words


def _no_interpreter() -> Invalid:
    return Invalid(
        "the script's first line names no interpreter", code="launch_interpreter", hint="write it as: python3 SCRIPT"
    )


def _plain(file: int, arguments: tuple[str, ...]) -> Code:
    state = _state(file)
    if state[0] > MAX_EXECUTABLE:
        raise Invalid(f"{arguments[0]} is larger than {MAX_EXECUTABLE} bytes", code="launch_too_large")
    code = Code(file, None, arguments, digest(file), state[0], state)
    if not code.is_unchanged():
        raise Refused(f"{arguments[0]} changed while it was read", code="launch_code_changed", hint="try again")
    return code


def _sealed(file: int, name: str, mode: int, stack: ExitStack) -> int:
    try:
        memory = executable_memory(name)
    except OSError as error:
        raise Misconfigured(
            f"no memory that can be run: {error.strerror}",
            code="launch_no_memory",
            hint="vm.memfd_noexec must be below 2, and no security module may forbid it",
        ) from None
    stack.callback(os.close, memory)
    with suppress(OSError):
        os.lseek(file, 0, os.SEEK_SET)
    try:
        fill(memory, file, MAX_SEALED)
        os.fchmod(memory, mode)
        seal(memory)
    except TooLarge as error:
        raise Invalid(f"the code is {error.message}", code="launch_too_large") from None
    except OSError as error:
        raise Misconfigured(f"the code cannot be held in memory: {error.strerror}", code="launch_no_memory") from None
    return memory


def _state(file: int) -> tuple[int, int, int]:
    facts = os.fstat(file)
    return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns
