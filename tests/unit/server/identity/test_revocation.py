"""Taking SVIDs back: by each name, once, with all that hangs on them, and for good."""

import json
from dataclasses import replace
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from broker.errors import Conflict, Invalid, InvalidSvid, NotFound, Refused, Unavailable
from broker.server.authority.crl_publisher import CrlPublisher
from broker.server.authority.csr import Wishes
from broker.server.identity import revocation
from broker.server.identity.revocation import Target
from broker.server.identity.signing import X509Request
from broker.server.store.rows import AuthorityKind, SessionRow
from broker.server.tasks.sessions import ReportedSession, Sessions
from broker.spiffe import SpiffeId, verify_x509_svid
from broker.tasks.causes import Cause, SessionEnd
from broker.tasks.task import State
from tests.unit.server.identity.world import AGENT, OTHER, csr, world
from tests.unit.server.store.samples import task

REQUEST = csr()
APP = "spiffe://example.org/app"


@pytest.fixture
async def started(here):
    await here.revocation.load()
    await here.publisher.start()
    await here.add_node()
    await here.add("/app")
    return here


async def signed(here, count=1, agent=AGENT, entry="app"):
    """Sign for an agent; give the chains, leaf first."""
    outcomes = await here.signing.x509(agent, [X509Request(entry, REQUEST)] * count)
    return [one.chain_der for one in outcomes]


def serial(chain):
    return f"{x509.load_der_x509_certificate(chain[0]).serial_number:x}"


def verified(here, chain):
    return verify_x509_svid(chain, here.authorities.bundles, now=here.clock.now())


def is_refused(here, chain):
    try:
        verified(here, chain)
    except InvalidSvid as error:
        return error.reason == "svid_revoked"
    return False


async def session(here, chain, name="ws_1", *, tells_serial=True):
    svid = verified(here, chain)
    row = SessionRow(
        name,
        AGENT,
        svid.id,
        "app",
        svid.x5t,
        svid.not_after,
        here.clock.now(),
        serial=serial(chain) if tells_serial else "",
    )
    await here.store.write(lambda writer: writer.put_session(row))
    return row


async def records(here, event):
    found = await here.store.read(lambda reader: reader.records(0, 10_000))
    bodies = [json.loads(one.body) for one in found]
    return [one for one in bodies if one["event"] == event]


def listed(here):
    return {f"{one.serial_number:x}" for der in here.publisher.crls for one in x509.load_der_x509_crl(der)}


async def test_one_serial_number_and_no_other(started):
    one, two = await signed(started, 2)
    told = []
    started.authorities.subscribe(lambda: told.append(1))
    number = f"{int(serial(one), 16):032X}"
    written = ":".join(number[at : at + 2] for at in range(0, 32, 2))  # as OpenSSL does
    done = await started.revocation.revoke(Target(serial=written), 1, "operator:x")
    assert [row.serial for row in done.svids] == [serial(one)]
    assert told  # whoever judges by the bundle looks again
    assert is_refused(started, one)
    assert str(verified(started, two).id) == APP
    assert listed(started) == {serial(one)}
    (record,) = await records(started, "svid_revoked")
    assert (record["actor"], record["subject"], record["fields"]["serial"]) == ("operator:x", APP, serial(one))
    changes = await started.store.read(lambda reader: reader.changes_since(0, 1000))
    assert [change.kind for change in changes if "revoked" in change.kind] == ["svid_revoked"]


async def test_again_is_nothing_more(started):
    (chain,) = await signed(started)
    await session(started, chain)
    target = Target(serial=serial(chain))
    first = await started.revocation.revoke(target, 1, "a")
    numbers = [row.number for row in await started.store.read(lambda reader: reader.crls())]
    again = await started.revocation.revoke(target, 4, "b")
    assert (len(first.svids), first.before, first.sessions) == (1, 0, ("ws_1",))
    assert (again.svids, again.before, again.sessions, again.tasks) == ((), 1, (), 0)
    assert len(await records(started, "svid_revoked")) == 1
    assert [row.number for row in await started.store.read(lambda reader: reader.crls())] == numbers


