"""Rotation by hand over the real doors: SPIRE's service, our own, the command line, before a real agent."""

import asyncio
import json
import os
import shutil
import ssl
import sys
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, load_der_private_key

from broker._proto.spiffe import workload_pb2
from broker._proto.spire.api.server.localauthority.v1 import localauthority_pb2 as pb
from broker.audit.events import Event
from broker.audit.records import Record
from broker.errors import InvalidSvid
from broker.server.settings import KeySettings
from broker.server.store.rows import AuthorityKind, AuthorityState
from broker.server.store.sqlite import SqliteStore
from broker.spiffe import verify_x509_svid
from broker.spiffe.certificates import split_der
from broker.transport.tls import TlsIdentity, client_context
from tests.fakes.running_agent import HEADER, until
from tests.fakes.small_estate import issuer_key_id, leaf_of, running_agent, running_server


async def refusal(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details()


SOON = 10  # seconds: two of SPIRE's sync intervals


async def next_svid(call, issuer):
    """Read a stream of SVIDs until one comes from this authority."""
    async with asyncio.timeout(SOON):
        while True:
            message = await call.read()
            assert message is not grpc.aio.EOF
            if issuer_key_id(leaf_of(message.svids[0])) == issuer:
                return message.svids[0]


async def is_let_in(server, svid):
    """Whether the server's port answers a client that shows this SVID."""
    roots = [one.public_bytes(Encoding.DER) for one in await server.roots()]
    identity = TlsIdentity(tuple(split_der(svid.x509_svid)), load_der_private_key(svid.x509_svid_key, None))
    try:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", server.server.port, ssl=client_context(identity, roots, ("http/1.1",))
        )
    except OSError:
        return False
    try:
        writer.write(b"GET /keys HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        return (await reader.readline()).split()[1:2] == [b"200"]
    except OSError:
        return False
    finally:
        writer.transport.abort()


async def acts(server):
    """What the record says of authorities that were ended by hand: event and who did it."""
    async with SqliteStore.open(server.directory / "broker.db") as store:
        rows = await store.read(lambda reader: reader.records(0, 10_000))
    records = [Record.from_body(bytes(row.body)) for row in rows]
    return [
        (one.event, one.actor) for one in records if one.event in {Event.AUTHORITY_TAINTED, Event.AUTHORITY_REVOKED}
    ]


@pytest.mark.bears("K04", "I09", "X5-08")
async def test_forced_rotation_reaches_every_svid_and_ends_in_refusal(directory):
    async with running_server(directory) as server, running_agent(server, directory) as agent:
        await server.register(agent.agent.node.id.path, "/wl/me")
        local = server.local
        before = (await local.GetX509AuthorityState(pb.GetX509AuthorityStateRequest())).active.authority_id
        async with agent.workload() as stub:
            call = stub.FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=HEADER)
            old = await next_svid(call, before)
            prepared = (await local.PrepareX509Authority(pb.PrepareX509AuthorityRequest())).prepared_authority
            assert prepared.authority_id != before
            assert prepared.expires_at > 0
            await local.ActivateX509Authority(pb.ActivateX509AuthorityRequest(authority_id=prepared.authority_id))
            states = await local.GetX509AuthorityState(pb.GetX509AuthorityStateRequest())
            assert (states.active.authority_id, states.old.authority_id) == (prepared.authority_id, before)
            assert not states.HasField("prepared")
            # Not tainted yet: what was signed stays.
            assert issuer_key_id(leaf_of((await agent.x509()).svids[0])) in {before, prepared.authority_id}

            tainted = await local.TaintX509Authority(pb.TaintX509AuthorityRequest(authority_id=before))
            assert tainted.tainted_authority.authority_id == before
            new = await next_svid(call, prepared.authority_id)
            # The agent's own SVID and the server's are replaced as well, and the agent comes back with the new one.
            await until(lambda: issuer_key_id(agent.agent.node._svid.leaf) == prepared.authority_id)
            await until(lambda: agent.agent.sync.is_online)
            assert issuer_key_id(await shown_by(server.server.port)) == prepared.authority_id

            assert (await is_let_in(server, old), await is_let_in(server, new)) == (True, True)
            await local.RevokeX509Authority(pb.RevokeX509AuthorityRequest(authority_id=before))
            # The old one is accepted nowhere from here on, though its certificate says an hour.
            assert (await is_let_in(server, old), await is_let_in(server, new)) == (False, True)
            assert before not in {issuer for root in await server.roots() for issuer in [key_id(root)]}
            await until(lambda: len(agent.agent.cache.own_bundle.x509_authorities) == 1)
            with pytest.raises(InvalidSvid):
                verify_x509_svid(split_der(old.x509_svid), agent.agent.cache.bundles, now=datetime.now(UTC))
            # Nothing was dropped, and nothing is lacking.
            assert issuer_key_id(leaf_of((await agent.x509()).svids[0])) == prepared.authority_id
            call.cancel()
        by = f"uid:{os.geteuid()}"
        home = server
    assert await acts(home) == [(Event.AUTHORITY_TAINTED, by), (Event.AUTHORITY_REVOKED, by)]


