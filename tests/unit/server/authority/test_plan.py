from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.server.authority.plan import (
    AHEAD,
    LEASE,
    PRUNE_GRACE,
    Activate,
    Prepare,
    Prune,
    Retire,
    Standing,
    next_due,
    plan,
)
from broker.server.authority.profile import BACKDATE
from broker.server.store.rows import (
    AdoptedAuthority,
    AuthorityKind,
    AuthorityRow,
    AuthorityState,
    Published,
    Source,
)
from tests.unit.server.authority.world import NOW

X509 = AuthorityKind.X509
DAY = timedelta(days=1)


ME, OTHER = "me", "other"


def row(name="a", state=AuthorityState.ACTIVE, start=NOW, life=DAY, kind=X509, replica=ME):
    return AuthorityRow(kind, name, b"", state, start - BACKDATE, start + life, replica=replica)


def due(*rows, held=("a", "b"), now=NOW, kinds=(X509,), heard=None, adopted=(), urgent=()):
    replicas = {} if heard is None else {OTHER: heard}
    return plan(Published(rows, adopted, 0, replicas), Standing(ME, frozenset(held), kinds, frozenset(urgent)), now)


def soonest(rows, held, now):
    return next_due(Published(tuple(rows)), Standing(ME, held, (X509,)), now)


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
    assert soonest([], held, NOW) is None
    assert soonest([row()], held, NOW) == NOW + DAY / 2
    assert soonest([row()], held, NOW + DAY / 2) == NOW + DAY * 5 / 6
    assert soonest([row("gone")], held, NOW) == NOW + DAY + PRUNE_GRACE
    assert soonest([row(state=AuthorityState.PREPARED)], held, NOW) == NOW + AHEAD


@pytest.mark.bears("K02")
def test_another_replicas_authorities_are_its_own_while_it_lives():
    active, prepared = row("x", replica=OTHER), row("y", AuthorityState.PREPARED, replica=OTHER)
    assert due(active, prepared, row(), heard=NOW) == ()
    assert due(active, prepared, row(), heard=NOW - LEASE) == (Retire(active), Prune(prepared))
    assert due(active, prepared, row()) == (Retire(active), Prune(prepared))
    over = replace(active, not_after=NOW - PRUNE_GRACE - timedelta(seconds=1))
    assert due(over, row(), heard=NOW) == (Prune(over),)


@pytest.mark.bears("K02")
def test_who_joins_others_publishes_before_it_signs():
    prepared = row(state=AuthorityState.PREPARED)
    assert due(prepared, heard=NOW) == ()
    assert due(prepared, heard=NOW, now=NOW + AHEAD) == (Activate(prepared),)
    # Alone there is nobody to wait for: nothing else signs meanwhile.
    assert due(prepared) == (Activate(prepared),)


@pytest.mark.bears("K05", "K06")
def test_of_two_active_ones_the_younger_stays():
    older, younger = row("a"), row("b", start=NOW + timedelta(hours=1))
    assert due(older, younger, now=NOW + timedelta(hours=2)) == (Retire(older),)


def test_a_tainted_root_is_left_at_once():
    active, prepared = row(), row("b", AuthorityState.PREPARED)
    assert due(active, urgent={"a"}) == (Prepare(X509),)
    assert due(active, prepared, urgent={"a"}) == (Activate(prepared),)
    assert due(active, prepared, urgent={"a", "b"}) == (Prune(prepared), Prepare(X509))


def test_what_was_adopted_goes_after_its_end():
    end = NOW - PRUNE_GRACE - timedelta(seconds=1)
    key = AdoptedAuthority(AuthorityKind.JWT, "k", b"", end, Source.DOWNSTREAM)
    for_ever = replace(key, id="e", not_after=datetime(9999, 12, 31, tzinfo=UTC))
    assert due(row(), adopted=(key, for_ever)) == (Prune(key),)
    assert next_due(Published((), (for_ever,)), Standing(ME, set(), ()), NOW) is None


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60))
@pytest.mark.bears("K01")
def test_there_is_always_exactly_one_active_and_it_was_published_before(pauses):
    rows, held, now, made = {}, set(), NOW, 0
    for pause in pauses:
        for _ in range(10):
            steps = due(*rows.values(), held=held, now=now)
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
        assert due(*rows.values(), held=held, now=now) == ()
        now += timedelta(seconds=pause)
