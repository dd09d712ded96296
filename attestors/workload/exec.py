"""Describes a process by asking programs of the operator's own, in any language: JSON in on stdin, JSON out on stdout.

Each program is pinned by its SHA-256. It is read once, at the start, into sealed memory; that memory is hashed and is
what runs, through its descriptor, so that nothing done to the file later has any effect. A program gives selectors of its
own type only, has an empty environment and no descriptor of ours but its own image, and is killed when its time is over.
"""

import asyncio
import json
import os
import re
import select
import signal
import stat
import subprocess
import weakref
from contextlib import suppress
from typing import ClassVar, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from broker.attestation.contract import AttestorFailed, AttestorUnavailable, SelectorDoc, Strength
from broker.attestation.process import Process
from broker.attestation.reads import Abandoned, BlockingReads
from broker.attestation.sealed import TooLarge, digest, executable_memory, fill, seal
from broker.clock import SystemClock
from broker.errors import Invalid, Misconfigured
from broker.spiffe import Selector
from broker.spiffe.strictjson import loads

NAME = "exec"
VERSION = 1
NOT_MINE = 3  # the exit code that says: this process is none of mine
MAX_PROGRAMS = 4  # each attestation starts them all, and no user has more than four running (broker.attestation.reads)
MAX_TIMEOUT = 5.0  # seconds; the agent gives all attestors together ten
GRACE = 0.5  # seconds beyond the time-out until the caller is answered whatever the program's thread does
MAX_PROGRAM = 64 << 20  # bytes, held in memory: large statically linked programs have some 50 MiB
MAX_ANSWER = 1 << 16  # bytes of JSON
MAX_SELECTORS = 256
OURS: Final = frozenset({"docker", "exec", "k8s", "launch", "slurm", "systemd", "unix", "windows"})
"""Types with a meaning that entries already rely on."""

_POLL: Final = 50  # milliseconds between looks at the clock, and whether anybody still waits


class ProgramSettings(BaseModel):
    """One program, and what it may say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern="^[a-z0-9_-]{1,64}$", description="What messages call it.")
    path: str = Field(pattern="^/[^\x00]+$", description="The program: an absolute path, read at the agent's start.")
    args: tuple[str, ...] = Field(default=(), max_length=64, description="Its arguments.")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="The program's SHA-256; another content stops the start.")
    timeout: float = Field(
        default=2.0, gt=0, le=MAX_TIMEOUT, description="Seconds; a slower answer refuses the caller."
    )
    prefix: str = Field(default="", description="The type of its selectors; its name unless given.")

    @field_validator("args")
    @classmethod
    def _without_nul(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any("\x00" in one for one in value):
            raise ValueError("an argument holds a NUL")
        return value

    @model_validator(mode="after")
    def _own_type(self) -> "ProgramSettings":
        if re.fullmatch("[a-z0-9_-]{1,64}", self.type) is None:
            raise ValueError("prefix is 1 to 64 of a-z, 0-9, dash and underscore")
        if self.type in OURS:
            raise ValueError("prefix is the type of another attestor's selectors")
        return self

    @property
    def type(self) -> str:
        """The type of its selectors."""
        return self.prefix or self.name


class ExecSettings(BaseModel):
    """Which programs are asked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    programs: tuple[ProgramSettings, ...] = Field(
        min_length=1, max_length=MAX_PROGRAMS, description="The programs; each caller is shown to all of them."
    )

    @field_validator("programs")
    @classmethod
    def _distinct(cls, value: tuple[ProgramSettings, ...]) -> tuple[ProgramSettings, ...]:
        for of in ({one.name for one in value}, {one.type for one in value}):
            if len(of) != len(value):
                raise ValueError("two programs have the same name or the same prefix")
        return value


class _Answer(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)

    version: int = Field(ge=VERSION, le=VERSION)
    selectors: list[str] = Field(max_length=MAX_SELECTORS)


class ExecAttestor:
    """See the module; ``ExecSettings`` are its settings. Raises ``Misconfigured`` for a program that is not its pin."""

    name: ClassVar[str] = NAME
    settings: ClassVar[type[BaseModel]] = ExecSettings
    selectors: ClassVar[tuple[SelectorDoc, ...]] = (
        SelectorDoc("<prefix>:<value>", "what the operator's program of that prefix says", Strength.RUNTIME),
    )

    def __init__(self, settings: ExecSettings) -> None:
        self._programs = tuple(_Program(one) for one in settings.programs)
        # An instance knows its types, so that no other type is taken for documented.
        self.__dict__["selectors"] = tuple(
            SelectorDoc(f"{one.type}:<value>", f"what the program {one.name} says", Strength.RUNTIME)
            for one in settings.programs
        )
        self._reads = BlockingReads()

    async def attest(self, process: Process) -> frozenset[Selector]:
        """Give what the programs say of the process, all asked at once; raises ``AttestorFailed`` when one fails."""
        question = _question(process)
        asked = [asyncio.ensure_future(self._ask(program, process.uid, question)) for program in self._programs]
        try:
            answers = await asyncio.gather(*asked)
        finally:
            for one in asked:
                one.cancel()
        # NOTE(security): a program looks at a number; it was this process's all the time if it still lives.
        if process.is_gone():
            raise AttestorFailed("the process is gone", code="process_gone")
        return frozenset().union(*answers)

    async def _ask(self, program: "_Program", uid: int, question: bytes) -> frozenset[Selector]:
        until = SystemClock().monotonic() + program.settings.timeout
        try:
            async with asyncio.timeout(program.settings.timeout + GRACE):
                return await self._reads.run(uid, lambda stop: program.ask(question, until, stop))
        except TimeoutError:
            raise program.failed("did not answer in time", "attestor_timeout") from None


