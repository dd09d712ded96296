"""The contract of workload attestors as a test suite, for whoever writes one: real processes, no doubles.

In a pytest suite, derive from :class:`WorkloadAttestorContract` and say how an attestor is made; or call the functions
from tests of your own. A breach is a :class:`ContractBroken` that says which rule. Needs no pytest. Knows no attestor, and
cannot know whether what an attestor says is true: that is for its own tests.
"""

import asyncio
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final, cast

from pydantic import BaseModel, ValidationError

from broker.attestation.contract import AttestorFailed, SelectorDoc, Strength, WorkloadAttestor
from broker.attestation.process import Process
from broker.clock import SystemClock
from broker.errors import NotAttested
from broker.spiffe import Selector

WITHIN: Final = 9.0
"""Seconds for one answer: the agent gives all attestors together ten."""
MAX_STALL: Final = 1.0
"""Seconds that an attestor may keep the event loop from everybody else; a busy machine alone takes some tenths."""
REPEATS: Final = 3
"""Answers after which a descriptor for each of them would show."""
SETTLE: Final = 3.0
"""Seconds for threads and children of an answer to end."""

# Read only where an attestor passes on what ``Process`` itself found.
_OF_THE_PROCESS: Final = frozenset({"process_gone", "process_changed", "process_unreadable", "not_attested"})
_NAME: Final = re.compile("[a-z0-9_-]{1,64}")
_PLACEHOLDER: Final = re.compile("<[^<>]+>")
_WAITER: Final = ("/bin/sh", "-c", "echo; read -r nothing")  # for any user: an interpreter of the test may be private


class ContractBroken(AssertionError):
    """An attestor does what the contract forbids, or does not do what it demands."""


@contextmanager
def started_process(command: Sequence[str] = (), *, user: int | None = None) -> Iterator[Process]:
    """Start a process and take hold of it as the agent does; it is ended with the block.

    A ``command`` of your own writes a line when it is ready, and ends when its stdin closes. ``user`` needs root.
    """
    with subprocess.Popen(  # noqa: S603 - the test's own command
        list(command or _WAITER),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        user=user,
    ) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            with _held(child.pid, os.geteuid() if user is None else user) as process:
                yield process
        finally:
            child.kill()


