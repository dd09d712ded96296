"""Callers that are half dead, that hand their connection on, or that change what they may do (A08, A09, A10, A11)."""

import pytest

from tests.attacks.attestation.arena import (
    DENIED,
    EVIL_UID,
    IS_ROOT,
    PROMPTLY,
    REFUSED,
    UID,
    Arena,
    served,
)
from tests.fakes.running_agent import until

pytestmark = pytest.mark.asyncio(loop_scope="package")
needs_users = pytest.mark.root("processes of other users")
CLONE_NEWUSER = 0x10000000


# --- A08: dead, but still in the table


@pytest.mark.bears("A08")
async def test_a_zombie_is_refused(duel: Arena) -> None:
    async with duel.puppet(duel.victim, uid=UID) as victim:
        zombie = await victim.do("zombie", duel.socket)
        with open(f"/proc/{zombie}/stat") as stat:
            assert stat.read().rpartition(")")[2].split()[0] == "Z"
        held = await victim.give()
        assert await held.call() in REFUSED
        assert await held.is_closed()
        assert await victim.do("ask", duel.socket) == served("/wl/victim")


@pytest.mark.bears("A08", "SP08")
@pytest.mark.parametrize("method", ["StartTask", "IssueToken", "ChangeTask"])
async def test_the_dead_have_no_tasks(duel: Arena, method: str) -> None:
    """The number of a process that has ended may be another's by the time of the exchange: the connection is its own alone."""
    async with duel.puppet(duel.victim, uid=UID) as victim:
        assert await victim.do("connect", duel.socket)
        living = await victim.give()
        assert (await living.call(method=f"/broker.agent.v1.Tasks/{method}")) not in REFUSED
        await victim.do("zombie", duel.socket)
        held = await victim.give()
        assert await held.call(method=f"/broker.agent.v1.Tasks/{method}") in REFUSED
        assert await held.is_closed()


@pytest.mark.bears("A08")
@pytest.mark.parametrize("when", ["before it connects", "after it connected", "after a call"])
async def test_a_process_without_its_first_thread_is_refused(duel: Arena, when: str) -> None:
    """The kernel tells nothing of such a process's executable: it is refused, cleanly, and never taken for another one."""
    async with duel.puppet(duel.victim, uid=UID) as victim:
        if when != "before it connects":
            assert await victim.do("connect", duel.socket)
        if when == "after a call":
            assert await victim.do("call") == served("/wl/victim")
        await victim.do("lose_leader")
        if when == "before it connects":
            assert await victim.do("ask", duel.socket) in REFUSED
        else:
            assert await victim.do("call") in REFUSED


# --- A09: a connection handed on by SCM_RIGHTS


@needs_users
@pytest.mark.bears("A09")
async def test_the_connection_of_a_dead_giver(duel: Arena) -> None:
    async with duel.puppet(duel.victim, uid=UID) as giver, duel.puppet(uid=EVIL_UID) as taker:
        assert await giver.do("connect", duel.socket)
        held = await giver.give()
        await taker.take(held)
        await giver.end()
        assert await taker.do("call") in REFUSED
        assert await held.is_closed()


@needs_users
@pytest.mark.bears("A09")
async def test_the_connection_of_a_living_giver_speaks_for_the_giver(duel: Arena) -> None:
    """Delegation, as documented: the kernel knows who connected, and whoever holds the connection speaks for him as long
    as he lives.
    """
    async with duel.puppet(duel.victim, uid=UID) as giver, duel.puppet(uid=EVIL_UID) as taker:
        assert await giver.do("connect", duel.socket)
        await taker.take(await giver.give())
        assert await taker.do("call") == served("/wl/victim")
        assert await taker.do("ask", duel.socket) == DENIED  # on a connection of its own it is itself
        await giver.end()
        assert await taker.do("call") in REFUSED


@pytest.mark.bears("A09")
async def test_an_attackers_connection_in_the_victims_hands(duel: Arena) -> None:
    """The other way round: whoever makes the victim use his connection gives the victim no identity, and gets none."""
    async with duel.puppet(uid=UID) as attacker, duel.puppet(duel.victim, uid=UID) as victim:
        assert await attacker.do("connect", duel.socket)
        await victim.take(await attacker.give())
        assert await victim.do("call") == DENIED


# --- A10: a stream that outlives its process


