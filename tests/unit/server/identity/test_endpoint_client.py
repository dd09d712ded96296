"""The client of bundle endpoints over real sockets and TLS: whom it believes, and where it does not go."""

import asyncio
import contextlib
import ssl

import pytest

from broker.clock import SystemClock
from broker.errors import BrokerError, InvalidBundle, InvalidSvid, Misconfigured, Refused, Unavailable
from broker.server.identity import endpoint_client as module
from broker.server.identity.endpoint_client import EndpointClient
from broker.spiffe import Bundle, SpiffeId, TrustDomain
from broker.spiffe.federation import Profile, Relationship
from broker.transport.tls import public_context
from tests.fakes.bundle_endpoints import WebAuthority, endpoint, ok, redirect
from tests.unit.transport.pki import Authority

OTHER = TrustDomain("other.test")
SERVER = SpiffeId("spiffe://other.test/spire/server")
CA, WEB = Authority("other.test"), WebAuthority()
SERVED = CA.bundle.with_sequence(7)


@pytest.fixture
def client(tmp_path):
    return EndpointClient(SystemClock(), WEB.write(tmp_path / "web.pem"))


def spiffe(url, endpoint_id=SERVER):
    return Relationship(OTHER, url, Profile.HTTPS_SPIFFE, endpoint_id)


def web(url):
    return Relationship(OTHER, url, Profile.HTTPS_WEB)


def serving(line):
    return ok(SERVED.to_json())


async def refused(client, relationship, trust=None):
    with pytest.raises(BrokerError) as error:
        await client.fetch(relationship, trust)
    return error.value


class TestSpiffe:
    @pytest.mark.bears("FE-14")
    async def test_exactly_this_identity(self, client):
        async with endpoint(CA.issue("/spire/server"), serving) as one:
            assert await client.fetch(spiffe(one.url()), CA.bundle) == SERVED
            assert one.seen == ["GET / HTTP/1.1"]

    @pytest.mark.bears("FE-14", "FE-07")
    async def test_not_another_identity_and_nothing_is_asked_of_it(self, client):
        async with endpoint(CA.issue("/web"), serving) as one:
            error = await refused(client, spiffe(one.url()), CA.bundle)
            assert isinstance(error, InvalidSvid)
            assert error.reason == "endpoint_unexpected"
            assert one.seen == []

    async def test_not_another_authority(self, client):
        async with endpoint(Authority("other.test").issue("/spire/server"), serving) as one:
            error = await refused(client, spiffe(one.url()), CA.bundle)
            assert isinstance(error, Unavailable)
            assert error.reason == "endpoint_untrusted"
            assert one.seen == []

    @pytest.mark.bears("FE-04", "FE-14")
    async def test_not_an_identity_that_another_trust_domain_signed(self, client):
        third = Authority("third.test")
        async with endpoint(third.issue("spiffe://other.test/spire/server"), serving) as one:
            # The handshake trusts third.test here: the leaf's own trust domain is what counts.
            error = await refused(client, spiffe(one.url()), third.bundle)
            assert isinstance(error, InvalidSvid)
            assert one.seen == []

    @pytest.mark.bears("FE-15")
    async def test_an_endpoint_of_a_third_trust_domain(self, client):
        third = Authority("third.test")
        wanted = spiffe("https://x.test/", SpiffeId("spiffe://third.test/bundles"))
        async with endpoint(third.issue("/bundles"), serving) as one:
            relationship = spiffe(one.url(), wanted.endpoint_id)
            assert await client.fetch(relationship, third.bundle) == SERVED
            assert isinstance(await refused(client, relationship, CA.bundle), Unavailable)

    @pytest.mark.bears("FE-15")
    async def test_nobody_without_a_bundle_to_begin_with(self, client):
        async with endpoint(CA.issue("/spire/server"), serving) as one:
            for trust in (None, Bundle(OTHER)):
                error = await refused(client, spiffe(one.url()), trust)
                assert error.message == "can't perform SPIFFE Authentication: local copy of bundle not found"
            assert one.seen == []

    @pytest.mark.bears("FE-13", "I15")
    async def test_redirects_stay_at_the_host(self, client):
        def moved(line):
            return redirect("/there") if line.startswith("GET / ") else serving(line)

        async with endpoint(CA.issue("/spire/server"), moved) as one:
            assert await client.fetch(spiffe(one.url()), CA.bundle) == SERVED
            assert len(one.seen) == 2
        async with endpoint(CA.issue("/spire/server"), serving) as target:
            async with endpoint(CA.issue("/spire/server"), lambda line: redirect(target.url())) as one:
                error = await refused(client, spiffe(one.url()), CA.bundle)
                assert error.reason == "redirect_refused"
            assert target.seen == []

    async def test_tls_1_2_is_enough(self, client):
        context = public_context(CA.issue("/spire/server"))
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        async with endpoint(CA.issue("/x"), serving, context=context) as one:
            assert await client.fetch(spiffe(one.url()), CA.bundle) == SERVED