def key_id(certificate):
    return certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest.hex()


async def shown_by(port):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()
    return x509.load_der_x509_certificate(der)


@pytest.mark.bears("K04")
async def test_jwt_authorities_and_the_wrong_order(directory):
    async with running_server(directory) as server, running_agent(server, directory) as agent:
        await server.register(agent.agent.node.id.path, "/wl/me")
        local = server.local
        invalid, internal = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL
        states = await local.GetJWTAuthorityState(pb.GetJWTAuthorityStateRequest())
        first = states.active.authority_id
        activate, taint, revoke = (
            pb.ActivateJWTAuthorityRequest,
            pb.TaintJWTAuthorityRequest,
            pb.RevokeJWTAuthorityRequest,
        )
        assert await refusal(local.ActivateJWTAuthority(activate())) == (invalid, "no authority ID provided")
        assert await refusal(local.ActivateJWTAuthority(activate(authority_id="x"))) == (
            invalid, "unexpected authority ID",
        )  # fmt: skip
        assert await refusal(local.TaintJWTAuthority(taint(authority_id=first))) == (
            invalid, "unable to taint current local authority",
        )  # fmt: skip
        assert await refusal(local.RevokeJWTAuthority(revoke(authority_id=first))) == (
            invalid, "invalid authority ID: unable to use current authority",
        )  # fmt: skip
        assert await refusal(local.RevokeJWTAuthority(revoke(authority_id="x"))) == (
            invalid, "invalid authority ID: no JWT authority found with provided authority ID",
        )  # fmt: skip
        second = (await local.PrepareJWTAuthority(pb.PrepareJWTAuthorityRequest())).prepared_authority.authority_id
        assert await refusal(local.TaintJWTAuthority(taint(authority_id=second))) == (
            invalid, "only Old local authorities can be tainted: unsupported local authority status: PREPARED",
        )  # fmt: skip
        assert await refusal(local.RevokeJWTAuthority(revoke(authority_id=second))) == (
            invalid, "invalid authority ID: unable to use a prepared key",
        )  # fmt: skip
        token = (await agent.jwt("aud")).svids[0].svid
        await local.ActivateJWTAuthority(activate(authority_id=second))
        assert await refusal(local.ActivateJWTAuthority(activate(authority_id=first))) == (
            internal, "only Prepared authorities can be activated: unsupported local authority status: OLD",
        )  # fmt: skip
        assert await refusal(local.RevokeJWTAuthority(revoke(authority_id=first))) == (
            internal, "failed to revoke JWT authority: it is not possible to revoke an untainted key",
        )  # fmt: skip
        assert (await agent.jwt("aud")).svids[0].svid == token
        await local.TaintJWTAuthority(taint(authority_id=first))
        assert await refusal(local.TaintJWTAuthority(taint(authority_id=first))) == (
            internal, "failed to taint JWT authority: key is already tainted",
        )  # fmt: skip
        await until(lambda: agent.agent.cache.is_tainted_kid(first))
        fresh = (await agent.jwt("aud")).svids[0].svid
        assert fresh != token
        await local.RevokeJWTAuthority(revoke(authority_id=first))
        await until(lambda: first not in agent.agent.cache.own_bundle.jwt_authorities)
        async with agent.workload() as stub:
            for text, is_good in ((fresh, True), (token, False)):
                asked = stub.ValidateJWTSVID(
                    workload_pb2.ValidateJWTSVIDRequest(audience="aud", svid=text), metadata=HEADER
                )
                if is_good:
                    await asked
                else:
                    assert (await refusal(asked))[0] is invalid
        for method in ("TaintX509UpstreamAuthority", "RevokeX509UpstreamAuthority"):
            request = getattr(pb, f"{method}Request")(subject_key_id="00")
            assert await refusal(getattr(local, method)(request)) == (
                grpc.StatusCode.FAILED_PRECONDITION, "upstream authority is not configured",
            )  # fmt: skip
        unbuilt = await refusal(local.GetWITAuthorityState(pb.GetWITAuthorityStateRequest()))
        assert unbuilt[0] is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.bears("K04")