class _Program:
    """A pinned program in sealed memory."""

    def __init__(self, settings: ProgramSettings) -> None:
        self.settings = settings
        self._image = _sealed_image(settings)
        weakref.finalize(self, os.close, self._image)

    def ask(self, question: bytes, until: float, abandoned: Abandoned) -> frozenset[Selector]:
        """Run it once. Blocks until the monotonic time ``until`` at the latest; raises ``AttestorFailed``."""
        if abandoned() or SystemClock().monotonic() >= until:
            raise self.failed("could not be asked in time", "attestor_timeout")
        try:
            code, answer = self._run(question, until, abandoned)
        except OSError:
            raise self.failed("cannot be run", "program_failed") from None
        if code == NOT_MINE:
            return frozenset()
        if code != 0:
            raise self.failed(f"ended with {code}", "program_failed")
        return self._selectors(answer)

    def failed(self, how: str, code: str) -> AttestorFailed:
        """Make the refusal; nothing that the program wrote stands in it."""
        failure = AttestorUnavailable if code == "attestor_timeout" else AttestorFailed
        return failure(f"the program {self.settings.name} {how}", code=code)

    def _run(self, question: bytes, until: float, abandoned: Abandoned) -> tuple[int, bytes]:
        stdin = os.memfd_create("question", os.MFD_CLOEXEC)
        try:
            os.pwrite(stdin, question, 0)
            child = self._start(stdin)
        finally:
            os.close(stdin)
        try:
            answer = self._output(child, until, abandoned)
        finally:
            code = _end(child)
        return code, answer

    def _start(self, stdin: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(  # noqa: S603 - the pinned image; no argument is the caller's
            [self.settings.path, *self.settings.args],
            executable=f"/proc/self/fd/{self._image}",
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={},
            cwd="/",
            close_fds=True,
            pass_fds=(self._image,),  # a script's interpreter opens it by this number
            start_new_session=True,  # killed with whatever it started
        )

    def _output(self, child: subprocess.Popen[bytes], until: float, abandoned: Abandoned) -> bytes:
        """Read until the program has exited; it is not reaped yet, so that its number stays its own."""
        assert child.stdout is not None
        stdout, ended = child.stdout.fileno(), os.pidfd_open(child.pid)
        try:
            poll = select.poll()
            poll.register(stdout, select.POLLIN)
            poll.register(ended, select.POLLIN)
            os.set_blocking(stdout, False)
            answer = bytearray()
            while True:
                if abandoned() or SystemClock().monotonic() >= until:
                    raise self.failed("did not answer in time", "attestor_timeout")
                ready = dict(poll.poll(_POLL))
                if stdout in ready and not self._take(stdout, answer):
                    poll.unregister(stdout)
                elif ended in ready and stdout not in ready:
                    return bytes(answer)  # what it wrote was read before; others who still hold the pipe do not count
        finally:
            os.close(ended)

    def _take(self, stdout: int, answer: bytearray) -> bool:
        with suppress(BlockingIOError):
            part = os.read(stdout, MAX_ANSWER)
            answer += part
            if len(answer) > MAX_ANSWER:
                raise self.failed("answered with too much", "program_answer")
            return bool(part)
        return True

    def _selectors(self, answer: bytes) -> frozenset[Selector]:
        try:
            said = _Answer.model_validate(loads(answer, max_bytes=MAX_ANSWER))
            selectors = frozenset(map(Selector, said.selectors))
        except (ValidationError, Invalid):
            raise self.failed("answered with something else than it should", "program_answer") from None
        if any(one.type != self.settings.type for one in selectors):
            raise self.failed("gave a selector of a type that is not its own", "program_answer")
        return selectors


def _question(process: Process) -> bytes:
    facts = process.facts
    question = json.dumps(
        {
            "version": VERSION,
            "pid": process.pid,
            "uid": process.uid,
            "gid": process.gid,
            "groups": sorted(facts.groups),
            "start_time": facts.start_time,
            "exe": {"device": facts.exe.device, "inode": facts.exe.inode},
        },
        separators=(",", ":"),
    )
    return f"{question}\n".encode("ascii")  # a line: the shell's read wants its end


def _end(child: subprocess.Popen[bytes]) -> int:
    assert child.stdout is not None
    child.stdout.close()
    # Before it is reaped: until then nobody else can have its number. Whatever it left behind goes with it.
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    return child.wait()


def _sealed_image(settings: ProgramSettings) -> int:
    """Copy the program into memory that nobody can change any more, and give its descriptor if the content is the pin."""
    try:
        image = executable_memory(settings.name)
    except OSError as error:
        raise Misconfigured(
            f"exec: no memory for the program {settings.name}", hint="vm.memfd_noexec must be below 2"
        ) from error
    try:
        _copy(settings, image)
        seal(image)
        found = digest(image)
    except BaseException as error:
        os.close(image)
        if isinstance(error, OSError):
            raise Misconfigured(f"exec: the program {settings.name} cannot be read") from error
        raise
    if found != settings.sha256:
        os.close(image)
        raise Misconfigured(
            f"exec: the program {settings.name} is not what its sha256 says",
            code="program_not_pinned",
            hint="compare with sha256sum; pin the new content only if you know it",
        )
    return image


def _copy(settings: ProgramSettings, image: int) -> None:
    # Without waiting: a FIFO in that place must not hold up the start.
    source = os.open(settings.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(source).st_mode):
            raise Misconfigured(f"exec: the program {settings.name} is not a regular file")
        fill(image, source, MAX_PROGRAM)
    except TooLarge as error:
        raise Misconfigured(f"exec: the program {settings.name} is {error.message}") from None
    finally:
        os.close(source)
