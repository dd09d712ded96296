"""An SVID is revoked: the list arrives on open streams, OpenSSL and our port refuse the leaf, its process gets a new one."""

import asyncio
import json
import shutil
import ssl
import subprocess
import sys
import tempfile
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, load_der_private_key

from broker._proto.broker.server.v1 import revocations_pb2
from broker._proto.spiffe import workload_pb2
from broker.client import Revocations, dial_socket
from broker.clock import SystemClock
from broker.errors import InvalidSvid, NotFound, Refused
from broker.sdk.workload import Workload
from broker.spiffe import Bundle, BundleSet, verify_x509_svid
from broker.spiffe.revocation import read_crls
from broker.spiffe.x509svid import split_der
from broker.transport.tls import TlsIdentity, client_context
from tests.fakes.running_agent import HEADER, until
from tests.integration.test_agent_server import TD, Estate

OWN = "spiffe://example.org"
KEY_COMPROMISE = revocations_pb2.REVOCATION_REASON_KEY_COMPROMISE
RevokeSvidsRequest = revocations_pb2.RevokeSvidsRequest


@pytest.fixture
async def estate():
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    directory.chmod(0o755)
    yield Estate(directory)
    shutil.rmtree(directory)


async def revoke(running, **target) -> revocations_pb2.RevokeSvidsResponse:
    channel = dial_socket(running.socket_path)
    try:
        return await Revocations(channel).revoke(RevokeSvidsRequest(reason=KEY_COMPROMISE, **target))
    finally:
        await channel.close()


def serial_of(svid: workload_pb2.X509SVID) -> int:
    return x509.load_der_x509_certificate(split_der(svid.x509_svid)[0]).serial_number


def listed(message) -> set[int]:
    return {entry.serial_number for der in message.crl for entry in x509.load_der_x509_crl(der)}


async def until_listed(call, serial: int):
    async with asyncio.timeout(30):
        while True:
            message = await call.read()
            if serial in listed(message):
                return message


async def served(port: int, svid: workload_pb2.X509SVID) -> bytes:
    """Ask the server's TLS port for a page with this SVID; what it answers, or nothing when it hangs up."""
    key = load_der_private_key(svid.x509_svid_key, None)
    context = client_context(TlsIdentity(tuple(split_der(svid.x509_svid)), key), split_der(svid.bundle))
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        writer.write(b"GET /keys HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        answer = await reader.read(-1)
        writer.close()
    except (ssl.SSLError, ConnectionError):
        return b""
    return answer


def openssl(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["openssl", *arguments], capture_output=True, text=True, timeout=30, check=False)


def pem(path: Path, ders, load) -> Path:
    path.write_bytes(b"".join(load(der).public_bytes(Encoding.PEM) for der in ders))
    return path


def openssl_verdict(directory: Path, svid: workload_pb2.X509SVID, crls) -> str:
    """What ``openssl verify -crl_check`` says of a leaf under these lists."""
    leaf = pem(directory / "leaf.pem", split_der(svid.x509_svid)[:1], x509.load_der_x509_certificate)
    roots = pem(directory / "roots.pem", split_der(svid.bundle), x509.load_der_x509_certificate)
    lists = pem(directory / "crls.pem", crls, x509.load_der_x509_crl)
    said = openssl("verify", "-x509_strict", "-crl_check", "-CAfile", str(roots), "-CRLfile", str(lists), str(leaf))
    return said.stdout + said.stderr


@pytest.mark.bears("2.5", "2.6", "WA-05")
async def test_a_revoked_svid_is_on_the_streams_and_refused_everywhere(estate, tmp_path) -> None:
    async with estate.server() as running, estate.agent() as agent, agent.workload() as stub:
        await estate.register(agent)
        call = stub.FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=HEADER)
        bundles = stub.FetchX509Bundles(workload_pb2.X509BundlesRequest(), metadata=HEADER)
        first, known = await call.read(), await bundles.read()
        (old,) = first.svids
        assert first.crl
        assert listed(first) == listed(known) == set()
        assert ": OK" in openssl_verdict(tmp_path, old, first.crl)
        assert (await served(running.port, old)).startswith(b"HTTP/1.1 200")
        await until(lambda: agent.agent.reports.is_settled)

        serial = serial_of(old)
        done = await revoke(running, serial=revocations_pb2.SerialNumber(serial_number=f"{serial:X}"))
        assert (done.revoked, done.already_revoked) == (1, 0)
        assert (done.svids[0].spiffe_id, done.svids[0].serial_number) == (f"{OWN}/wl/me", f"{serial:x}")
        assert len(done.sessions_ended) == 1
        assert is_refused(await served(running.port, old))

        message, told = await until_listed(call, serial), await until_listed(bundles, serial)
        # Full set per message: the identity is there, with another key under another serial number.
        (new,) = message.svids
        assert serial_of(new) != serial
        assert new.x509_svid_key != old.x509_svid_key
        assert tuple(told.crl) == tuple(message.crl)
        assert "certificate revoked" in openssl_verdict(tmp_path, old, message.crl)
        assert ": OK" in openssl_verdict(tmp_path, new, message.crl)
        assert (await served(running.port, new)).startswith(b"HTTP/1.1 200")
        own = Bundle.from_workload_api(TD, x509_der=told.bundles[OWN])
        bundle = own.with_revoked(read_crls(told.crl, own.x509_authorities))
        with pytest.raises(InvalidSvid) as refused:
            verify_x509_svid(split_der(old.x509_svid), BundleSet.of(bundle), now=SystemClock().now())
        assert refused.value.reason == "svid_revoked"

        again = await revoke(running, serial=revocations_pb2.SerialNumber(serial_number=f"{serial:x}"))
        assert (again.revoked, again.already_revoked, len(again.sessions_ended)) == (0, 1, 0)


