"""When one authority follows another: prepared → active → old → gone, as a pure function of the rows and the time.

A successor is prepared, and so published, at the half of the active one's life, and takes over at five sixths: with a
life of a day, every verifier has four eighths of it to learn the new key before its first use. Each replica signs with
its own authorities; those of a replica that is gone (an earlier process of this one included, whose keys are not held)
sign nothing more, but stay published until all they may have signed has expired. Knows no keys, no store and no clock.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import MAXYEAR, datetime, timedelta
from itertools import pairwise
from typing import Final

from broker.server.authority.profile import BACKDATE
from broker.server.store.rows import AdoptedAuthority, AuthorityKind, AuthorityRow, AuthorityState, Published

PRUNE_GRACE: Final = timedelta(minutes=10)
"""Kept this long after its end: a verifier's clock may be behind, and it must say "expired", not "unknown"."""
LEASE: Final = timedelta(seconds=60)
"""A replica that was not heard for so long is gone: six heartbeats, and more than two machines' clocks differ by."""
AHEAD: Final = timedelta(seconds=10)
"""A replica that joins others publishes its first authorities this long before it uses them: two polls of SPIRE's
agent. Ours are told in milliseconds."""


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

    row: AuthorityRow | AdoptedAuthority


Step = Prepare | Activate | Retire | Prune


@dataclass(frozen=True, slots=True)
class Standing:
    """What one replica knows when it plans: its name, the keys it holds, and authorities that must be followed at once.

    ``urgent`` names authorities of ours that stand under a tainted root.
    """

    replica: str
    held: Collection[str]
    kinds: tuple[AuthorityKind, ...]
    urgent: Collection[str] = field(default_factory=frozenset)


def plan(published: Published, standing: Standing, now: datetime) -> tuple[Step, ...]:
    """Give the steps that are due for one replica; run again until there is none."""
    living = frozenset(others(published.replicas, standing.replica, now))
    steps: list[Step] = [step for row in published.authorities for step in _departures(row, standing, living, now)]
    steps += [Prune(row) for row in published.adopted if now - PRUNE_GRACE > row.not_after]
    gone = {step.row.id for step in steps if isinstance(step, Prune)}
    for kind in standing.kinds:
        ours = [row for row in _ours(published, standing, kind) if row.id not in gone]
        steps += _succession(kind, ours, standing, now, wait=bool(living))
    return tuple(steps)


def next_due(published: Published, standing: Standing, now: datetime) -> datetime | None:
    """Tell the moment of the next step, None when there are no rows."""
    ends = [row.not_after for row in published.authorities] + [row.not_after for row in published.adopted]
    # Of what never ends (the year 9999) there is no moment after.
    moments = [end + PRUNE_GRACE for end in ends if end.year < MAXYEAR]
    for kind in standing.kinds:
        ours = _ours(published, standing, kind)
        for row in ours:
            if row.state is AuthorityState.ACTIVE:
                moments += [half_life(row), hand_over(row)]
            elif row.state is AuthorityState.PREPARED:
                moments.append(published_long_enough(row))
    return min((moment for moment in moments if moment > now), default=None)


def others(replicas: Mapping[str, datetime], replica: str, now: datetime) -> Iterable[str]:
    """Name the replicas that live beside this one."""
    return (name for name, seen_at in replicas.items() if name != replica and now - seen_at < LEASE)


def half_life(row: AuthorityRow) -> datetime:
    """When its successor is prepared."""
    return _begin(row) + (row.not_after - _begin(row)) / 2


def hand_over(row: AuthorityRow) -> datetime:
    """When its successor takes over: at five sixths of its life."""
    return _begin(row) + (row.not_after - _begin(row)) * 5 / 6


def published_long_enough(row: AuthorityRow) -> datetime:
    """When other replicas' agents have learned of it."""
    return _begin(row) + AHEAD


def _begin(row: AuthorityRow) -> datetime:
    # When it was made: a short life, counted from its back-dated begin, would be half over at once.
    return min(row.not_before + BACKDATE, row.not_after)


def _ours(published: Published, standing: Standing, kind: AuthorityKind) -> list[AuthorityRow]:
    return [
        row
        for row in published.authorities
        if row.kind is kind and row.replica == standing.replica and row.id in standing.held
    ]


def _departures(row: AuthorityRow, standing: Standing, living: Collection[str], now: datetime) -> Iterable[Step]:
    if now - PRUNE_GRACE > row.not_after:
        yield Prune(row)
    elif row.replica in living or (row.replica == standing.replica and row.id in standing.held):
        return
    elif row.state is AuthorityState.PREPARED:
        # It never signed: nobody needs it.
        yield Prune(row)
    elif row.state is AuthorityState.ACTIVE:
        yield Retire(row)


def _succession(
    kind: AuthorityKind, ours: list[AuthorityRow], standing: Standing, now: datetime, *, wait: bool
) -> Iterable[Step]:
    actives = [row for row in ours if row.state is AuthorityState.ACTIVE]
    # One signs. More of them are the work of somebody who restored a backup: the youngest stays.
    yield from (Retire(older) for older, _ in pairwise(actives))
    active = actives[-1] if actives else None
    prepared = [row for row in ours if row.state is AuthorityState.PREPARED and now < row.not_after]
    yield from (Prune(row) for row in prepared if row.id in standing.urgent)
    ready = next((row for row in prepared if row.id not in standing.urgent), None)
    is_urgent = active is not None and active.id in standing.urgent
    if ready is None:
        if active is None or is_urgent or now >= half_life(active):
            yield Prepare(kind)
    elif active is None:
        if not wait or now >= published_long_enough(ready):
            yield Activate(ready)
    elif is_urgent or now >= hand_over(active):
        yield Activate(ready)
