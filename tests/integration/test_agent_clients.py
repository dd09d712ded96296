"""An independent SPIFFE client, py-spiffe, against the agent: sources, rotation, restart of the agent."""

import asyncio
import shutil
import tempfile
import warnings
from datetime import timedelta
from pathlib import Path

import pytest

from tests.fakes.fake_server import FakeServer, entry_message
from tests.fakes.running_agent import ME, estate, serving, until

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its generated messages are older than the installed protobuf
    from spiffe import JwtSource, TrustDomain, WorkloadApiClient, X509Source
    from spiffe.workloadapi.errors import FetchX509SvidError


def held(source: X509Source):
    return source.get_x509_context().default_svid


@pytest.mark.bears("W15", "WA-03")
async def test_every_call_of_the_client() -> None:
    async with estate(entries=[entry_message("e1", "/wl/me", [ME], hint="me")]) as agent:

        def calls() -> None:
            with WorkloadApiClient(socket_path=f"unix://{agent.socket}") as client:
                svid = client.fetch_x509_svid()
                assert str(svid.spiffe_id) == "spiffe://example.org/wl/me"
                context = client.fetch_x509_context()
                assert context.x509_bundle_set.get_bundle_for_trust_domain(TrustDomain("example.org")) is not None
                assert (
                    client.fetch_x509_bundles().get_bundle_for_trust_domain(TrustDomain("example.org")).x509_authorities
                )
                assert (
                    client.fetch_jwt_bundles().get_bundle_for_trust_domain(TrustDomain("example.org")).jwt_authorities
                )
                token = client.fetch_jwt_svid(audience={"a", "b"})
                assert client.validate_jwt_svid(token.token, audience="b").spiffe_id == token.spiffe_id
                (one,) = client.fetch_jwt_svids(audience={"a"})
                assert one.audience == {"a"}

        await asyncio.to_thread(calls)


@pytest.mark.bears("WE-09")
async def test_the_client_without_an_identity() -> None:
    async with estate(entries=[entry_message("e1", "/x", ["unix:uid:4294967"])]) as agent:

        def calls() -> None:
            with (
                WorkloadApiClient(socket_path=f"unix://{agent.socket}") as client,
                pytest.raises(FetchX509SvidError, match="no identity issued"),
            ):
                client.fetch_x509_svid()

        await asyncio.to_thread(calls)


@pytest.mark.bears("W15")
async def test_sources_follow_rotation_and_a_restart_of_the_agent() -> None:
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    directory.chmod(0o755)
    closing = []
    try:
        async with FakeServer(directory) as server:
            server.entries["e1"] = entry_message("e1", "/wl/me", [ME])
            server.svid_ttl = timedelta(seconds=4)
            async with serving(server, directory) as agent:
                socket = f"unix://{agent.socket}"
                x509 = await asyncio.to_thread(X509Source, socket_path=socket, timeout_in_seconds=30)
                closing.append(x509)
                jwt = await asyncio.to_thread(JwtSource, socket_path=socket, timeout_in_seconds=30)
                closing.append(jwt)
                first = held(x509)
                assert str(first.spiffe_id) == "spiffe://example.org/wl/me"
                await until(lambda: held(x509).leaf.serial_number != first.leaf.serial_number)
                token = await asyncio.to_thread(jwt.fetch_svid, {"a"})
                assert str(token.spiffe_id) == "spiffe://example.org/wl/me"
                server.svid_ttl = timedelta(hours=1)
            second = held(x509)
            async with serving(server, directory):
                await until(lambda: held(x509).leaf.serial_number != second.leaf.serial_number, 15)
                server.put(entry_message("e1", "/wl/moved", [ME], revision=1))
                await until(lambda: held(x509).spiffe_id.path == "/wl/moved")
    finally:
        for source in closing:
            await asyncio.to_thread(source.close)
        shutil.rmtree(directory)