class TestWeb:
    @pytest.mark.bears("FE-10")
    async def test_the_name_is_what_counts(self, client):
        async with endpoint(WEB.issue("localhost", "127.0.0.1"), serving) as one:
            assert await client.fetch(web(one.url()), None) == SERVED
            assert await client.fetch(web(one.url("localhost")), None) == SERVED
        async with endpoint(WEB.issue("elsewhere.test"), serving) as one:
            error = await refused(client, web(one.url()))
            assert error.reason == "endpoint_untrusted"
            assert one.seen == []

    @pytest.mark.bears("FE-10")
    async def test_only_authorities_of_the_web(self, client):
        async with endpoint(WebAuthority().issue("127.0.0.1"), serving) as one:
            assert (await refused(client, web(one.url()))).reason == "endpoint_untrusted"
        async with endpoint(CA.issue("/spire/server"), serving) as one:
            assert "https_spiffe" in (await refused(client, web(one.url()))).hint

    async def test_the_machines_own_roots_unless_others_are_named(self, tmp_path):
        async with endpoint(WEB.issue("127.0.0.1"), serving) as one:
            assert (await refused(EndpointClient(SystemClock()), web(one.url()))).reason == "endpoint_untrusted"
        with pytest.raises(Misconfigured):
            EndpointClient(SystemClock(), tmp_path / "missing.pem")

    @pytest.mark.bears("FE-13")
    async def test_a_redirect_is_followed_and_not_kept(self, client):
        def moved(line):
            return redirect("/there", 307) if line.startswith("GET / ") else serving(line)

        async with endpoint(WEB.issue("127.0.0.1"), moved) as one:
            for _ in range(2):
                assert await client.fetch(web(one.url()), None) == SERVED
            assert one.seen == ["GET / HTTP/1.1", "GET /there HTTP/1.1"] * 2

    @pytest.mark.bears("I15")
    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
    async def test_a_redirect_does_not_lead_into_this_machine(self, client, host):
        """Whatever the target's name resolves to when it is dialled: the address of the connection counts."""
        async with endpoint(WEB.issue("localhost", "127.0.0.1"), serving) as target:
            configured = "localhost" if host != "localhost" else "127.0.0.1"
            answer = redirect(f"https://{host}:{target.port}/")
            async with endpoint(WEB.issue("localhost", "127.0.0.1"), lambda line: answer) as one:
                error = await refused(client, web(one.url(configured)))
            # ::1 is not listened on here: there it is refused by the kernel instead.
            assert error.reason == "redirect_refused" or (host == "[::1]" and error.reason == "endpoint_unreachable")
            assert target.seen == []

    @pytest.mark.bears("I15")
    @pytest.mark.parametrize(
        "location",
        ["http://127.0.0.1/", "file:///etc/passwd", "https://user:word@127.0.0.1/", "gopher://127.0.0.1/", "https:///"],
    )
    async def test_a_redirect_to_what_is_no_endpoint(self, client, location):
        async with endpoint(WEB.issue("127.0.0.1"), lambda line: redirect(location)) as one:
            assert isinstance(await refused(client, web(one.url())), Refused)

    @pytest.mark.bears("I15")
    async def test_redirects_end(self, client):
        async with endpoint(WEB.issue("127.0.0.1"), lambda line: redirect("/again")) as one:
            assert (await refused(client, web(one.url()))).reason == "redirect_refused"
            assert len(one.seen) == module.MAX_REDIRECTS + 1


