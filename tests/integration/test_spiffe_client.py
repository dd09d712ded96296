"""An independent SPIFFE client (PyPI ``spiffe``) against the whole system, in one process with our SDK."""

import asyncio
import os
import time
import warnings

import pytest

from broker._proto.broker.server.v1 import entries_pb2
from broker._proto.spire.api.types import entry_pb2, selector_pb2
from broker.client import Entries, dial_socket
from broker.client.calls import spiffe_id_message
from broker.dev.stage import Stage
from broker.sdk import Workload
from broker.spiffe import SpiffeId

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its generated messages are older than the installed protobuf
    from spiffe import JwtSource, WorkloadApiClient, X509Source

ME = "spiffe://dev.test/independent"
SHORT = 4  # seconds: long enough to be handed out, short enough to see a renewal


async def register(stage: Stage, spiffe_id: str, *, ttl: int = 0, **more) -> None:
    channel = dial_socket(stage.estate.layout.server_socket)
    entry = entry_pb2.Entry(
        spiffe_id=spiffe_id_message(SpiffeId(spiffe_id)),
        parent_id=spiffe_id_message(SpiffeId(stage.kept["node"])),
        selectors=[selector_pb2.Selector(type="unix", value=f"uid:{os.geteuid()}")],
        x509_svid_ttl=ttl,
    )
    try:
        await Entries(channel).create(entries_pb2.RegisteredEntry(entry=entry, **more))
    finally:
        await channel.close()


def serving(source: X509Source):
    return source.get_x509_context().default_svid


@pytest.mark.timeout(120)
@pytest.mark.bears("W15", "WA-03")
async def test_an_independent_client_gets_renews_and_validates_beside_our_sdk(estate: Stage) -> None:
    await register(estate, ME, ttl=SHORT)
    socket = f"unix://{estate.estate.layout.agent_socket}"

    def independent() -> None:
        with WorkloadApiClient(socket_path=socket) as client:
            svid = client.fetch_x509_svid()
            assert str(svid.spiffe_id) == ME
            jwt = client.fetch_jwt_svid(audience={"tests"})
            assert str(client.validate_jwt_svid(jwt.token, audience="tests").spiffe_id) == ME
            bundles = client.fetch_x509_bundles()
            assert bundles.get_bundle_for_trust_domain(svid.spiffe_id.trust_domain) is not None
        with X509Source(socket_path=socket) as source, JwtSource(socket_path=socket) as tokens:
            first = serving(source)
            assert str(tokens.fetch_svid(audience={"tests"}).spiffe_id) == ME
            deadline = time.monotonic() + 60
            while serving(source).leaf.serial_number == first.leaf.serial_number:
                assert time.monotonic() < deadline, "the source never renewed"
                time.sleep(0.05)  # its thread renews; there is nothing to wait on
            assert str(serving(source).spiffe_id) == ME

    async with Workload.connect(socket) as me:
        mine = await me.identity()
        assert str(mine.id) == ME
        await asyncio.to_thread(independent)
        assert (await me.jwt_svid("tests")).id == mine.id