async def test_connections_under_a_revoked_authority_are_closed(directory):
    async with running_server(directory) as server, running_agent(server, directory) as agent:
        authorities = server.authorities
        (old,) = await authorities.list("x509")
        # This agent hears nothing of the taint: it is stopped from following, and keeps its connection.
        agent.agent.node.follow = lambda *_: None
        made = await authorities.prepare("x509")
        await authorities.activate("x509", made.id)
        await authorities.taint("x509", old.id)
        assert agent.agent.sync.is_online
        await authorities.revoke("x509", old.id)
        await until(lambda: not agent.agent.sync.is_online)


async def test_the_command_line_in_its_own_order(directory):
    async with running_server(directory) as server:
        socket = str(server.server.socket_path)

        async def said(*words, code=0):
            command = [sys.executable, "-m", "broker.cli.main", "authority", *words, "--socket", socket, "-o", "json"]
            pipe = asyncio.subprocess.PIPE
            process = await asyncio.create_subprocess_exec(*command, "--yes", stdout=pipe, stderr=pipe)
            out, err = await process.communicate()
            assert process.returncode == code, err
            return json.loads(out) if out else json.loads(err.splitlines()[0])

        for kind in ("x509", "task"):
            shown = await said(kind, "show")
            assert [(one["state"], one["local"], one["tainted"]) for one in shown["items"]] == [("active", True, False)]
            first = shown["items"][0]["id"]
            made = await said(kind, "prepare")
            assert made["kind"] == "authority"
            assert made["state"] == "prepared"
            assert (await said(kind, "activate", made["id"]))["state"] == "active"
            error = (await said(kind, "revoke", "-authorityID", first, code=1))["error"]
            assert error["code"] == "authority_untainted"
            assert (await said(kind, "taint", first))["tainted"] is True
            await said(kind, "revoke", first)
            assert [one["id"] for one in (await said(kind, "show"))["items"]] == [made["id"]]
        assert (await said("x509", "taint", "--upstream", "00", code=4))["error"]["code"] == "no_upstream"


@pytest.mark.bears("K06")
async def test_keys_on_disk_outlive_the_server(directory):
    kept = {"keys": KeySettings(manager="disk")}
    async with running_server(directory, **kept) as server:
        first = {kind: [one.id for one in await server.authorities.list(kind)] for kind in ("x509", "jwt", "task")}
    files = sorted((directory / "server/data/keys").iterdir())
    assert len(files) == 3
    assert {one.stat().st_mode & 0o777 for one in files} == {0o600}
    async with running_server(directory, **kept) as server:
        again = {kind: [one.id for one in await server.authorities.list(kind)] for kind in ("x509", "jwt", "task")}
        assert again == first
        assert all(one.is_local for one in await server.authorities.list("x509"))


KILLS = int(os.environ.get("BROKER_ROTATION_KILLS", "1"))
"""How often each step is died in, for each key manager. The line itself asks for a hundred times: 50 here, some 30 minutes."""
LEADS_TO = {"retire": "after_activate", "prune": "after_prepare"}
"""Where one must have died before, so that there is something to take that step with."""


@pytest.mark.timeout(120 + 20 * KILLS)
@pytest.mark.bears("K05")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", ["prepare", "activate", "retire", "prune"])
@pytest.mark.parametrize("manager", ["memory", "disk"])
async def test_a_server_killed_in_a_step_of_rotation_starts_again(directory, when, step, manager):
    kept = {"keys": KeySettings(manager=manager)}
    async with running_server(directory, **kept) as server:
        before = {key_id(root) for root in await server.roots()}
        home = server.directory
    left = Left(home, before)
    for number in range(1, KILLS + 1):
        # Each goes on where the last one died, up to the same step.
        for place in filter(None, (LEADS_TO.get(step), f"{when}_{step}")):
            if manager == "disk":
                # What is there would serve for a day: this way the process has something to rotate.
                shutil.rmtree(home / "data/keys")
            await died(home, place, manager)
        # Whoever dies over retiring or pruning leaves rows of the keys that were taken away above.
        await left.check(is_on_disk=manager == "disk" and step not in LEADS_TO)
        if number % 25 and number != KILLS:
            continue
        async with running_server(directory, **kept) as server:
            rows = await server.authorities.list("x509")
            (active,) = (one for one in rows if one.state == 2)
            now = {key_id(root) for root in await server.roots()}
            assert active.id in now
            assert left.signed <= now  # what signed before may have signed something that still lives
            assert issuer_key_id(await shown_by(server.server.port)) in now
            left.signed.add(active.id)


