"""Tasks end with the identity they stand on: every cause gives the same row, records and frames."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from broker.server.identity.bundles import drop_bundle
from broker.server.identity.entries import Entries
from broker.server.identity.nodes import Nodes
from broker.server.store.bundle_rows import PublishedBundle
from broker.server.store.ports import Writer
from broker.server.store.revocation_rows import IssuedSvid
from broker.server.store.rows import AuthorityKind
from broker.server.tasks.config import TaskDefaults
from broker.server.tasks.withdrawals import AT_ONCE, Distrust, TaskWithdrawals
from broker.spiffe import Selector, SpiffeId, TrustDomain
from broker.tasks import Cause, State, Supervision, Task
from tests.fakes.oidc import OidcIssuer
from tests.unit.server.tasks.estate import AGENT, NODE, OTHER_NODE, TICKETS, WIKI, X5T, X5T_2, Estate, entry, running
from tests.unit.server.tasks.watching import frames, refusal, task_of

OPERATOR = "operator:uid:0"
FREE = TaskDefaults(allow_unsupervised=True)


def entries_of(estate: Estate) -> Entries:
    return Entries(estate.store, estate.directory, estate.clock, AGENT.trust_domain, TaskWithdrawals())


def nodes_of(estate: Estate) -> Nodes:
    return Nodes(estate.store, estate.directory, estate.clock, TaskWithdrawals())


async def delete_entry(estate: Estate) -> None:
    await entries_of(estate).delete(["entry-1"], OPERATOR)


async def expire_entry(estate: Estate) -> None:
    over = estate.clock.now() - timedelta(seconds=1)
    await entries_of(estate).update([("entry-1", lambda one: replace(one, expires_at=over))], "somebody")
    await entries_of(estate).prune()


async def move_entry(estate: Estate) -> None:
    await entries_of(estate).update([("entry-1", lambda one: replace(one, parent_id=OTHER_NODE))], OPERATOR)


async def rename_entry(estate: Estate) -> None:
    other = SpiffeId("spiffe://example.org/another")
    await entries_of(estate).update([("entry-1", lambda one: replace(one, spiffe_id=other))], OPERATOR)


async def withdraw_tasks(estate: Estate) -> None:
    await entries_of(estate).update([("entry-1", lambda one: replace(one, may_start_tasks=False))], OPERATOR)


async def ban(estate: Estate) -> None:
    await nodes_of(estate).ban(NODE, OPERATOR)


async def evict(estate: Estate) -> None:
    await nodes_of(estate).delete(NODE, OPERATOR)


async def purge(estate: Estate) -> None:
    later = estate.clock.now() + timedelta(days=30)
    assert await nodes_of(estate).prune(later, 10, include_non_reattestable=True)


async def signed(estate: Estate, authority: str, serial: str) -> None:
    end = estate.clock.now() + timedelta(hours=1)
    svid = IssuedSvid(authority, serial, AGENT, "entry-1", str(NODE), end)
    await estate.store.write(lambda writer: writer.add_issued(int(serial, 16), [svid]))


async def distrust(estate: Estate) -> None:
    await signed(estate, "ca-1", "a1")
    await Distrust(estate.store, estate.clock).authority(AuthorityKind.X509, "ca-1", OPERATOR)


@pytest.mark.bears("V11", "SP10", "RV11")
@pytest.mark.parametrize(
    ("withdraw", "cause", "session", "by"),
    [
        (delete_entry, Cause.ENTRY_DELETED, "entry_gone", OPERATOR),
        (expire_entry, Cause.ENTRY_DELETED, "entry_gone", "server"),
        (move_entry, Cause.ENTRY_DELETED, "entry_gone", OPERATOR),
        (rename_entry, Cause.ENTRY_DELETED, "entry_gone", OPERATOR),
        (withdraw_tasks, Cause.ENTRY_DELETED, None, OPERATOR),
        (ban, Cause.AGENT_BANNED, "agent_banned", OPERATOR),
        (evict, Cause.AGENT_BANNED, "agent_banned", OPERATOR),
        (purge, Cause.AGENT_BANNED, "agent_banned", "server"),
        (distrust, Cause.AUTHORITY_TAINTED, "authority_tainted", OPERATOR),
    ],
)
async def test_each_cause_gives_the_same_row_records_and_frames(
    estate: Estate, withdraw: Callable[[Estate], Awaitable[None]], cause: Cause, session: str | None, by: str
) -> None:
    await estate.report("ws_1", X5T, serial="a1")
    task = await estate.start(estate.actor(serial="a1"))
    verified = estate.verify(await estate.issue(task))
    await withdraw(estate)
    over = await task_of(estate, task.id)
    assert (over.state, over.cause) == (State.REVOKED, cause)
    assert await refusal(estate, verified) != ""
    (record,) = await estate.records("task_ended")
    assert (record.actor, record.subject, record.fields["cause"]) == (by, task.id, cause.value)
    trees = [frame for frame in await frames(estate) if frame.kind == "subtree"]
    assert [(frame.root, frame.epoch, frame.cause) for frame in trees] == [(task.id, 1, cause.value)]
    assert record.fields["frame_seq"] == trees[0].seq
    gone = [record.fields["cause"] for record in await estate.records("session_ended")]
    assert gone == ([session] if session else [])


async def test_another_selector_or_a_new_description_ends_nothing(estate: Estate) -> None:
    task = await estate.start()
    selectors = frozenset({Selector("unix:uid:1000"), Selector("unix:gid:1000")})
    await entries_of(estate).update([("entry-1", lambda one: replace(one, selectors=selectors))], OPERATOR)
    assert (await task_of(estate, task.id)).state is State.ACTIVE
    assert await estate.records("session_ended") == []


@pytest.mark.bears("SP09")
async def test_only_the_instance_behind_what_is_gone_loses_its_tasks(estate: Estate) -> None:
    await estate.put_entry(entry("entry-9", AGENT, parent_id=OTHER_NODE))
    one = await estate.start()
    there = estate.actor(agent=OTHER_NODE, session="ws_9", entry_id="entry-9", x5t=X5T_2)
    two = await estate.start(there)
    await ban(estate)
    assert (await task_of(estate, one.id)).cause is Cause.AGENT_BANNED
    assert (await task_of(estate, two.id)).state is State.ACTIVE
    await entries_of(estate).delete(["entry-1"], OPERATOR)
    assert (await estate.issue(two, there)).task_id == two.id


async def test_a_task_without_a_process_ends_with_the_last_entry_that_let_it_start(
    tmp_path: Path, oidc: OidcIssuer
) -> None:
    async with running(tmp_path, oidc, defaults=FREE) as estate:
        await estate.put_entry(entry("entry-9", AGENT, parent_id=OTHER_NODE))
        alone = await estate.start(supervision=Supervision.NONE)
        await delete_entry(estate)
        assert (await task_of(estate, alone.id)).state is State.ACTIVE
        await entries_of(estate).update([("entry-9", lambda one: replace(one, may_start_tasks=False))], OPERATOR)
        over = await task_of(estate, alone.id)
        assert (over.state, over.cause) == (State.REVOKED, Cause.ENTRY_DELETED)


async def test_an_entry_that_is_not_removed_ends_nothing(estate: Estate) -> None:
    task = await estate.start()
    await entries_of(estate).delete(["", "none"], OPERATOR)
    assert (await task_of(estate, task.id)).state is State.ACTIVE


async def foreign(estate: Estate, spiffe_id: str) -> Task:
    """A task of a workload of another trust domain, written by hand: none is admitted yet."""
    own = await estate.start()
    name = f"tsk_{len(spiffe_id)}"
    task = replace(own, id=name, root=name, agent=SpiffeId(spiffe_id), session=None)
    await estate.store.write(lambda writer: writer.add_task(task))
    return task


async def test_a_trust_domain_that_is_not_federated_with_any_more_loses_its_tasks(estate: Estate) -> None:
    theirs = await foreign(estate, "spiffe://partner.test/agent")
    others = await foreign(estate, "spiffe://partner.test.evil/agent")
    partner = TrustDomain("partner.test")

    def act(writer: Writer) -> None:
        writer.put_federated_bundle(PublishedBundle(partner, (), (), 1, 0))
        drop_bundle(writer, partner, OPERATOR, estate.clock.now(), TaskWithdrawals())

    await estate.store.write(act)
    over = await task_of(estate, theirs.id)
    assert (over.state, over.cause) == (State.REVOKED, Cause.AUTHORITY_TAINTED)
    assert (await task_of(estate, others.id)).state is State.ACTIVE


@pytest.mark.bears("SP10")
async def test_an_authority_takes_all_sessions_with_it_that_hold_a_leaf_of_its_and_no_other(estate: Estate) -> None:
    many = AT_ONCE + 3
    for number in range(many):
        serial = f"{number + 16:x}"
        await signed(estate, "ca-1", serial)
        await estate.report(f"ws_{number}", X5T[:-4] + f"{number:03d}w", serial=serial)
    # One has a new leaf of another authority; the old one is still valid, and whoever stole it could use it.
    await signed(estate, "ca-2", "ffff")
    await estate.report("ws_0", X5T_2, serial="ffff")
    await estate.report("ws_other", X5T[:-3] + "zzw", serial="ffff")
    cases = Distrust(estate.store, estate.clock)
    await cases.authority(AuthorityKind.JWT, "ca-1")
    assert await estate.records("session_ended") == []
    await cases.authority(AuthorityKind.X509, "ca-1")
    ended = {record.subject for record in await estate.records("session_ended")}
    assert ended == {f"ws_{number}" for number in range(many)}
    await cases.settle(["ca-1"], [TICKETS.text, WIKI.text])
    assert len(await estate.records("session_ended")) == many


async def test_tokens_for_an_audience_that_is_registered_no_longer_are_revoked_at_the_start(estate: Estate) -> None:
    task = await estate.start()
    token = estate.verify(await estate.issue(task))
    cases = Distrust(estate.store, estate.clock)
    await cases.settle([], [TICKETS.text])
    assert await refusal(estate, token) == ""
    await cases.settle([], [WIKI.text])
    assert await refusal(estate, token) == "token_revoked"
    (record,) = await estate.records("token_revoked")
    assert (record.actor, record.subject, record.fields["reasons"]) == ("server", task.id, ("audience_gone",))
    assert (await task_of(estate, task.id)).state is State.ACTIVE
