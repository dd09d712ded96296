"""When one authority follows another: prepared → active → old → gone, as a pure function of the rows and the time.

A successor is prepared, and so published, at the half of the active one's life, and takes over at five sixths: with a
life of a day, every verifier has four eighths of it to learn the new key before its first use. An authority whose key
is not held here (an earlier process had it) signs nothing more, but stays published until all it may have signed has
expired. Knows no keys, no store and no clock.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from broker.server.store.rows import AuthorityKind, AuthorityRow, AuthorityState

PRUNE_GRACE: Final = timedelta(minutes=10)
"""Kept this long after its end: a verifier's clock may be behind, and it must say "expired", not "unknown"."""


@dataclass(frozen=True, slots=True)
class Prepare:
    """Make and publish a successor."""

    kind: AuthorityKind


@dataclass(frozen=True, slots=True)
class Activate:
    """Sign with this one from now on; the active one becomes old."""

    row: AuthorityRow


@dataclass(frozen=True, slots=True)
class Retire:
    """Its key is gone: it signs nothing more, what it signed still counts."""

    row: AuthorityRow


@dataclass(frozen=True, slots=True)
class Prune:
    """Nothing it signed can be valid any more."""

    row: AuthorityRow


Step = Prepare | Activate | Retire | Prune


def plan(
    rows: Iterable[AuthorityRow], held: Collection[str], kinds: Iterable[AuthorityKind], now: datetime
) -> tuple[Step, ...]:
    """Give the steps that are due for the authorities whose keys are ``held`` here; run again until there is none."""
    everything = tuple(rows)
    steps: list[Step] = [step for row in everything for step in _departures(row, held, now)]
    gone = {step.row.id for step in steps if isinstance(step, Prune)}
    for kind in kinds:
        ours = [row for row in everything if row.kind is kind and row.id in held and row.id not in gone]
        steps += _succession(kind, ours, now)
    return tuple(steps)


def next_due(rows: Iterable[AuthorityRow], held: Collection[str], now: datetime) -> datetime | None:
    """Tell the moment of the next step, None when there are no rows."""
    moments: list[datetime] = []
    for row in rows:
        moments.append(row.not_after + PRUNE_GRACE)
        if row.state is AuthorityState.ACTIVE and row.id in held:
            moments += (moment for moment in (half_life(row), hand_over(row)) if moment > now)
    return min(moments, default=None)


def half_life(row: AuthorityRow) -> datetime:
    """When its successor is prepared."""
    return row.not_before + (row.not_after - row.not_before) / 2


def hand_over(row: AuthorityRow) -> datetime:
    """When its successor takes over: at five sixths of its life."""
    return row.not_before + (row.not_after - row.not_before) * 5 / 6


def _departures(row: AuthorityRow, held: Collection[str], now: datetime) -> Iterable[Step]:
    if now > row.not_after + PRUNE_GRACE:
        yield Prune(row)
    elif row.id not in held and row.state is AuthorityState.PREPARED:
        # It never signed: nobody needs it.
        yield Prune(row)
    elif row.id not in held and row.state is AuthorityState.ACTIVE:
        yield Retire(row)


def _succession(kind: AuthorityKind, ours: list[AuthorityRow], now: datetime) -> Iterable[Step]:
    active = next((row for row in ours if row.state is AuthorityState.ACTIVE), None)
    prepared = next((row for row in ours if row.state is AuthorityState.PREPARED and now < row.not_after), None)
    if prepared is None:
        if active is None or now >= half_life(active):
            yield Prepare(kind)
    elif active is None or now >= hand_over(active):
        yield Activate(prepared)
