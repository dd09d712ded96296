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
    require_lineage_active,
    start_child,
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