async def test_a_session_ends_with_its_tasks_by_the_operator(started):
    mine, others = await signed(started, 2)
    await session(started, mine)
    await session(started, others, "ws_2")
    work = task(session="ws_1", agent=SpiffeId(APP))
    beside = task("tsk_2", session="ws_2", agent=SpiffeId(APP))
    await started.store.write(lambda writer: (writer.add_task(work), writer.add_task(beside)))
    done = await started.revocation.revoke(Target(session="ws_1"), 1, "uid:0")
    assert ([row.serial for row in done.svids], done.sessions, done.tasks) == ([serial(mine)], ("ws_1",), 1)
    found, left, frames = await started.store.read(
        lambda reader: (reader.task("tsk_1"), reader.task("tsk_2"), reader.frames_since(0))
    )
    assert (found.state, found.cause) == (State.REVOKED, Cause.SVID_REVOKED)
    assert left.state is State.ACTIVE
    assert {frame.kind for frame in frames} == {"session", "subtree"}
    (record,) = await records(started, "session_ended")
    assert (record["actor"], record["fields"]["cause"]) == ("uid:0", SessionEnd.SVID_REVOKED)
    (record,) = await records(started, "task_ended")
    assert record["actor"] == "uid:0"


async def test_what_an_agent_says_of_the_leaf_is_not_believed(started):
    await started.add_node(OTHER)
    await started.add("/app2", OTHER)
    (mine,), (theirs,) = await signed(started), await signed(started, agent=OTHER, entry="app2")
    row = await session(started, mine)
    # It names another agent's SVID as its session's.
    await started.store.write(lambda writer: writer.put_session(replace(row, serial=serial(theirs))))
    done = await started.revocation.revoke(Target(session="ws_1"), 0, "a")
    assert [row.serial for row in done.svids] == [serial(mine)]
    assert not is_refused(started, theirs)


async def test_an_agent_that_does_not_tell_loses_all_of_the_entry_on_its_node(started):
    chains = await signed(started, 2)
    await session(started, chains[0], tells_serial=False)
    done = await started.revocation.revoke(Target(session="ws_1"), 0, "a")
    assert {row.serial for row in done.svids} == set(map(serial, chains))
    assert done.sessions == ("ws_1",)


@pytest.mark.parametrize("target", [Target(entry_id="app"), Target(spiffe_id=APP)])
async def test_all_that_live(started, target):
    chains = await signed(started, 3)
    minted = (await started.signing.mint_x509(Wishes(SpiffeId(APP), (), x509.Name([])), REQUEST, None, "op")).chain_der
    await session(started, chains[1])
    done = await started.revocation.revoke(target, 0, "a")
    expected = {*map(serial, chains), *([serial(minted)] if target.spiffe_id else [])}
    assert {row.serial for row in done.svids} == expected == listed(started)
    assert done.sessions == ("ws_1",)
    # What is signed afterwards is another matter: the entry still says so.
    (fresh,) = await signed(started)
    assert not is_refused(started, fresh)


async def test_more_than_one_transaction(started, monkeypatch):
    monkeypatch.setattr(revocation, "AT_ONCE", 2)
    chains = await signed(started, 5)
    done = await started.revocation.revoke(Target(entry_id="app"), 0, "a")
    assert {row.serial for row in done.svids} == set(map(serial, chains))


async def test_a_serial_number_that_is_not_known(started):
    with pytest.raises(NotFound) as refused:
        await started.revocation.revoke(Target(serial="abc"), 0, "a")
    assert "authority" in refused.value.hint
    (row,) = [one for one in started.authorities.rows if one.kind is AuthorityKind.X509]
    for name in (row.id, ":".join(row.id[at : at + 2].upper() for at in range(0, len(row.id), 2))):
        done = await started.revocation.revoke(Target(serial="0ABC", authority=name), 0, "a")
        assert len(done.svids) + done.before == 1
    (kept,) = await started.store.read(lambda reader: reader.revoked_svids())
    assert (kept.serial, kept.not_after) == ("abc", row.not_after)
    assert listed(started) == {"abc"}
    with pytest.raises(NotFound):
        await started.revocation.revoke(Target(serial="2", authority="somebody"), 0, "a")


async def test_who_is_not_revoked_here(started):
    for target in (Target(spiffe_id=str(AGENT)), Target(spiffe_id="spiffe://example.org/spire/server")):
        with pytest.raises(Refused):
            await started.revocation.revoke(target, 0, "a")
    svid = await started.attest()
    (row,) = [one for one in started.authorities.rows if one.kind is AuthorityKind.X509]
    with pytest.raises(Refused):
        await started.revocation.revoke(Target(serial=f"{svid.serial:x}", authority=row.id), 0, "a")
    for target in (Target(spiffe_id="spiffe://other.org/a"), Target(spiffe_id="spiffe://example.org")):
        with pytest.raises(Invalid):
            await started.revocation.revoke(target, 0, "a")
    for target in (Target(entry_id="none"), Target(session="ws_none"), Target(spiffe_id="spiffe://example.org/none")):
        with pytest.raises(NotFound):
            await started.revocation.revoke(target, 0, "a")
    with pytest.raises(Invalid):
        await started.revocation.revoke(Target(entry_id="app"), 6, "a")  # on hold: nothing of ours comes back


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"serial": "1", "session": "ws"},
        {"session": "ws", "authority": "ca"},
        {"serial": "xyz"},
        {"serial": "0"},
        {"serial": "1" * 41},
        {"entry_id": 'a"%'},
        {"entry_id": "a" * 3000},
    ],
)
def test_a_target_is_one_thing_and_well_written(given):
    with pytest.raises(Invalid):
        Target(**given)