@pytest.mark.bears("A10")
async def test_a_stream_ends_with_its_process_and_no_rotation_reaches_it(duel: Arena) -> None:
    async with duel.puppet(duel.victim, uid=UID) as victim:
        assert await victim.do("connect", duel.socket)
        orphan = await victim.give()
        stream = await orphan.open_stream()
        assert await orphan.hear(stream) == served("/wl/victim")
        duel.register("two", f"unix:uid:{UID}", f"unix:path:{duel.victim}")
        assert await orphan.hear(stream) == served("/wl/victim", "/wl/two")  # while it lives, changes reach it
        await victim.end()
        duel.register("three", f"unix:uid:{UID}", f"unix:path:{duel.victim}")
        assert await orphan.hear(stream, PROMPTLY) in REFUSED
        assert await orphan.is_closed()


# --- A11: other rights after connect


@needs_users
@pytest.mark.bears("A11")
@pytest.mark.parametrize(("first", "then"), [(0, UID), (EVIL_UID, UID)], ids=["from root", "from another user"])
async def test_who_became_the_victims_user_after_connect_is_refused(duel: Arena, first: int, then: int) -> None:
    async with duel.puppet(duel.victim) as process:
        await process.do("effective", first)
        assert await process.do("connect", duel.socket)
        held = await process.give()
        await process.do("effective", 0)
        await process.do("become", then, then, [])
        assert await held.call() in REFUSED
        assert await process.do("ask", duel.socket) == served("/wl/victim")  # attested as what it is now


@needs_users
@pytest.mark.bears("A11")
async def test_who_was_the_victims_user_at_connect_is_refused(duel: Arena) -> None:
    duel.register("root", "unix:uid:0", f"unix:path:{duel.victim}")
    async with duel.puppet(duel.victim) as process:
        await process.do("effective", UID)
        assert await process.do("connect", duel.socket)
        await process.do("effective", 0)
        assert await process.do("call") in REFUSED
        assert await process.do("ask", duel.socket) == served("/wl/root")


@needs_users
@pytest.mark.bears("A11")
@pytest.mark.parametrize("change", [("groups", [4002, 4003]), ("group", 4003)], ids=["setgroups", "setgid"])
@pytest.mark.parametrize("asked_before", [False, True], ids=["at the first call", "after a call"])
async def test_other_groups_after_connect_are_refused(duel: Arena, change: tuple, asked_before: bool) -> None:
    duel.register("group", "unix:uid:0", "unix:supplementary_gid:4002", f"unix:path:{duel.evil}")
    async with duel.puppet() as process:
        assert await process.do("connect", duel.socket)
        if asked_before:
            assert await process.do("call") == DENIED
        await process.do(*change)
        # Between full checks a known session's groups may be a second old; what they were earned nothing.
        assert await process.do("call") in REFUSED
        assert await process.do("ask", duel.socket) == (served("/wl/group") if change[0] == "groups" else DENIED)


@pytest.mark.bears("A11")
async def test_fewer_capabilities_change_nobody(duel: Arena) -> None:
    async with duel.puppet(duel.victim, uid=UID) as victim:
        assert await victim.do("connect", duel.socket)
        await victim.do("drop_capabilities")
        assert await victim.do("call") == served("/wl/victim")


@pytest.mark.bears("A11", "A12")
async def test_another_user_namespace_after_connect_is_refused(duel: Arena) -> None:
    async with duel.puppet(duel.victim, uid=UID) as victim:
        assert await victim.do("connect", duel.socket)
        held = await victim.give()
        duel.may_unshare()
        await victim.do("unshare", CLONE_NEWUSER)
        assert await held.call() in REFUSED


@needs_users
@pytest.mark.bears("A11")
async def test_a_process_that_cannot_be_dumped_is_served_by_an_agent_of_root(duel: Arena) -> None:
    async with duel.puppet(duel.victim, uid=UID) as victim:
        await victim.do("dumpable", 0)
        assert await victim.do("ask", duel.socket) == served("/wl/victim")


@pytest.mark.bears("A11")
@pytest.mark.skipif(IS_ROOT, reason="root may read every process")
async def test_a_process_that_cannot_be_dumped_is_refused_by_an_agent_of_its_own_user(duel: Arena) -> None:
    async with duel.puppet(duel.victim) as victim:
        await victim.do("dumpable", 0)
        assert await victim.do("ask", duel.socket) in REFUSED
        await until(lambda: "process_unreadable" in duel.log)
        await victim.do("dumpable", 1)
        assert await victim.do("ask", duel.socket) == served("/wl/victim")