class TestAnswers:
    @pytest.mark.bears("I15", "SP04")
    async def test_the_body_is_bounded(self, client, monkeypatch):
        monkeypatch.setattr(module, "MAX_DOCUMENT", 1000)
        chunk = b"400\r\n" + b" " * 0x400 + b"\r\n"
        endless = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunk * 50
        for answer in (ok(b" " * 2000), endless):
            async with endpoint(WEB.issue("127.0.0.1"), lambda line, answer=answer: answer) as one:
                assert (await refused(client, web(one.url()))).reason == "endpoint_too_large"

    @pytest.mark.bears("I15")
    async def test_the_time_is_bounded(self, client, monkeypatch):
        assert module.FETCH_SECONDS <= 10
        monkeypatch.setattr(module, "FETCH_SECONDS", 0.5)

        async def never(line):
            await asyncio.Event().wait()

        async with endpoint(WEB.issue("127.0.0.1"), never) as one:
            assert isinstance(await refused(client, web(one.url())), Unavailable)

    @pytest.mark.bears("I15")
    async def test_a_body_that_never_ends_is_not_waited_for(self, client, monkeypatch):
        """Each piece comes in time, the whole does not."""
        monkeypatch.setattr(module, "FETCH_SECONDS", 0.5)

        async def drip(reader, writer):
            with contextlib.suppress(OSError):
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
                while True:
                    writer.write(b" ")
                    await writer.drain()
                    await asyncio.sleep(0.05)

        context = public_context(WEB.issue("127.0.0.1"))
        async with await asyncio.start_server(drip, "127.0.0.1", 0, ssl=context) as one:
            url = f"https://127.0.0.1:{one.sockets[0].getsockname()[1]}/"
            async with asyncio.timeout(30):
                assert isinstance(await refused(client, web(url)), Unavailable)

    @pytest.mark.parametrize("status", ["204 No Content", "401 Unauthorized", "404 Not Found", "500 Oh"])
    async def test_another_status(self, client, status):
        answer = f"HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n".encode()
        async with endpoint(WEB.issue("127.0.0.1"), lambda line: answer) as one:
            assert (await refused(client, web(one.url()))).reason == "endpoint_status"

    async def test_an_encoded_answer(self, client):
        async with endpoint(WEB.issue("127.0.0.1"), lambda line: ok(b"x", "content-encoding: gzip")) as one:
            assert (await refused(client, web(one.url()))).reason == "endpoint_encoding"

    @pytest.mark.bears("FE-12", "TB-04")
    @pytest.mark.parametrize(
        "body", [b"", b"[]", b"{}", b"\xff\xfe{\x00}\x00", b'{"keys":1}', b'{"keys":[],"keys":[]}']
    )
    async def test_what_is_no_bundle(self, client, body):
        async with endpoint(WEB.issue("127.0.0.1"), lambda line: ok(body)) as one:
            assert isinstance(await refused(client, web(one.url())), InvalidBundle)

    @pytest.mark.bears("FE-16", "TB-08")
    async def test_the_trust_domain_is_the_one_that_was_configured(self, client):
        third = Authority("third.test").bundle
        async with endpoint(WEB.issue("127.0.0.1"), lambda line: ok(third.to_json())) as one:
            assert (await client.fetch(web(one.url()), None)).trust_domain == OTHER

    async def test_nobody_listens(self, client):
        async with endpoint(WEB.issue("127.0.0.1"), serving) as one:
            url = one.url()
        assert (await refused(client, web(url))).reason == "endpoint_unreachable"

    async def test_a_proxy_of_the_environment_is_not_used(self, client, monkeypatch):
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
        monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
        async with endpoint(WEB.issue("127.0.0.1"), serving) as one:
            assert await client.fetch(web(one.url()), None) == SERVED
