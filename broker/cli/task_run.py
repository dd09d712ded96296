"""A task for one command: started before it, ended with it, its token and certificate kept fresh in files meanwhile.

The task is attached to this process. When it ends elsewhere the files are gone at once, and the command is ended too: first
asked, then killed. Knows nothing of options.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

from broker.cli.held_task import LOOK_EVERY, following
from broker.cli.options import Settings
from broker.cli.output import EXIT_INTERRUPTED
from broker.cli.task_files import TaskFiles, place
from broker.clock import SystemClock
from broker.errors import BrokerError, Invalid, Refused, Unavailable
from broker.sdk import Task, Workload
from broker.sdk.feed import FeedState
from broker.spiffe import strictjson
from broker.spiffe.jose import numeric_date, parse_compact
from broker.tasks.verify import unverified_confirmation

RENEW_LOOK: Final = 0.1
"""Seconds between looks whether token or certificate are due: a look is a comparison, and asks nobody."""
FIRST_SECONDS: Final = 5.0
"""How long the certificate of the first token may take to come."""
RETRY: Final = 2.0
"""Seconds until a token that could not be had is asked for again."""
BY_SIGNAL: Final = 128
"""A shell's way to say in an exit code that a signal ended a process."""

_FROM_TERMINAL: Final = frozenset({signal.SIGINT, signal.SIGQUIT, signal.SIGHUP})
_FORWARDED: Final = _FROM_TERMINAL | {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What task a command gets. ``repr`` shows no token."""

    user_token: str = field(repr=False)
    delegation: str
    """The id of a standing delegation, where there is no token."""
    purpose: str
    authorization_details: str
    ttl: int
    spiffe_id: str
    resource: str
    scope: str
    grace: int
    """Seconds between asking the command to end and killing it."""
    command: Sequence[str]


def run(settings: Settings, request: RunRequest) -> int:
    """Start the task, run the command, end the task; give the command's exit code.

    Raises:
        Refused: the task or its token may not be had, or it ended elsewhere; the command has ended, too.
        Unavailable: agent or server cannot answer; the command was not started.
    """
    return asyncio.run(_run(settings, request))


async def _run(settings: Settings, request: RunRequest) -> int:
    parent, in_memory = place(os.environ)
    if not in_memory:
        settings.shown.talk(f"note: the token's file is on a disk, in {parent}: set XDG_RUNTIME_DIR")
    code: int | None = None
    with _Signals() as signals, TaskFiles(parent) as files:
        try:
            async with Workload.connect(f"unix:{settings.agent_socket()}", spiffe_id=request.spiffe_id) as me:
                await me.identity(timeout=settings.timeout)
                async with _task(me, request) as task, following(me.channel, task.names) as feed:
                    export = _Export(settings, request, me, task, files)
                    code = await _supervise(request, export, feed, signals)
        except BrokerError as error:
            if code is None:
                raise
            settings.shown.talk(f"the end of the task is not confirmed: {error.message}; it ends with this command")
        except asyncio.CancelledError:
            if not signals.interrupted:
                raise
            return EXIT_INTERRUPTED
    return code


def _task(me: Workload, request: RunRequest) -> Any:
    details: Any = strictjson.loads(request.authorization_details.encode())
    return me.task(
        user_token=request.user_token,
        delegation=request.delegation,
        purpose=request.purpose,
        authorization_details=details,
        ttl=request.ttl,
        supervision="attached",
    )


class _Export:
    """Keeps the files of one task what they should be."""

    def __init__(self, settings: Settings, request: RunRequest, me: Workload, task: Task, files: TaskFiles) -> None:
        self._settings = settings
        self._request = request
        self._me = me
        self._written: tuple[object, ...] = ()
        self._clock = SystemClock()
        self._due = 0.0
        self._tried = 0.0
        self.task = task
        self.files = files

    async def once(self) -> None:
        """Write a token and the certificate that it is bound to, where they are not what is there already."""
        token = await self.task.token(self._request.resource, scope=self._request.scope)
        identity, bundles = self._me.current, self._me.bundles
        cnf = unverified_confirmation(token)
        if identity is None or (cnf is not None and cnf.x5t not in (None, identity.x5t)):
            raise Unavailable("the certificate is just being replaced", code="svid_rotating")
        bundle = bundles[identity.id.trust_domain]
        if (wanted := (token, identity, bundle)) != self._written:
            self.files.write(token, identity, bundle)
            self._written = wanted
        expires = numeric_date(parse_compact(token).payload, "exp", required=True)
        # Half of what is left: the SDK gives the same token until it is worth a new one.
        self._due = self._clock.monotonic() + max((expires - self._clock.now().timestamp()) / 2, RENEW_LOOK)

    async def first(self, timeout: float) -> None:  # noqa: ASYNC109 - seconds for the certificate to settle
        """Write the first set."""
        until = SystemClock().monotonic() + timeout
        while True:
            try:
                return await self.once()
            except Unavailable as error:
                if error.reason != "svid_rotating" or SystemClock().monotonic() > until:
                    raise
            await asyncio.sleep(LOOK_EVERY)

    async def keep(self) -> None:
        """Go on for ever; raises the BrokerError by which the token is refused."""
        told = False
        while True:
            await asyncio.sleep(RENEW_LOOK)
            if not self._is_due():
                continue
            try:
                await self.once()
            except Unavailable as error:
                if error.reason == "svid_rotating":
                    continue
                self._tried = self._clock.monotonic()
                # Nobody can say whether what is there is still good.
                self.withdraw()
                if not told:
                    self._settings.shown.talk(f"the token cannot be renewed now: {error.message}; trying on")
                    told = True
            else:
                told = False

    def withdraw(self) -> None:
        """Leave no file: what was in them is good no longer."""
        self._written = ()
        self.files.withdraw()

    def _is_due(self) -> bool:
        if self._clock.monotonic() < self._tried + RETRY:
            return False
        if not self._written or not self.task.is_kept(str(self._written[0])):
            return True
        _, identity, bundle = self._written
        now = self._me.current
        if now is not None and (now is not identity or self._me.bundles.get(now.id.trust_domain) != bundle):
            return True
        return self._clock.monotonic() >= self._due


async def _watch(task: Task, feed: FeedState) -> None:
    """Raise Refused as soon as the task is known to have ended."""
    clock = SystemClock()
    while True:
        # Epoch 0 is below any that a kill of the tree announces: whatever kills this tree is seen.
        feed.require_alive(root=task.root, epoch=0, task=task.id, session=None, jti="")
        feed.require_going(user=task.user, user_session=None, agent=task.agent, audience="", issued_at=task.created_at)
        if clock.now().timestamp() >= task.expires_at:
            raise Refused("the task has expired", code="task_expired", hint="start it again, with a longer --ttl")
        await asyncio.sleep(LOOK_EVERY)


async def _supervise(request: RunRequest, export: _Export, feed: FeedState, signals: "_Signals") -> int:
    await export.first(FIRST_SECONDS)
    child = await _start(request.command, {**export.files.environment, "BROKER_TASK_ID": export.task.id})
    signals.child = child
    ended = asyncio.ensure_future(child.wait())
    others = [asyncio.ensure_future(export.keep()), asyncio.ensure_future(_watch(export.task, feed))]
    try:
        await asyncio.wait({ended, *others}, return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            export.withdraw()
            await _stop(child, ended, request.grace)
            raise _refusal(next(error for one in others if one.done() and (error := one.exception())))
        code = ended.result()
        return code if code >= 0 else BY_SIGNAL - code
    finally:
        for one in others:
            one.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if not ended.done():  # we are being stopped ourselves
            await _stop(child, ended, request.grace)


async def _start(command: Sequence[str], more: Mapping[str, str]) -> asyncio.subprocess.Process:
    try:
        return await asyncio.create_subprocess_exec(*command, env={**os.environ, **more})
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no name of a program"
        raise Invalid(
            f"{command[0]} cannot be run: {reason}", code="command_not_run", hint="name it by its path"
        ) from None


async def _stop(child: asyncio.subprocess.Process, ended: "asyncio.Future[int]", grace: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.terminate()
    done, _ = await asyncio.wait({ended}, timeout=grace)
    if not done:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await ended


def _refusal(error: BaseException) -> BaseException:
    if isinstance(error, BrokerError) and not isinstance(error, Refused):
        return Refused(error.message, code=error.reason, hint=error.hint)
    return error


class _Signals:
    """Passes signals on to the command; before there is one they end this process as an interrupt does."""

    def __init__(self) -> None:
        self.child: asyncio.subprocess.Process | None = None
        self.interrupted = False
        self._main = asyncio.current_task()

    def __enter__(self) -> Self:
        for number in _FORWARDED:
            asyncio.get_running_loop().add_signal_handler(number, self._told, number)
        return self

    def __exit__(self, *_: object) -> None:
        for number in _FORWARDED:
            asyncio.get_running_loop().remove_signal_handler(number)

    def _told(self, number: signal.Signals) -> None:
        if self.child is None:
            self.interrupted = True
            if self._main is not None:
                self._main.cancel()
        # What a terminal sends, it sends to all in its foreground: the command has it already.
        elif number not in _FROM_TERMINAL or not _in_foreground():
            with contextlib.suppress(ProcessLookupError):
                self.child.send_signal(number)


def _in_foreground() -> bool:
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)
