from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.server.authority.plan import PRUNE_GRACE, Activate, Prepare, Prune, Retire, next_due, plan
from broker.server.store.rows import AuthorityKind, AuthorityRow, AuthorityState
from tests.unit.server.authority.world import NOW

X509 = AuthorityKind.X509
DAY = timedelta(days=1)


def row(name="a", state=AuthorityState.ACTIVE, start=NOW, life=DAY, kind=X509):
    return AuthorityRow(kind, name, b"", state, start, start + life)


def due(*rows, held=("a", "b"), now=NOW, kinds=(X509,)):
    return plan(rows, frozenset(held), kinds, now)


def test_the_first_authority_is_prepared_then_activated():
    assert due() == (Prepare(X509),)
    prepared = row(state=AuthorityState.PREPARED)
    assert due(prepared) == (Activate(prepared),)
    assert due(row()) == ()


@pytest.mark.parametrize(("hours", "steps"), [(0, ()), (11.99, ()), (12, (Prepare(X509),)), (20, (Prepare(X509),))])
def test_a_successor_is_prepared_at_half_life(hours, steps):
    assert due(row(), now=NOW + timedelta(hours=hours)) == steps


def test_a_successor_takes_over_at_five_sixths():
    active, prepared = row(), row("b", AuthorityState.PREPARED, NOW + timedelta(hours=12))
    assert due(active, prepared, now=NOW + timedelta(hours=19.99)) == ()
    assert due(active, prepared, now=NOW + timedelta(hours=20)) == (Activate(prepared),)


def test_what_an_earlier_process_left_stays_until_nothing_of_it_is_valid():
    left = row("gone")
    assert due(left, row()) == (Retire(left),)
    old = replace(left, state=AuthorityState.OLD)
    assert due(old, row()) == ()
    active = row("b", start=NOW + DAY)
    assert due(old, active, now=NOW + DAY + PRUNE_GRACE) == ()
    assert due(old, active, now=NOW + DAY + PRUNE_GRACE + timedelta(seconds=1)) == (Prune(old),)


def test_what_never_signed_is_not_kept():
    left = row("gone", AuthorityState.PREPARED)
    assert due(left, row()) == (Prune(left),)


def test_a_prepared_one_that_has_ended_is_not_activated():
    prepared = row("b", AuthorityState.PREPARED, NOW - DAY)
    assert due(prepared, now=NOW) == (Prepare(X509),)


def test_kinds_do_not_mix():
    jwt = row("b", kind=AuthorityKind.JWT)
    assert due(row(), jwt, kinds=(X509, AuthorityKind.JWT, AuthorityKind.TASK)) == (Prepare(AuthorityKind.TASK),)


def test_the_next_look_is_at_the_next_step():
    held = {"a"}
    assert next_due([], held, NOW) is None
    assert next_due([row()], held, NOW) == NOW + DAY / 2
    assert next_due([row()], held, NOW + DAY / 2) == NOW + DAY * 5 / 6
    assert next_due([row("gone")], held, NOW) == NOW + DAY + PRUNE_GRACE


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60))
@pytest.mark.bears("K01")
def test_there_is_always_exactly_one_active_and_it_was_published_before(pauses):
    rows, held, now, made = {}, set(), NOW, 0
    for pause in pauses:
        for _ in range(10):
            steps = plan(rows.values(), held, (X509,), now)
            if not steps:
                break
            for step in steps:
                match step:
                    case Prepare():
                        made += 1
                        rows[str(made)] = row(str(made), AuthorityState.PREPARED, now, timedelta(seconds=3000))
                        held.add(str(made))
                    case Activate(chosen):
                        assert chosen.id in rows
                        for name, other in rows.items():
                            if other.state is AuthorityState.ACTIVE:
                                rows[name] = replace(other, state=AuthorityState.OLD)
                        rows[chosen.id] = replace(chosen, state=AuthorityState.ACTIVE)
                    case Prune(chosen):
                        assert now > chosen.not_after
                        del rows[chosen.id]
                        held.discard(chosen.id)
        active = [one for one in rows.values() if one.state is AuthorityState.ACTIVE]
        assert len(active) == 1
        assert plan(rows.values(), held, (X509,), now) == ()
        now += timedelta(seconds=pause)
