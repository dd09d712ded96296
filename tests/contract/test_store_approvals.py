"""Approvals: one is open for one thing at a time, a token stands on one, and each goes with its task's tree."""

from dataclasses import replace
from datetime import timedelta

import pytest

from broker.errors import Conflict, Invalid
from broker.server.store.approval_ports import ApprovalFilter
from broker.server.store.ports import Store
from broker.server.store.tables.housekeeping import KEPT_AFTER_END
from broker.tasks.approval import Approval, ApprovalState, Verdict, decide, lapse, use
from tests.unit.server.store.samples import HOUR, NOW, SECOND, ended, task
from tests.unit.tasks.test_approval import ASKED, WANTED, payment, person

MINUTE = timedelta(minutes=1)


def asked(number: int = 1, **wanted: object) -> Approval:
    at = NOW + number * SECOND
    members = {"task": "tsk_1", "root": "tsk_1"} | wanted
    return replace(
        ASKED,
        id=f"apr_{number}",
        wanted=replace(WANTED, **members),  # type: ignore[arg-type]
        created_at=at,
        asked_at=at,
        expires_at=at + HOUR,
    )


def approved(approval: Approval) -> Approval:
    at = approval.created_at + MINUTE
    return decide(approval, Verdict.APPROVE, by="carol", now=at, approver=person(), until=at + MINUTE, reason="seen")


async def test_it_comes_back_as_it_was_and_moves_on(store: Store) -> None:
    one = asked()
    await store.write(lambda w: [w.add_task(task()), w.add_approval(one)])
    assert await store.read(lambda r: r.approval("apr_1")) == one
    assert await store.read(lambda r: r.approval("none")) is None
    yes = approved(one)
    await store.write(lambda w: w.replace_approval(yes, was=ApprovalState.PENDING))
    used = use(yes, "jti_1", yes.created_at + MINUTE)
    await store.write(lambda w: w.replace_approval(used, was=ApprovalState.APPROVED))
    assert await store.read(lambda r: r.approval("apr_1")) == used
    assert await store.read(lambda r: r.approval_of_token("jti_1")) == used
    assert await store.read(lambda r: r.approval_of_token("jti_2")) is None
    for late in (yes, decide(one, Verdict.DENY, by="dave", now=NOW + MINUTE)):
        with pytest.raises(Conflict):
            await store.write(lambda w, late=late: w.replace_approval(late, was=ApprovalState.PENDING))


async def test_one_is_open_for_one_thing_at_a_time(store: Store) -> None:
    first, second = asked(), asked(2)
    await store.write(lambda w: [w.add_task(task()), w.add_approval(first)])
    with pytest.raises(Conflict) as conflict:
        await store.write(lambda w: w.add_approval(second))
    assert conflict.value.reason == "approval_exists"
    # Something else, and the same again once the first is over.
    await store.write(lambda w: w.add_approval(asked(3, authority=payment("1000"))))
    over = lapse(first, NOW + 2 * HOUR)
    await store.write(lambda w: w.replace_approval(over, was=ApprovalState.PENDING))
    await store.write(lambda w: w.add_approval(second))
    assert await store.read(lambda r: r.latest_approval("tsk_1", second.wanted.digest)) == second
    assert await store.read(lambda r: r.latest_approval("tsk_2", second.wanted.digest)) is None
    assert await store.read(lambda r: (r.count_approvals("tsk_1"), r.count_approvals("tsk_2"))) == (3, 0)


async def test_a_token_stands_on_one(store: Store) -> None:
    first, second = approved(asked()), approved(asked(2, authority=payment("1000")))
    await store.write(lambda w: [w.add_task(task()), w.add_approval(first), w.add_approval(second)])
    at = NOW + MINUTE
    await store.write(lambda w: w.replace_approval(use(first, "jti_1", at), was=ApprovalState.APPROVED))
    with pytest.raises(Conflict):
        await store.write(lambda w: w.replace_approval(use(second, "jti_1", at), was=ApprovalState.APPROVED))


async def test_pages_tell_what_counts_at_the_moment(store: Store) -> None:
    waiting, late = asked(), replace(asked(2, user="bob"), expires_at=NOW + MINUTE)
    yes, other = approved(asked(3, authority=payment("1"))), asked(4, task="tsk_2", root="tsk_2")
    made = (waiting, late, yes, other)
    await store.write(lambda w: [w.add_task(task()), w.add_task(task("tsk_2")), *(w.add_approval(one) for one in made)])

    async def ids(at: timedelta, **fields: object) -> list[str]:
        wanted = ApprovalFilter(now=NOW + at, **fields)  # type: ignore[arg-type]
        page = await store.read(lambda r: r.list_approvals(wanted))
        assert page.next is None
        return [one.id for one in page.approvals]

    assert await ids(SECOND) == ["apr_1", "apr_2", "apr_3", "apr_4"]
    assert await ids(SECOND, state=ApprovalState.PENDING) == ["apr_1", "apr_2", "apr_4"]
    assert await ids(MINUTE, state=ApprovalState.PENDING) == ["apr_1", "apr_4"]
    assert await ids(MINUTE, state=ApprovalState.APPROVED) == ["apr_3"]
    assert await ids(5 * MINUTE, state=ApprovalState.EXPIRED) == ["apr_2", "apr_3"]
    assert await ids(MINUTE, state=ApprovalState.DENIED) == []
    assert await ids(SECOND, user="bob") == ["apr_2"]
    assert await ids(SECOND, task="tsk_2", user="alice") == ["apr_4"]
    found, after = [], None
    for _ in range(4):
        page = await store.read(lambda r, after=after: r.list_approvals(ApprovalFilter(now=NOW), after=after, limit=1))
        found += [one.id for one in page.approvals]
        after = page.next
    assert (found, after) == (["apr_1", "apr_2", "apr_3", "apr_4"], None)
    with pytest.raises(Invalid):
        await store.read(lambda r: r.list_approvals(ApprovalFilter(now=NOW), after="x"))


async def test_it_is_forgotten_with_its_tree(store: Store) -> None:
    await store.write(lambda w: [w.add_task(task()), w.add_approval(asked())])
    await store.write(lambda w: w.replace_task(ended(task()), 1))
    await store.write(lambda w: w.sweep(NOW + HOUR, 100))
    assert await store.read(lambda r: r.approval("apr_1")) is not None
    await store.write(lambda w: w.sweep(NOW + KEPT_AFTER_END + 48 * HOUR + SECOND, 100))
    assert await store.read(lambda r: (r.task("tsk_1"), r.approval("apr_1"))) == (None, None)
