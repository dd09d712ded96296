"""The bundle endpoint over real TLS: what it serves, whom it asks for nothing, and its certificates from files."""

import asyncio
import os
import socket
import ssl
from contextlib import asynccontextmanager
from datetime import timedelta

import httpx2
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import ValidationError

from broker.clock import SystemClock
from broker.errors import Misconfigured
from broker.server.bundle_endpoint import ServingCertificate, bundle_endpoint
from broker.server.settings import BundleEndpointSettings
from broker.spiffe import Bundle, BundleSet, TrustDomain
from broker.spiffe.federation import Profile
from broker.transport.tls import SvidPeer, client_context, judge
from tests.fakes.bundle_endpoints import WebAuthority
from tests.unit.server.authority.world import StandingClock
from tests.unit.transport.pki import Authority

OWN = TrustDomain("example.org")
CA, WEB = Authority("example.org"), WebAuthority()
BUNDLE = CA.bundle.with_sequence(2**63).with_refresh_hint(1)


@asynccontextmanager
async def serving(bundle=lambda: BUNDLE, **changes):
    settings = BundleEndpointSettings(**{"address": "127.0.0.1", "port": 0, **changes})
    identity = CA.issue("/spire/server")
    listener = bundle_endpoint(settings, bundle=bundle, svid=lambda: identity, clock=SystemClock())
    await listener.start()
    try:
        yield listener
    finally:
        await listener.stop()


def trusting(*authorities) -> ssl.SSLContext:
    return client_context(None, [one.certificate.public_bytes(Encoding.DER) for one in authorities])


async def ask(listener, method="GET", path="/", context=None) -> httpx2.Response:
    async with httpx2.AsyncClient(verify=context or trusting(CA), trust_env=False) as client:
        return await client.request(method, f"https://127.0.0.1:{listener.port}{path}")


async def shake(listener, context) -> ssl.SSLObject:
    _, writer = await asyncio.open_connection("127.0.0.1", listener.port, ssl=context)
    found = writer.get_extra_info("ssl_object")
    writer.transport.abort()
    return found


@pytest.mark.bears("FE-11", "FE-12", "TB-01", "TB-02", "TB-03")
async def test_a_get_gives_the_newest_bundle_to_anybody():
    held = [BUNDLE]
    async with serving(lambda: held[0], refresh_hint="90s") as listener:
        answer = await ask(listener)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/json"
        first = Bundle.parse(OWN, answer.content)
        assert first == BUNDLE.with_refresh_hint(90)
        held[0] = Authority("example.org").bundle.with_sequence(2**63 + 1)
        assert Bundle.parse(OWN, (await ask(listener)).content).sequence == 2**63 + 1


async def test_nothing_else_is_there():
    async with serving() as listener:
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert (await ask(listener, method)).status_code == 405
        for path in ("/keys", "/bundle", "//", "/../etc/passwd", "/token"):
            assert (await ask(listener, path=path)).status_code == 404


@pytest.mark.bears("FE-14")
async def test_https_spiffe_shows_the_servers_svid():
    async with serving() as listener:
        peer = judge(await shake(listener, trusting(CA)), BundleSet.of(CA.bundle), SystemClock().now())
        assert isinstance(peer, SvidPeer)
        assert str(peer.svid.id) == "spiffe://example.org/spire/server"


@pytest.mark.bears("FE-06")
@pytest.mark.parametrize(
    ("version", "ciphers", "taken"),
    [
        (ssl.TLSVersion.TLSv1_3, None, True),
        (ssl.TLSVersion.TLSv1_2, "ECDHE-ECDSA-AES128-GCM-SHA256", True),
        (ssl.TLSVersion.TLSv1_2, "ECDHE-ECDSA-CHACHA20-POLY1305", True),
        (ssl.TLSVersion.TLSv1_2, "ECDHE-ECDSA-AES128-SHA256", False),
        (ssl.TLSVersion.TLSv1_2, "ECDHE-ECDSA-AES256-CCM", False),
        (ssl.TLSVersion.TLSv1_1, None, False),
    ],
)
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
async def test_tls_is_mozillas_intermediate(version, ciphers, taken):
    context = trusting(CA)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.minimum_version = context.maximum_version = version
    if version < ssl.TLSVersion.TLSv1_2:
        ciphers = "DEFAULT:@SECLEVEL=0"
    if ciphers:
        context.set_ciphers(ciphers)
    async with serving() as listener:
        if not taken:
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await shake(listener, context)
            return
        found = await shake(listener, context)
        assert ciphers is None or found.cipher()[0] == ciphers


