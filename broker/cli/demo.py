"""``broker demo``: tells the story that ``broker.dev.demo`` plays, one screen a step."""

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from broker.cli.options import Verb, option, settings
from broker.cli.output import EXIT_FAILED, EXIT_OK, Column, Format, Shape

if TYPE_CHECKING:
    from broker.dev.demo import Step

PAUSE_SECONDS = 0.7
"""Between two steps on a terminal: long enough to see that there are steps."""

SHAPE = Shape("demo", "demos", (Column("held", "held"), Column("milliseconds", "milliseconds")), name="held")


@click.command("demo", cls=Verb)
@option("--fast", is_flag=True, help="No pauses. Without a terminal there are none.")
def COMMAND(*, fast: bool) -> int:  # noqa: N802 - the name that the tree looks for
    """Play the whole story with real processes, in a temporary directory, and judge each step.

    Exit code 1: a step did not hold, and its name is in the last line.
    """
    import asyncio  # noqa: PLC0415 - the slow imports only when used
    import time  # noqa: PLC0415

    from broker.dev.demo import STEPS, play  # noqa: PLC0415

    here = settings()
    pause = 0.0 if fast or not sys.stdout.isatty() else PAUSE_SECONDS
    people = here.shown.format in {None, Format.TABLE, Format.WIDE}

    async def tell(step: "Step") -> None:
        if people:
            _show(step, len(STEPS))
            await asyncio.sleep(pause)

    if people:
        here.shown.talk(
            "real processes, real sockets, real certificates; loopback only; everything is removed afterwards"
        )
    began = time.monotonic()
    steps = asyncio.run(play(tell))
    took = round((time.monotonic() - began) * 1000)
    held = len(steps) == len(STEPS) and all(step.held for step in steps)
    if not people:
        here.shown.one(SHAPE, {"held": held, "milliseconds": took, "items": [asdict(step) for step in steps]})
    if not held:
        failed = steps[-1]
        here.shown.error("step_failed", f"the step {failed.step} did not hold: {failed.failure}")
        return EXIT_FAILED
    here.shown.talk(f"{len(steps)} of {len(STEPS)} steps held, in {took / 1000:.1f} s")
    here.shown.next("broker dev up")
    return EXIT_OK


def _show(step: "Step", steps: int) -> None:
    from broker.dev.demo import STEPS  # noqa: PLC0415

    here = settings().shown
    number = [name for name, _, _ in STEPS].index(step.step) + 1
    verdict = "held" if step.held else "DID NOT HOLD"
    here.raw(f"\n{number}/{steps}  {step.title}")
    for line in step.lines:
        here.raw(f"      {line}")
    if step.failure:
        here.raw(f"      {step.failure}")
    here.raw(f"      [{verdict}, {step.milliseconds} ms]")