@contextmanager
def ended_process() -> Iterator[Process]:
    """Give a process that lived when the agent took hold of it, and is gone by now."""
    with subprocess.Popen(  # noqa: S603 - our own command
        _WAITER, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        with _held(child.pid, os.geteuid()) as process:
            child.kill()
            child.wait()
            yield process


def check_declaration(attestor: WorkloadAttestor) -> None:
    """Check name, selector documents and settings model. Raises ``ContractBroken``."""
    # Whatever they are declared to be: what they are is what is checked.
    name, docs, settings = cast("tuple[Any, Any, Any]", (attestor.name, attestor.selectors, attestor.settings))
    _require(
        isinstance(name, str) and _NAME.fullmatch(name) is not None, "name is 1 to 64 of a-z, 0-9, dash and underscore"
    )
    _require(isinstance(docs, tuple) and len(docs) > 0, "selectors is a tuple of SelectorDoc, and not empty")
    for doc in docs:
        _require(isinstance(doc, SelectorDoc), "selectors holds only SelectorDoc")
        _require(isinstance(doc.strength, Strength), f"{doc.form}: strength is a Strength")
        _require(bool(doc.meaning.strip()), f"{doc.form}: meaning says what it means")
        kind, colon, value = doc.form.partition(":")
        _require(
            bool(colon and kind and value), f"{doc.form}: a form is written as type:value, such as unix:uid:<number>"
        )
    _require(isinstance(settings, type) and issubclass(settings, BaseModel), "settings is a pydantic model's class")
    _require(_refuses_unknown(settings), 'settings refuses unknown names: model_config = ConfigDict(extra="forbid")')


def check_selectors(attestor: WorkloadAttestor, answer: object) -> frozenset[Selector]:
    """Check that an answer is a ``frozenset`` of selectors in documented forms. Raises ``ContractBroken``."""
    if not isinstance(answer, frozenset):
        raise ContractBroken(f"{attestor.name}: an answer is a frozenset, not a {type(answer).__name__}")
    forms = [_pattern(doc.form) for doc in attestor.selectors]
    for one in answer:
        _require(isinstance(one, Selector), f"{attestor.name}: an answer holds only Selector")
        _require(
            any(form.fullmatch(str(one)) for form in forms),
            # The value stays out: it may be somebody's secret.
            f"{attestor.name}: a selector that begins with {one.type}:{one.value.partition(':')[0][:16]!r}"
            " has no documented form",
        )
    return answer


async def check_workload_attestor(
    attestor: WorkloadAttestor, process: Process, *, within: float = WITHIN
) -> frozenset[Selector]:
    """Check the declaration and several answers about one living process; give the last answer.

    Each comes in time, blocks nobody else, leaves no descriptor behind and is in a documented form; the process stays
    open. Raises ``ContractBroken``, and passes on the ``NotAttested`` of an attestor that refuses the process.
    """
    check_declaration(attestor)
    answer = await _answer(attestor, process, within)  # the first one may open what is kept
    before = _descriptors()
    for _ in range(REPEATS):
        answer = await _answer(attestor, process, within)
    await _settled(attestor, before)
    _require(not process.is_gone(), f"{attestor.name}: the process is gone, or closed: an attestor only looks")
    return answer


async def check_refuses(attestor: WorkloadAttestor, process: Process, *, within: float = WITHIN) -> NotAttested:
    """Check that a process is refused in the contract's way, with nothing left behind; give the refusal.

    Raises ``ContractBroken``, also where the attestor answers.
    """
    before, refusal = 0, NotAttested("")
    for turn in range(1 + REPEATS):
        try:
            await _answer(attestor, process, within)
        except NotAttested as error:
            refusal = error
        else:
            raise ContractBroken(f"{attestor.name}: it answers where it should refuse")
        if turn == 0:
            before = _descriptors()
    await _settled(attestor, before)
    return refusal


async def check_ended_process(attestor: WorkloadAttestor, *, within: float = WITHIN) -> None:
    """Check that a process that is gone is answered or refused, as any other one. Raises ``ContractBroken``."""
    with ended_process() as process:
        before = 0
        for turn in range(1 + REPEATS):
            with suppress(NotAttested):
                await _answer(attestor, process, within)
            if turn == 0:
                before = _descriptors()
        await _settled(attestor, before)


async def check_cancelled(attestor: WorkloadAttestor, process: Process) -> None:
    """Check that an answer nobody waits for any more ends, and leaves nothing behind. Raises ``ContractBroken``."""
    with suppress(NotAttested):
        await _answer(attestor, process, WITHIN)
    before = _descriptors()
    for _ in range(REPEATS):
        task = asyncio.ensure_future(attestor.attest(process))
        await asyncio.sleep(0)
        task.cancel()
        _, late = await asyncio.wait([task], timeout=SETTLE)
        _require(not late, f"{attestor.name}: it goes on although it was cancelled")
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, NotAttested):
            raise ContractBroken(f"{attestor.name}: cancelled, it fails with {type(error).__name__}") from error
    await _settled(attestor, before)