def is_refused(answer: bytes) -> bool:
    return not answer or answer.startswith(b"HTTP/1.1 403")


async def test_connections_of_a_revoked_leaf_end_at_once(estate) -> None:
    async with estate.server() as running, estate.agent() as agent:
        await estate.register(agent)
        (svid,) = (await agent.x509()).svids
        key = load_der_private_key(svid.x509_svid_key, None)
        context = client_context(TlsIdentity(tuple(split_der(svid.x509_svid)), key), split_der(svid.bundle))
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port, ssl=context)
        writer.write(b"GET /keys HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
        await revoke(running, spiffe_id=f"{OWN}/wl/me")
        async with asyncio.timeout(30):
            with suppress(ConnectionError, ssl.SSLError):
                await reader.read(-1)
        writer.close()


@pytest.mark.bears("I12")
async def test_what_a_lost_key_signed_is_on_an_indirect_list_and_two_streams_follow(estate, tmp_path) -> None:
    async with AsyncExitStack() as stack:
        first = AsyncExitStack()
        running = await first.enter_async_context(estate.server())
        agent = await stack.enter_async_context(estate.agent())
        stub = await stack.enter_async_context(agent.workload())
        entry_id = await estate.register(agent)
        streams = [stub.FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=HEADER) for _ in range(2)]
        (old,) = (await streams[0].read()).svids
        spare = await revoke(running, serial=revocations_pb2.SerialNumber(serial_number=f"{serial_of(old):x}"))
        assert spare.revoked == 1
        (held,) = (await until_listed(streams[0], serial_of(old))).svids
        await until_listed(streams[1], serial_of(old))
        await first.aclose()

        async with estate.server() as running:
            await until(lambda: agent.agent.sync.is_online, 30)
            assert is_refused(await served(running.port, old)), "a restart forgets nothing"
            assert (await served(running.port, held)).startswith(b"HTTP/1.1 200")
            done = await revoke(running, entry_id=entry_id)
            assert serial_of(held) in {int(one.serial_number, 16) for one in done.svids}
            messages = [await until_listed(call, serial_of(held)) for call in streams]
            (fresh,) = messages[0].svids
            assert [one.svids for one in messages] == [messages[0].svids] * 2
            assert serial_of(fresh) not in listed(messages[0])
            assert is_refused(await served(running.port, held))
            assert (await served(running.port, fresh)).startswith(b"HTTP/1.1 200")
            # OpenSSL does not read indirect lists unless told to: it says nothing wrong of the others.
            assert ": OK" in openssl_verdict(tmp_path, fresh, messages[0].crl)
            own = Bundle.from_workload_api(TD, x509_der=fresh.bundle)
            bundles = BundleSet.of(own.with_revoked(read_crls(messages[0].crl, own.x509_authorities)))
            for svid in (old, held):
                with pytest.raises(InvalidSvid):
                    verify_x509_svid(split_der(svid.x509_svid), bundles, now=SystemClock().now())


async def test_the_sdk_of_another_process_refuses_it(estate) -> None:
    async with estate.server() as running, estate.agent() as agent:
        await estate.register(agent)
        (old,) = (await agent.x509()).svids
        async with Workload.connect(f"unix://{agent.socket}") as workload:
            first = await workload.identity()
            assert verify_x509_svid(split_der(old.x509_svid), workload.bundles, now=SystemClock().now())
            await revoke(running, spiffe_id=f"{OWN}/wl/me")
            (domain,) = workload.bundles
            await until(lambda: len(workload.bundles[domain].revoked) > 0)
            with pytest.raises(InvalidSvid) as refused:
                verify_x509_svid(split_der(old.x509_svid), workload.bundles, now=SystemClock().now())
            assert refused.value.reason == "svid_revoked"
            await until(lambda: workload.current is not None and workload.current.x5t != first.x5t)


async def test_the_command_line_revokes(estate) -> None:
    async with estate.server() as running, estate.agent() as agent:
        await estate.register(agent)
        (old,) = (await agent.x509()).svids
        await until(lambda: agent.agent.reports.is_settled)
        command = [
            sys.executable,
            "-m",
            "broker.cli.main",
            "svid",
            "revoke",
            "--socket",
            str(running.socket_path),
            "-o",
            "json",
        ]
        ran = await asyncio.create_subprocess_exec(
            *command, "--spiffe-id", f"{OWN}/wl/me", "--reason", "key-compromise", stdout=subprocess.PIPE
        )
        answer = json.loads((await asyncio.wait_for(ran.communicate(), 60))[0])
        assert ran.returncode == 0
        # The one that was handed out, and the agent's spare.
        assert answer["revoked"] == len(answer["svids"]) >= 1
        assert f"{serial_of(old):x}" in {one["serial_number"] for one in answer["svids"]}
        assert len(answer["sessions_ended"]) == 1
        ran = await asyncio.create_subprocess_exec(
            *command, "--serial", "abc", stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert "no living SVID" in (await asyncio.wait_for(ran.communicate(), 60))[1].decode()
        assert ran.returncode != 0


async def test_agents_and_servers_are_not_revoked_but_banned(estate) -> None:
    async with estate.server() as running, estate.agent() as agent:
        with pytest.raises(Refused) as refused:
            await revoke(running, spiffe_id=str(agent.agent.node.id))
        assert refused.value.reason == "reserved_spiffe_id"
        with pytest.raises(NotFound):
            await revoke(running, session_id="ws_none")
