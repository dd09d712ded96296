"""``broker demo``: the story from a node's proof to a dead token, played by real processes and judged step by step.

A step holds, or the demo stops there and says which one. Knows the order; the steps know what must come out.
"""

import asyncio
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from broker.dev import demo_identity, demo_refusals, demo_task
from broker.dev.stage import NotHeld, Stage
from broker.errors import BrokerError

STEP_SECONDS = 60.0
"""For one step; the slowest takes some seconds, and a hang must end."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step as it came out."""

    step: str
    title: str
    held: bool
    milliseconds: float
    lines: Sequence[str]
    facts: Mapping[str, Any]
    failure: str | None


Play = Callable[[Stage], Awaitable[tuple[Sequence[str], Mapping[str, Any]]]]

STEPS: Sequence[tuple[str, str, Play]] = (
    ("estate", "A server, a node agent and an OpenID issuer start", demo_identity.estate),
    ("entries", "The platform team says which process gets which identity", demo_identity.entries),
    (
        "attestation",
        "A process is attested and receives its identities; a stranger does not",
        demo_identity.attestation,
    ),
    ("user", "A user signs in", demo_task.user),
    ("task", "The agent starts a task for the user", demo_task.task),
    ("token", "The task gets a token for one service", demo_task.token),
    ("accepted", "The service accepts it", demo_task.accepted),
    ("neighbour", "A neighbour steals the token", demo_refusals.neighbour),
    ("widened", "The agent wants more than it was given", demo_refusals.widened),
    ("altered", "The binding is cut off, or replaced", demo_refusals.altered),
    ("end", "The task ends, and the token is dead", demo_refusals.end),
)


async def play(tell: Callable[[Step], Awaitable[None]], *, python: str = sys.executable) -> Sequence[Step]:
    """Play all steps until one does not hold; ``tell`` hears each as it ends. Ends and removes everything.

    Raises:
        KeyboardInterrupt: a signal stopped it; everything is ended and removed then too.
    """
    done: list[Step] = []
    with _stopped_by_signals():
        async with Stage(python=python) as stage:
            for name, title, act in STEPS:
                step = await _one(stage, name, title, act)
                done.append(step)
                await tell(step)
                if not step.held:
                    break
    return done


async def _one(stage: Stage, name: str, title: str, act: Play) -> Step:
    began = time.monotonic()
    lines: Sequence[str] = ()
    facts: Mapping[str, Any] = {}
    failure = None
    try:
        async with asyncio.timeout(STEP_SECONDS):
            lines, facts = await act(stage)
    except TimeoutError:
        failure = f"it did not end within {STEP_SECONDS:.0f} s"
    except NotHeld as error:
        failure = error.message + (f" (hint: {error.hint})" if error.hint else "")
    except BrokerError as error:
        failure = f"{error.message} ({error.reason})" + (f" (hint: {error.hint})" if error.hint else "")
    except Exception as error:  # noqa: BLE001 - whatever went wrong, this step did not hold, and it has a name
        failure = f"{type(error).__name__}: {error}"
    took = round((time.monotonic() - began) * 1000, 1)
    return Step(name, title, failure is None, took, lines, facts, failure)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Turn the signals that end a process into one cancellation, so that what was started is ended first."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    stopped: list[int] = []

    def stop(number: int) -> None:
        if not stopped:
            stopped.append(number)
            task.cancel()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, stop, number)
    try:
        yield
    except asyncio.CancelledError:
        if stopped:
            raise KeyboardInterrupt from None
        raise
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
