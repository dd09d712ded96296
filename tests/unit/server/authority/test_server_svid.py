import ipaddress
from datetime import timedelta

import pytest
from cryptography import x509

from broker.errors import Misconfigured
from broker.keys import MemoryKeys
from broker.keys.local import generated
from broker.server.authority.authorities import Authorities
from broker.server.authority.server_svid import FILE_NAME, HANDOVER, MARGIN, ServerNames, ServerSvid
from broker.server.store.rows import AuthorityKind, AuthorityRow, AuthorityState, Published
from broker.spiffe import verify_x509_svid
from tests.unit.server.authority.world import DOMAIN, NOW, StandingClock, root_der

HOUR = timedelta(hours=1)


@pytest.fixture
def clock():
    return StandingClock()


class Process:
    """One life of the server: a new authority, the old one's certificate still published."""

    def __init__(self, clock, directory, before=(), ttl=HOUR):
        keys, signer = MemoryKeys(), generated(f"ca-{7 + len(before)}")
        keys._signers[signer.id] = signer
        self.authorities = Authorities(DOMAIN, keys)
        serial = 7 + len(before)
        der = root_der(signer, clock.now(), serial=serial)
        row = AuthorityRow(
            AuthorityKind.X509, f"ca-{serial}", der, AuthorityState.ACTIVE, clock.now(), clock.now() + 24 * HOUR
        )
        self.rows = (*before, row)
        self.authorities.replace(Published(self.rows, sequence=serial))
        self.svid = ServerSvid(
            self.authorities,
            clock,
            directory,
            trust_domain=DOMAIN,
            names=ServerNames.of("https://broker.example.org:8443", "127.0.0.1"),
            ttl=ttl,
        )

    def shown(self, now=NOW):
        return verify_x509_svid(self.svid.identity().chain_der, self.authorities.bundles, now=now)


def old(rows):
    return tuple(
        AuthorityRow(row.kind, row.id, row.public, AuthorityState.OLD, row.not_before, row.not_after) for row in rows
    )


def test_the_first_start_signs_one_with_the_servers_names(clock, tmp_path):
    process = Process(clock, tmp_path)
    process.svid.start()
    shown = process.shown()
    assert str(shown.id) == "spiffe://example.org/spire/server"
    names = shown.leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "broker.example.org" in names.get_values_for_type(x509.DNSName)
    assert ipaddress.ip_address("127.0.0.1") in names.get_values_for_type(x509.IPAddress)
    assert (tmp_path / FILE_NAME).stat().st_mode & 0o777 == 0o600
    assert "PRIVATE" not in repr(process.svid.identity())


def test_a_restart_shows_the_same_under_the_old_root(clock, tmp_path):
    before = Process(clock, tmp_path)
    before.svid.start()
    after = Process(clock, tmp_path, old(before.rows))
    after.svid.start()
    assert after.shown().serial == before.shown().serial


def test_one_whose_root_is_gone_or_that_has_expired_is_replaced(clock, tmp_path):
    before = Process(clock, tmp_path)
    before.svid.start()
    without = Process(clock, tmp_path)
    without.svid.start()
    assert without.shown().serial != before.shown().serial
    clock.advance(HOUR - MARGIN)
    later = Process(clock, tmp_path, old(without.rows))
    later.svid.start()
    assert later.shown(clock.now()).serial != without.shown().serial


@pytest.mark.parametrize("text", [b"", b"nonsense", b"-----BEGIN PRIVATE KEY-----\n"])
def test_a_broken_file_is_replaced(clock, tmp_path, text):
    (tmp_path / FILE_NAME).write_bytes(text)
    (tmp_path / FILE_NAME).chmod(0o600)
    process = Process(clock, tmp_path)
    process.svid.start()
    assert process.shown()


def test_a_file_that_others_may_read_stops_the_start(clock, tmp_path):
    before = Process(clock, tmp_path)
    before.svid.start()
    (tmp_path / FILE_NAME).chmod(0o640)
    with pytest.raises(Misconfigured):
        Process(clock, tmp_path, old(before.rows)).svid.start()


def test_one_that_was_kept_is_shown_long_enough_for_the_agents_to_come_back(clock, tmp_path):
    before = Process(clock, tmp_path)
    before.svid.start()
    clock.advance(timedelta(minutes=50))
    after = Process(clock, tmp_path, old(before.rows))
    after.svid.start()
    assert after.svid.rotate_at == clock.now() + HANDOVER
    clock.advance(timedelta(minutes=9))
    last = Process(clock, tmp_path, old(after.rows))
    last.svid.start()
    assert last.svid.rotate_at == last.shown(clock.now()).not_after - MARGIN


def test_names_of_a_wildcard_address():
    names = ServerNames.of("https://10.0.0.1:8443", "0.0.0.0")
    assert names.dns_names == ("localhost",)
    assert [str(one) for one in names.ip_addresses] == ["10.0.0.1", "127.0.0.1", "::1"]