async def test_there_is_a_bound(started, monkeypatch):
    monkeypatch.setattr(revocation, "MAX_REVOKED", 2)
    await signed(started, 3)
    with pytest.raises(Conflict) as refused:
        await started.revocation.revoke(Target(entry_id="app"), 0, "a")
    assert refused.value.reason == "revocations_full"


async def test_revoked_it_is_even_if_no_list_can_be_signed(started, monkeypatch):
    (chain,) = await signed(started)

    async def broken():
        raise Unavailable("the disk is full")

    monkeypatch.setattr(started.publisher, "settle", broken)
    assert len((await started.revocation.revoke(Target(serial=serial(chain)), 0, "a")).svids) == 1
    assert is_refused(started, chain)


async def test_a_session_with_a_revoked_leaf_is_not_taken_in(started):
    (chain,) = await signed(started)
    svid = verified(started, chain)
    await started.revocation.revoke(Target(serial=serial(chain)), 0, "a")
    told = ReportedSession("ws_late", svid.id, "app", svid.x5t, svid.not_after, serial(chain))
    left_out = await Sessions(started.store, started.clock, started.directory).report(AGENT, [told], [])
    assert left_out["ws_late"].reason == "svid_revoked"
    assert await started.store.read(lambda reader: reader.session("ws_late")) is None


async def test_a_restart_forgets_nothing_and_lost_keys_get_an_indirect_list(tmp_path):
    async with world(tmp_path) as before:
        await before.revocation.load()
        await before.publisher.start()
        await before.add_node()
        await before.add("/app")
        early, late = await signed(before, 2)
        await before.revocation.revoke(Target(serial=serial(early)), 1, "a")
        (kept,) = before.publisher.crls
    async with world(tmp_path, before.clock) as after:
        await after.revocation.load()
        await after.publisher.start()
        assert is_refused(after, early)
        # The old one's list is what it was, the new one has its own; nothing is orphaned yet.
        assert kept in after.publisher.crls
        await after.revocation.revoke(Target(serial=serial(late)), 1, "a")
        assert is_refused(after, late)
        indirect = x509.load_der_x509_crl(after.publisher.crls[-1])
        assert indirect.extensions.get_extension_for_class(x509.IssuingDistributionPoint).value.indirect_crl
        assert serial(late) in {f"{one.serial_number:x}" for one in indirect}
        active = after.authorities.x509().issuer.name
        assert indirect.issuer == active


async def test_lists_are_renewed_and_gone_with_their_authority(started):
    (chain,) = await signed(started)
    await started.revocation.revoke(Target(serial=serial(chain)), 1, "a")
    first = started.authorities.x509().id
    shown = []
    for hours in (1, 12, 12):
        started.clock.advance(timedelta(hours=hours))
        await started.rotation.settle()
        await started.publisher.settle()
        lists = [x509.load_der_x509_crl(der) for der in started.publisher.crls]
        rows = {row.authority: row for row in await started.store.read(lambda reader: reader.crls())}
        shown.append((rows[first].number, len(lists), sum(map(len, lists))))
    # Nothing new after an hour; at half of its time the list anew, once more with the entry that has ended since, beside
    # the successor's; then the authority has ended, and so has its list: the two are its successors'.
    assert shown == [(2, 1, 1), (3, 2, 1), (3, 2, 0)]
    assert started.authorities.x509().id != first


async def test_two_publishers_of_one_key_never_give_one_number_twice(started):
    other = CrlPublisher(started.store, started.keys, started.authorities, started.clock)
    await other.settle()
    (chain,) = await signed(started)
    await started.revocation.revoke(Target(serial=serial(chain)), 1, "a")
    await other.settle()
    (row,) = await started.store.read(lambda reader: reader.crls())
    assert row.number == 2
    assert other.crls == started.publisher.crls == (row.der,)
    published = [one["fields"]["number"] for one in await records(started, "crl_published")]
    assert published == [1, 2]
    assert x509.load_der_x509_crl(row.der).public_bytes(Encoding.DER) == row.der