@pytest.mark.bears("FE-11")
async def test_no_certificate_is_asked_for_and_a_resumed_session_is_served():
    context = trusting(CA)
    context.maximum_version = context.minimum_version = ssl.TLSVersion.TLSv1_2
    async with serving() as listener:
        loop = asyncio.get_running_loop()
        session, _ = await loop.run_in_executor(None, _get, listener.port, context, None)
        _, is_resumed = await loop.run_in_executor(None, _get, listener.port, context, session)
        assert is_resumed


def _get(port, context, session):
    with (
        socket.create_connection(("127.0.0.1", port), timeout=30) as raw,
        context.wrap_socket(raw, session=session) as tls,
    ):
        tls.sendall(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert tls.recv(15) == b"HTTP/1.1 200 OK"
        return tls.session, tls.session_reused


class TestFiles:
    @pytest.mark.bears("FE-10")
    async def test_https_web_shows_the_files_certificate(self, tmp_path):
        certificate, key = WEB.files(tmp_path, "127.0.0.1")
        context = ssl.create_default_context(cafile=str(WEB.write(tmp_path / "ca.pem")))
        async with serving(profile="https_web", cert_file_path=certificate, key_file_path=key) as listener:
            assert (await ask(listener, context=context)).status_code == 200

    async def test_they_are_read_again_when_they_change(self, tmp_path):
        certificate, key = WEB.files(tmp_path, "127.0.0.1")
        clock = StandingClock()
        serving = ServingCertificate(certificate, key, clock, every=60)
        first = serving.identity()
        assert serving.identity() is first
        WEB.files(tmp_path, "127.0.0.1")
        assert serving.identity() is first
        clock.advance(timedelta(seconds=61))
        second = serving.identity()
        assert second.chain_der != first.chain_der
        assert serving.identity() is second

    async def test_a_pair_that_does_not_fit_leaves_the_last_good_one(self, tmp_path):
        certificate, key = WEB.files(tmp_path, "127.0.0.1")
        clock = StandingClock()
        serving = ServingCertificate(certificate, key, clock, every=1)
        first = serving.identity()
        old = key.read_bytes()
        WEB.files(tmp_path, "127.0.0.1")
        new = key.read_bytes()
        for content in (old, b"half", None):
            if content is None:
                key.unlink()
            else:
                key.write_bytes(content)
            clock.advance(timedelta(seconds=2))
            assert serving.identity() is first
        key.write_bytes(new)
        clock.advance(timedelta(seconds=2))
        assert serving.identity().chain_der != first.chain_der

    @pytest.mark.parametrize("damage", ["missing", "empty", "swapped", "other key"])
    def test_what_cannot_be_served_is_refused_at_the_start(self, tmp_path, damage):
        certificate, key = WEB.files(tmp_path, "127.0.0.1")
        if damage == "missing":
            key.unlink()
        elif damage == "empty":
            certificate.write_bytes(b"")
        elif damage == "swapped":
            certificate, key = key, certificate
        else:
            os.replace(key, tmp_path / "kept")
            (tmp_path / "o").mkdir()
            os.replace(WEB.files(tmp_path / "o", "x")[1], key)
        with pytest.raises(Misconfigured) as refused:
            ServingCertificate(certificate, key, StandingClock(), every=1)
        assert refused.value.reason == "serving_certificate"
        assert "PRIVATE" not in refused.value.message

    def test_https_web_needs_its_files(self):
        with pytest.raises(ValidationError, match="ACME"):
            BundleEndpointSettings(profile=Profile.HTTPS_WEB)