async def died(home, step, manager):
    """Run a server that is killed when it comes to this step."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")} | {
        "BROKER_FAILPOINTS": f"authority.{step}=exit",
        "BROKER_SERVER__ALLOW_FAILPOINTS": "true",
        "BROKER_SERVER__BIND_ADDRESS": "127.0.0.1",
        "BROKER_SERVER__BIND_PORT": "0",
        "BROKER_SERVER__DATA_DIR": str(home / "data"),
        "BROKER_SERVER__RUNTIME_DIR": str(home / "run"),
        "BROKER_SERVER__STORE__URL": f"sqlite://{home}/broker.db",
        "BROKER_SERVER__OPERATIONS__ENABLED": "false",
        "BROKER_SERVER__KEYS__MANAGER": manager,
        "BROKER_SERVER__CA_TTL": "2h",
    }
    command = [sys.executable, "-m", "broker.cli.main", "server", "run"]
    dying = await asyncio.create_subprocess_exec(
        *command, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await asyncio.wait_for(dying.communicate(), 60)
    assert dying.returncode == 137, said


class Left:
    """What the dead leave in the store and on the disk, looked at before anybody starts again."""

    def __init__(self, home, signed):
        self.home, self.signed = home, set(signed)  # authorities that may have signed something that still lives

    async def check(self, *, is_on_disk):
        async with SqliteStore.open(self.home / "broker.db") as store:
            rows = (await store.read(lambda reader: reader.published())).authorities
        assert self.signed <= {row.id for row in rows}
        active = [row for row in rows if row.state is AuthorityState.ACTIVE]
        assert all(count == 1 for count in Counter(row.kind for row in active).values())
        if is_on_disk:
            # A key comes before its row: one may lie there that nobody ever heard of, none is lacking.
            files = {one.stem for one in (self.home / "data/keys").iterdir() if one.suffix == ".pem"}
            assert {row.id for row in active} <= files
        self.signed |= {row.id for row in active if row.kind is AuthorityKind.X509}


class Cable:
    """A TCP connection through this process, which can be cut."""

    def __init__(self, port):
        self.target, self.open, self.is_cut = port, set(), False

    async def __aenter__(self):
        self.listening = await asyncio.start_server(self.relay, "127.0.0.1", 0)
        self.port = self.listening.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self.cut()
        self.listening.close()

    def cut(self):
        self.is_cut = True
        for writer in self.open:
            writer.transport.abort()

    async def relay(self, reader, writer):
        self.open.add(writer)
        if self.is_cut:
            writer.transport.abort()
            return
        ahead, behind = await asyncio.open_connection("127.0.0.1", self.target)
        self.open.add(behind)

        async def pump(source, sink):
            with suppress(OSError):
                while data := await source.read(65536):
                    sink.write(data)
                    await sink.drain()
            sink.transport.abort()

        await asyncio.gather(pump(reader, behind), pump(ahead, writer))
        self.open -= {writer, behind}


@pytest.mark.bears("K03")
async def test_an_agent_that_was_cut_off_refuses_only_what_it_has_not_heard_of(directory):
    async with (
        running_server(directory) as server,
        Cable(server.server.port) as cable,
        running_agent(server, directory, "near") as near,
        running_agent(server, directory, "far", server_port=cable.port) as far,
    ):
        node = near.agent.node.id.path
        await server.register(node, "/wl/near")
        await server.register(far.agent.node.id.path, "/wl/far")

        def verified_by_far(chain):
            return verify_x509_svid(chain, far.agent.cache.bundles, now=datetime.now(UTC)).id.path

        old = split_der((await near.x509()).svids[0].x509_svid)
        mine = (await far.x509()).svids[0]
        cable.cut()
        made = await server.authorities.prepare("x509")
        await server.authorities.activate("x509", made.id)
        await server.register(node, "/wl/younger")
        async with asyncio.timeout(30):
            while len(svids := (await near.x509()).svids) < 2:
                await asyncio.sleep(0.05)
        (new,) = [split_der(one.x509_svid) for one in svids if one.spiffe_id.endswith("younger")]
        assert issuer_key_id(x509.load_der_x509_certificate(new[0])) == made.id
        assert verified_by_far(old) == "/wl/near"
        with pytest.raises(InvalidSvid):
            verified_by_far(new)
        # Cut off, it serves what it holds.
        assert (await far.x509()).svids[0] == mine
        cable.is_cut = False
        await until(lambda: len(far.agent.cache.own_bundle.x509_authorities) == 2, 30)
        assert (verified_by_far(new), verified_by_far(old)) == ("/wl/younger", "/wl/near")
