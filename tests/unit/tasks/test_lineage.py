from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import BrokerError, PolicyDenied, Refused
from broker.spiffe import SpiffeId
from broker.tasks import (
    MAX_ACT_DEPTH,
    Cause,
    State,
    Supervision,
    Task,
    act_chain,
    end,
    lineage_epoch,
    lineage_state,
    require_lineage_active,
    start_child,
    start_successor,
    start_task,
    suspend,
)
from tests.unit.tasks.world import AGENT, HOUR, NOW, authority, delegation, detail, task


def agent(number: int) -> SpiffeId:
    return SpiffeId(f"spiffe://example.org/agent/{number}")


def child(parent: Task, *ancestors: Task, number: int | None = None, **fields: Any) -> Task:
    depth = parent.depth + 1 if number is None else number
    return start_child(
        parent,
        ancestors,
        **{
            "id": f"tsk_{depth + 1}",
            "agent": agent(depth),
            "session": "ws_2",
            "purpose": "a part of it",
            "authority": parent.authority,
            "now": NOW,
            "ttl": timedelta(minutes=20),
        }
        | fields,
    )


def successor(of: Task, *ancestors: Task, number: int = 9, **fields: Any) -> Task:
    return start_successor(of, ancestors, **{"id": f"tsk_after_{number}", "agent": agent(number), "now": NOW} | fields)


def overdue(of: Task) -> Task:
    return replace(of, created_at=NOW - HOUR, expires_at=NOW)


def family(length: int) -> list[Task]:
    """A chain of tasks, deepest first."""
    chain = [task()]
    while len(chain) < length:
        chain.insert(0, child(*chain))
    return chain


@pytest.mark.bears("TX21")
def test_a_task_ends_with_its_delegation_at_the_latest() -> None:
    assert task(ttl=timedelta(days=1)).expires_at == NOW + HOUR
    assert task(ttl=timedelta(minutes=5)).expires_at == NOW + timedelta(minutes=5)
    with pytest.raises(Refused) as refused:
        task(delegation=delegation(expires_at=NOW))
    assert refused.value.reason == "delegation_expired"


def test_a_root_is_its_own_root() -> None:
    made = start_task(
        id="tsk_9",
        agent=AGENT,
        session=None,
        purpose="watch",
        authority=authority(),
        delegation=delegation(),
        now=NOW,
        ttl=HOUR,
        supervision=Supervision.NONE,
    )
    assert (made.root, made.parent, made.depth, made.state) == ("tsk_9", None, 0, State.ACTIVE)
    assert made.supervision is Supervision.NONE


def test_a_child_has_the_user_and_root_of_its_parent() -> None:
    root = replace(task(), epoch=3)
    made = child(root)
    assert (made.user, made.root, made.parent, made.depth, made.epoch) == ("usr_1", "tsk_1", "tsk_1", 1, 3)
    assert made.delegation == root.delegation
    assert made.expires_at == NOW + timedelta(minutes=20)
    assert child(root, ttl=HOUR).expires_at == root.expires_at
    shorter = replace(root, expires_at=NOW + timedelta(minutes=5))
    assert child(made, shorter, ttl=HOUR).expires_at == shorter.expires_at


def test_a_child_gets_a_part_of_its_parents_authority() -> None:
    root = task(authority=authority(detail(actions=["inv.*"])))
    assert child(root, authority=authority(detail(actions=["inv.read"]))).authority.scope() == "inv.read"
    with pytest.raises(PolicyDenied) as refused:
        child(root, authority=authority(detail(actions=["other"])))
    assert refused.value.reason == "invalid_authorization_details"


