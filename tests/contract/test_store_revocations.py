"""What was signed, what was taken back, and the lists of it."""

from dataclasses import replace

from broker.server.store.ports import Store
from broker.server.store.revocation_rows import CrlRow, IssuedSvid, RevokedSvid
from tests.unit.server.store.samples import AGENT, HOUR, NODE, NOW, SECOND, session

END = (NOW + HOUR).replace(microsecond=0)  # certificates end in whole seconds
ISSUED = IssuedSvid("a1", "ab12", AGENT, "ent_web", str(NODE), END)
REVOKED = RevokedSvid("a1", "ab12", str(AGENT), "ent_web", NOW + HOUR, NOW, 1)
LIST = CrlRow("a1", False, 1, NOW, NOW + HOUR, b"\x00\xff DER")


class TestIssued:
    async def test_it_is_found_by_each_of_its_names_while_it_lives(self, store: Store) -> None:
        other = replace(ISSUED, serial="cd", entry_id="ent_db", not_after=END + HOUR)
        minted = replace(ISSUED, serial="ef", entry_id="", agent="")
        await store.write(lambda w: (w.add_issued(2, [ISSUED, other]), w.add_issued(3, [minted])))

        def found(wanted, now=NOW):
            return store.read(lambda r: r.issued_svids(wanted, now))

        assert await found("ab12") == (ISSUED,)
        assert await found("ent_db") == (other,)
        assert await found(str(AGENT)) == (ISSUED, other, minted)
        assert await found(str(AGENT), END) == (other,)
        # A name is looked for as a whole, and what stands for any letter in SQL stands for itself.
        assert await found("ab1") == await found("ent%") == await found("entXweb") == await found("") == ()

    async def test_what_has_expired_is_forgotten(self, store: Store) -> None:
        await store.write(lambda w: w.add_issued(2, [ISSUED]))
        assert await store.write(lambda w: w.sweep(NOW, 100)) == 0
        assert await store.write(lambda w: w.sweep(NOW + HOUR, 100)) == 1


class TestRevoked:
    async def test_once_is_once(self, store: Store) -> None:
        assert await store.write(lambda w: w.add_revoked(REVOKED))
        assert not await store.write(lambda w: w.add_revoked(replace(REVOKED, reason=4, revoked_at=NOW + SECOND)))
        assert await store.read(lambda r: r.revoked_svids()) == (REVOKED,)
        assert await store.read(lambda r: (r.is_revoked("ab12"), r.is_revoked("ab"))) == (True, False)
        assert await store.write(lambda w: w.add_revoked(replace(REVOKED, authority="a2")))

    async def test_it_outlives_the_certificate_for_a_while(self, store: Store) -> None:
        await store.write(lambda w: (w.add_revoked(REVOKED), w.put_crl(LIST)))
        assert await store.write(lambda w: w.sweep(NOW + 2 * HOUR, 100)) == 0
        assert await store.write(lambda w: w.sweep(NOW + 26 * HOUR, 100)) == 2


class TestLists:
    async def test_the_newest_of_each_kind_is_kept(self, store: Store) -> None:
        indirect = replace(LIST, indirect=True)
        newer = replace(LIST, number=2, der=b"newer", this_update=NOW + SECOND)
        await store.write(lambda w: [w.put_crl(row) for row in (indirect, LIST, newer)])
        assert await store.read(lambda r: r.crls()) == (newer, indirect)


async def test_a_session_remembers_the_serial_number_of_its_newest_leaf(store: Store) -> None:
    await store.write(lambda w: w.put_session(session(serial="ab")))
    await store.write(lambda w: w.put_session(session(serial="cd")))
    assert (await store.read(lambda r: r.session("ws_1"))).serial == "cd"
