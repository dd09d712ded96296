"""Contexts and verdicts, by real handshakes in memory."""

import datetime as dt
import ssl
from pathlib import Path

import pytest

from broker.errors import InvalidSvid, Misconfigured
from broker.spiffe import BundleSet, SpiffeId
from broker.transport.tls import (
    Anonymous,
    ContextSource,
    SvidPeer,
    TlsIdentity,
    client_context,
    judge,
    peer_chain,
    roots_of,
    server_context,
)
from tests.unit.transport.pki import HOUR, Authority

A, B = Authority("a.example"), Authority("b.example")
BOTH = BundleSet.of(A.bundle, B.bundle)
SERVER = A.issue("/server")
NOW = dt.datetime.now(dt.UTC)


def handshake(
    server: ssl.SSLContext, client: ssl.SSLContext, session: ssl.SSLSession | None = None
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """The server's and the client's side after a whole handshake; raises what either of them raises."""
    pipes = [ssl.MemoryBIO() for _ in range(2)]
    theirs = client.wrap_bio(pipes[0], pipes[1], session=session)
    ours = server.wrap_bio(pipes[1], pipes[0], server_side=True)
    pending = [theirs, ours]
    for _ in range(10):
        for side in list(pending):
            try:
                side.do_handshake()
                pending.remove(side)
            except ssl.SSLWantReadError:
                pass
        if not pending:
            return ours, theirs
    raise AssertionError("no end of the handshake")


def server(client: str = "optional", bundles: BundleSet = BOTH) -> ssl.SSLContext:
    return server_context(SERVER, roots_of(bundles), client=client)  # type: ignore[arg-type]


def client(identity: TlsIdentity | None = None) -> ssl.SSLContext:
    return client_context(identity, roots_of(BOTH), ("h2",))


def test_a_verified_svid_is_the_peer_on_both_sides() -> None:
    ours, theirs = handshake(server(), client(A.issue("/agent")))
    peer = judge(ours, BOTH, NOW)
    assert isinstance(peer, SvidPeer)
    assert peer.svid.id == SpiffeId("spiffe://a.example/agent")
    other = judge(theirs, BOTH, NOW)
    assert isinstance(other, SvidPeer)
    assert other.svid.id == SpiffeId("spiffe://a.example/server")
    assert ours.version() == "TLSv1.3"
    assert ours.selected_alpn_protocol() == "h2"


def test_no_certificate_is_anonymous_where_it_is_optional() -> None:
    ours, _ = handshake(server(), client())
    assert judge(ours, BOTH, NOW) == Anonymous()


def test_no_certificate_ends_the_handshake_where_one_is_required() -> None:
    with pytest.raises(ssl.SSLError):
        handshake(server("required"), client())


def test_a_certificate_is_not_even_asked_for_where_none_is_wanted() -> None:
    ours, _ = handshake(server("none"), client(A.issue("/agent")))
    assert judge(ours, BOTH, NOW) == Anonymous()


@pytest.mark.bears("SP03")
def test_the_handshake_takes_a_foreign_ca_and_the_verdict_does_not() -> None:
    forged = B.issue("spiffe://a.example/agent")
    ours, _ = handshake(server(), client(forged))  # this is why the handshake proves nothing
    with pytest.raises(InvalidSvid):
        judge(ours, BOTH, NOW)


@pytest.mark.bears("PB15")
@pytest.mark.parametrize(
    "identity",
    [
        A.issue("/agent", "/other"),
        A.issue("/agent", "spiffe://b.example/agent"),
        A.issue("https://a.example/agent"),
        A.issue("spiffe://a.example"),
        A.issue("/agent", is_ca=True),
    ],
    ids=["two ids", "two trust domains", "no spiffe id", "no path", "ca as leaf"],
)
def test_a_leaf_against_the_rules_is_refused(identity: TlsIdentity) -> None:
    ours, _ = handshake(server(), client(identity))
    with pytest.raises(InvalidSvid):
        judge(ours, BOTH, NOW)


def test_time_is_judged_by_the_time_given() -> None:
    ours, _ = handshake(server(), client(A.issue("/agent")))
    with pytest.raises(InvalidSvid):
        judge(ours, BOTH, NOW + 2 * HOUR)


def test_a_trust_domain_that_is_no_longer_in_the_set_is_refused() -> None:
    ours, _ = handshake(server(), client(B.issue("/agent")))
    with pytest.raises(InvalidSvid):
        judge(ours, BundleSet.of(A.bundle), NOW)


def test_a_resumed_session_is_refused_whatever_it_says() -> None:
    tickets = server()
    tickets.num_tickets = 2  # as ssl does by default; ours sets none
    tickets.options &= ~ssl.OP_NO_TICKET
    theirs_context = client(A.issue("/agent"))
    theirs_context.options &= ~ssl.OP_NO_TICKET
    ours, theirs = handshake(tickets, theirs_context)
    ours.write(b"x")
    theirs.read(1)  # tickets come with the first data
    again, _ = handshake(tickets, theirs_context, session=theirs.session)
    assert again.session_reused
    assert again.getpeercert(binary_form=True) is not None  # what would grant authority from a ticket
    with pytest.raises(InvalidSvid) as caught:
        peer_chain(again)
    assert caught.value.reason == "session_resumed"


def test_a_session_of_ours_cannot_be_resumed() -> None:
    context, theirs_context = server(), client(A.issue("/agent"))
    ours, theirs = handshake(context, theirs_context)
    ours.write(b"x")
    theirs.read(1)
    assert theirs.session is None or not theirs.session.has_ticket
    again, _ = handshake(context, theirs_context, session=theirs.session)
    assert not again.session_reused


def test_older_tls_is_refused() -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        handshake(server(), old)


def test_a_server_under_another_root_is_refused_by_the_client() -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server(), client_context(None, roots_of(BundleSet.of(B.bundle)), ("h2",)))
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server(), client_context(None, (), ("h2",)))  # no roots: nothing is trusted


def test_the_unsafe_client_sees_the_chain_it_did_not_check() -> None:
    _, theirs = handshake(server(), client_context(None, (), ("h2",), unsafe_accept_any_server=True))
    assert peer_chain(theirs)[0] == SERVER.chain_der[0]  # OpenSSL adds the root it found in its store


def test_a_key_of_another_certificate_is_refused_without_a_word_of_it() -> None:
    with pytest.raises(Misconfigured) as caught:
        server_context(TlsIdentity(SERVER.chain_der, A.issue("/x").key), ())
    assert caught.value.__cause__ is None


def test_the_key_touches_no_file_and_leaves_no_descriptor() -> None:
    before = {one.name for one in Path("/proc/self/fd").iterdir()}
    server()
    assert {one.name for one in Path("/proc/self/fd").iterdir()} == before
    assert not list(Path("/tmp").glob("*tls-identity*"))


def test_repr_shows_no_key() -> None:
    assert "PRIVATE" not in repr(SERVER)
    assert repr(SERVER) == "TlsIdentity()"


def test_a_context_is_made_anew_when_identity_or_bundles_change() -> None:
    now = {"identity": SERVER, "bundles": BOTH}
    source = ContextSource(
        lambda: now["identity"],  # type: ignore[arg-type,return-value]
        lambda: now["bundles"],  # type: ignore[arg-type,return-value]
        lambda identity, bundles: server_context(identity, roots_of(bundles)),
    )
    first = source()
    assert source() is first
    now["bundles"] = BundleSet.of(A.bundle)
    second = source()
    assert second is not first
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(second, client(B.issue("/agent")))
    now["identity"] = A.issue("/server")
    assert source() is not second