@pytest.mark.bears("RV03", "RV04")
@pytest.mark.parametrize("place", [0, 1, 2])
def test_every_ancestor_must_be_active(place: int) -> None:
    chain = family(3)
    require_lineage_active(chain[0], chain[1:], NOW)
    for stopped in (
        suspend(chain[place], Cause.OPERATOR, NOW),
        end(chain[place], State.REVOKED, Cause.OPERATOR, NOW),
    ):
        broken = [*chain[:place], stopped, *chain[place + 1 :]]
        with pytest.raises(Refused):
            require_lineage_active(broken[0], broken[1:], NOW)
        with pytest.raises(Refused):
            child(*broken, number=9)


@pytest.mark.bears("AC02")
def test_a_chain_has_an_end() -> None:
    chain = family(MAX_ACT_DEPTH)
    assert len(act_chain(chain[0], chain[1:])) == MAX_ACT_DEPTH
    with pytest.raises(PolicyDenied) as refused:
        child(*chain)
    assert refused.value.reason == "act_chain_depth"
    with pytest.raises(PolicyDenied):
        child(*family(3), max_depth=3)
    assert child(*family(3), max_depth=4).depth == 3
    with pytest.raises(PolicyDenied):
        # Whatever a server's setting says: no token could tell of more.
        child(*chain, max_depth=MAX_ACT_DEPTH + 1)
    with pytest.raises(PolicyDenied):
        successor(*chain, max_depth=MAX_ACT_DEPTH + 1)
    permitted = [replace(each, delegation=delegation(max_hops=MAX_ACT_DEPTH + 1)) for each in chain]
    with pytest.raises(PolicyDenied):
        child(*permitted, max_depth=MAX_ACT_DEPTH + 1)


def test_a_user_who_permits_fewer_agents_counts_before_the_server() -> None:
    root = task(delegation=delegation(max_hops=2))
    below = child(root)
    for begin in (child, successor):
        with pytest.raises(PolicyDenied) as refused:
            begin(below, root, max_depth=MAX_ACT_DEPTH)
        assert refused.value.reason == "act_chain_depth"
    # Who gave the work away counts as well.
    assert successor(root).history == (AGENT,)
    with pytest.raises(PolicyDenied):
        successor(successor(root))


def test_a_servers_own_limit_counts_for_who_takes_over_too() -> None:
    chain = family(3)
    assert successor(*chain, max_depth=4).depth == chain[0].depth
    with pytest.raises(PolicyDenied) as refused:
        successor(*chain, max_depth=3)
    assert refused.value.reason == "act_chain_depth"


def test_who_takes_over_has_what_there_was_and_no_more() -> None:
    root = replace(task(authority=authority(detail(actions=["inv.*"]))), epoch=3)
    middle = replace(child(root), epoch=5)
    after = successor(middle, root)
    assert (after.root, after.parent, after.depth, after.epoch) == (root.id, root.id, 1, 5)
    assert (after.user, after.purpose, after.authority) == (middle.user, middle.purpose, middle.authority)
    assert (after.expires_at, after.session, after.supersedes) == (middle.expires_at, None, middle.id)
    # A root's is a tree of its own: no suspension of the old one is its.
    first = successor(root)
    assert (first.root, first.parent, first.depth, first.epoch) == (first.id, None, 0, 0)
    again = successor(first, number=8)
    assert again.history == (first.agent, root.agent)
    assert act_chain(again, []) == (agent(8), first.agent, root.agent)
    below = child(again, number=7)
    assert act_chain(below, [again]) == (agent(7), agent(8), first.agent, root.agent)
    for met in (root.agent, first.agent, again.agent):
        with pytest.raises(PolicyDenied) as refused:
            child(again, agent=met)
        assert refused.value.reason == "act_chain_cycle"


@pytest.mark.parametrize("place", [0, 1, 2])
def test_nothing_that_stands_still_or_is_over_is_handed_off(place: int) -> None:
    chain = family(3)
    for stopped in (suspend(chain[place], Cause.OPERATOR, NOW), overdue(chain[place])):
        broken = [*chain[:place], stopped, *chain[place + 1 :]]
        with pytest.raises(Refused):
            successor(*broken)