class WorkloadAttestorContract:
    """Derive from it in a pytest module, name the class ``Test…``, and make the attestor; each rule is a test."""

    def make_attestor(self) -> WorkloadAttestor:
        """Make a fresh attestor, as the agent would."""
        raise ContractBroken("make_attestor is yours to write: give a new attestor, settings and all")

    @contextmanager
    def process(self) -> Iterator[Process]:
        """Give a living process that the attestor is to describe; by default one of the test's own user."""
        with started_process() as process:
            yield process

    def test_declaration(self) -> None:
        """Name, documents and settings."""
        check_declaration(self.make_attestor())

    def test_answers(self) -> None:
        """A living process is described: documented forms, in time, no leaks."""
        with self.process() as process:
            asyncio.run(self._answers(process))

    def test_ended_process(self) -> None:
        """A process that is gone makes no defect."""
        asyncio.run(self._ended())

    def test_cancelled(self) -> None:
        """Nobody waits any more."""
        with self.process() as process:
            asyncio.run(self._cancelled(process))

    # Made inside of the loop: an attestor may belong to the loop that runs when it is made.
    async def _answers(self, process: Process) -> None:
        await check_workload_attestor(self.make_attestor(), process)

    async def _ended(self) -> None:
        await check_ended_process(self.make_attestor())

    async def _cancelled(self, process: Process) -> None:
        await check_cancelled(self.make_attestor(), process)


@contextmanager
def _held(pid: int, uid: int) -> Iterator[Process]:
    pidfd = os.pidfd_open(pid)
    try:
        process = Process.open(pid=pid, uid=uid, gid=os.getegid(), pidfd=pidfd)
    finally:
        os.close(pidfd)
    try:
        yield process
    finally:
        process.close()


async def _answer(attestor: WorkloadAttestor, process: Process, within: float) -> frozenset[Selector]:
    """One answer, watched: in time, by the contract's errors only, and without stalling the loop."""
    clock = SystemClock()
    stalls = asyncio.ensure_future(_longest_stall())
    await asyncio.sleep(0)  # it looks at the clock before the attestor can hold it up
    began = clock.monotonic()
    try:
        async with asyncio.timeout(within):
            answer = await attestor.attest(process)
    except TimeoutError:
        raise ContractBroken(f"{attestor.name}: no answer within {within} seconds") from None
    except NotAttested as error:
        _require(
            isinstance(error, AttestorFailed) or error.reason in _OF_THE_PROCESS,
            f"{attestor.name}: it refuses with AttestorFailed, not {type(error).__name__} ({error.reason})",
        )
        raise
    except Exception as error:
        raise ContractBroken(f"{attestor.name}: it fails with AttestorFailed, not {type(error).__name__}") from error
    finally:
        took = clock.monotonic() - began
        await asyncio.sleep(0)
        stalls.cancel()
        longest = await stalls
    _require(took <= within, f"{attestor.name}: no answer within {within} seconds")
    _require(longest <= MAX_STALL, f"{attestor.name}: it blocks the event loop; use a thread")
    return check_selectors(attestor, answer)


async def _longest_stall() -> float:
    clock, longest, last = SystemClock(), 0.0, SystemClock().monotonic()
    try:
        while True:
            await asyncio.sleep(0.02)
            now = clock.monotonic()
            longest, last = max(longest, now - last), now
    except asyncio.CancelledError:
        return max(longest, clock.monotonic() - last)


async def _settled(attestor: WorkloadAttestor, before: int) -> None:
    """Threads may end a little later than their answers; what is open then stays open."""
    clock = SystemClock()
    until = clock.monotonic() + SETTLE
    while (left := _descriptors() - before) > 0:
        if clock.monotonic() >= until:
            raise ContractBroken(f"{attestor.name}: it leaves descriptors open: {left} more than before")
        await asyncio.sleep(0.02)


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a kernel directory, of which only the length is read


def _pattern(form: str) -> re.Pattern[str]:
    """``unix:uid:<number>``: each ``<…>`` is something, all else is itself."""
    literals = _PLACEHOLDER.split(form)
    return re.compile(".+".join(re.escape(part) for part in literals), re.DOTALL)


def _refuses_unknown(settings: type[BaseModel]) -> bool:
    try:
        settings.model_validate({"no-such-setting-of-anybody": 1})
    except ValidationError as error:
        return any(one["type"] == "extra_forbidden" for one in error.errors(include_input=False))
    return False


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise ContractBroken(rule)