@pytest.mark.bears("RV03")
def test_the_state_that_counts_is_the_worst_of_the_line() -> None:
    leaf, middle, root = family(3)
    over = end(middle, State.COMPLETED, Cause.COMPLETED, NOW)
    still = suspend(middle, Cause.OPERATOR, NOW)
    assert lineage_state(leaf, [middle, root], NOW) is State.ACTIVE
    assert lineage_state(leaf, [over, root], NOW) is State.CASCADED
    assert lineage_state(leaf, [still, root], NOW) is State.SUSPENDED
    assert lineage_state(leaf, [still, end(root, State.REVOKED, Cause.OPERATOR, NOW)], NOW) is State.CASCADED
    assert lineage_state(suspend(leaf, Cause.OPERATOR, NOW), [middle, root], NOW) is State.SUSPENDED
    assert lineage_state(leaf, [overdue(middle), root], NOW) is State.CASCADED
    assert lineage_state(overdue(leaf), [over, root], NOW) is State.EXPIRED
    with pytest.raises(Refused):
        lineage_state(leaf, [root], NOW)


def test_the_epoch_that_counts_is_the_highest_of_the_line() -> None:
    leaf, middle, root = family(3)
    assert lineage_epoch([leaf, replace(middle, epoch=7), replace(root, epoch=2)]) == 7
    assert lineage_epoch([replace(leaf, epoch=9), replace(middle, epoch=7), root]) == 9


@pytest.mark.bears("AC03")
def test_a_chain_meets_nobody_twice() -> None:
    chain = family(3)
    for met in (each.agent for each in chain):
        with pytest.raises(PolicyDenied) as refused:
            child(*chain, agent=met)
        assert refused.value.reason == "act_chain_cycle"
    looped = [replace(chain[0], agent=chain[2].agent), *chain[1:]]
    with pytest.raises(Refused) as cycle:
        act_chain(looped[0], looped[1:])
    assert cycle.value.reason == "act_chain_cycle"


@pytest.mark.bears("AC01", "AC05")
def test_the_chain_is_of_our_own_records_present_actor_first() -> None:
    chain = family(3)
    assert act_chain(chain[0], chain[1:]) == (agent(2), agent(1), AGENT)
    assert act_chain(chain[2], []) == (AGENT,)


@pytest.mark.bears("AC01")
@pytest.mark.parametrize(
    "wrong",
    [
        lambda c: [],
        lambda c: [c[1]],
        lambda c: [c[2]],
        lambda c: [c[2], c[1]],
        lambda c: [c[1], c[2], c[2]],
        lambda c: [c[1], replace(c[2], id="tsk_x", root="tsk_x")],
        lambda c: [replace(c[1], root="tsk_other"), c[2]],
        lambda c: [replace(c[1], id="tsk_other"), c[2]],
        lambda c: [replace(c[1], depth=2), c[2]],
    ],
)
def test_ancestors_that_are_not_its_own_are_refused(wrong: Any) -> None:
    chain = family(3)
    with pytest.raises(Refused) as refused:
        act_chain(chain[0], wrong(chain))
    assert refused.value.reason == "task_lineage"


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(-1, 120)), max_size=8))
def test_authority_and_time_only_shrink_along_a_chain(steps: list[tuple[int, int]]) -> None:
    actions = ["inv.*", "inv.pay.*", "inv.pay.big", "inv.read", "other", "inv", "inv.pay"]
    chain = [task(authority=authority(detail(actions=["inv.*"])))]
    for number, (which, minutes) in enumerate(steps):
        try:
            chain.insert(
                0,
                child(
                    *chain,
                    number=number + 1,
                    authority=authority(detail(actions=[actions[which]])),
                    ttl=timedelta(minutes=minutes),
                ),
            )
        except BrokerError:
            continue
    for low, high in pairwise(chain):
        assert low.expires_at <= high.expires_at
        assert all(high.authority.narrow(low.authority) == low.authority for high in chain[chain.index(low) :])
