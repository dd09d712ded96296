"""The operator's questions: real processes, the real attestors, and the decision that callers really got."""

import asyncio
import errno
import os
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import ClassVar

import grpc
import pytest
from pydantic import BaseModel

from broker._proto.broker.agent.v1 import admin_pb2
from broker._proto.google.rpc import error_details_pb2, status_pb2
from broker._proto.service import Stub
from broker._proto.spiffe import workload_pb2
from broker.agent import app
from broker.agent.denials import MAX_DENIALS, MAX_OF_ONE_USER
from broker.agent.listener import ADMIN, require_operator
from broker.agent.workloads import AdminCaller
from broker.attestation.catalogue import Catalogue, Offer, installed
from broker.attestation.contract import AttestorFailed, SelectorDoc, Strength
from broker.errors import NoIdentity, NotAttested, Refused
from broker.spiffe import Selector
from broker.transport.rpc_errors import from_rpc_error
from tests.fakes.fake_server import entry_message
from tests.fakes.running_agent import HEADER, ME, estate, until

STRANGER = entry_message("other", "/wl/other", ["unix:uid:4000000001"])


class NoSettings(BaseModel):
    pass


class SaysSo:
    """An attestor whose selectors are the workload's own word."""

    name: ClassVar[str] = "says"
    settings: ClassVar[type[BaseModel]] = NoSettings
    selectors: ClassVar = (SelectorDoc("says:<word>", "what it says of itself", Strength.SELF_DECLARED),)

    def __init__(self, settings: BaseModel) -> None:
        pass

    async def attest(self, process) -> frozenset[Selector]:
        return frozenset({Selector("says:me")})


class Docker:
    name = "docker"

    def __init__(self, answer) -> None:
        self.answer = answer

    async def attest(self, process):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@asynccontextmanager
async def asking(agent):
    path = agent.settings.runtime_dir / "private" / "admin.sock"
    async with grpc.aio.insecure_channel(f"unix:{path}", options=(("grpc.use_local_subchannel_pool", 1),)) as channel:
        yield Stub(channel, ADMIN)


async def explained(agent, **request) -> admin_pb2.Explanation:
    async with asking(agent) as stub:
        return await stub.ExplainIdentity(admin_pb2.ExplainIdentityRequest(**request), timeout=30)


async def refused_with(agent) -> tuple[grpc.aio.AioRpcError, str]:
    """A refusal at the workload socket, and the id in its details."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await agent.x509()
    (details,) = (value for key, value in refused.value.trailing_metadata() if key == "grpc-status-details-bin")
    info = error_details_pb2.ErrorInfo()
    status_pb2.Status.FromString(details).details[0].Unpack(info)
    return refused.value, info.metadata["denial"]


async def denial(agent, denial_id: str) -> admin_pb2.Denial:
    async with asking(agent) as stub:
        return await stub.ExplainDenial(admin_pb2.ExplainDenialRequest(id=denial_id), timeout=30)


@pytest.mark.bears("A20")
async def test_the_socket_is_for_the_agents_user_alone() -> None:
    async with estate() as agent:
        path = agent.settings.admin_socket_path
        assert path == agent.settings.runtime_dir / "private" / "admin.sock"
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert path.stat().st_mode & 0o777 == 0o600
    assert not path.exists()


@pytest.mark.bears("A20")
def test_only_root_and_the_agents_user_are_admitted() -> None:
    for uid in (0, os.geteuid()):
        require_operator(AdminCaller(uid))
    with pytest.raises(Refused) as refused:
        require_operator(AdminCaller(os.geteuid() + 1))
    assert refused.value.reason == "access_denied"


@pytest.mark.root("a process of another user")
@pytest.mark.bears("A20")
async def test_another_user_cannot_even_connect() -> None:
    async with estate() as agent:
        code = (
            "import os,socket,sys; os.setgid(65533); os.setuid(65533); s=socket.socket(socket.AF_UNIX)\n"
            "try: s.connect(sys.argv[1])\nexcept OSError as error: print(error.errno)"
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", "-c", code, str(agent.settings.admin_socket_path),
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, _ = await process.communicate()
        assert int(out) == errno.EACCES


@pytest.mark.root("a process of another user")
@pytest.mark.bears("A20")
async def test_another_user_gets_nothing_even_where_the_files_let_it_in() -> None:
    async with estate() as agent:
        path = agent.settings.admin_socket_path
        path.parent.chmod(0o711)
        path.chmod(0o777)
        code = (
            "import os,socket,sys; os.setgid(65533); os.setuid(65533); s=socket.socket(socket.AF_UNIX);"
            "s.connect(sys.argv[1]); s.settimeout(5)\ntry: print(len(s.recv(1)))\nexcept ConnectionError: print(0)"
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", "-c", code, str(path), stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
        assert out == b"0\n"


async def test_a_process_with_an_identity() -> None:
    async with estate() as agent:
        told = await explained(agent, pid=os.getpid())
    assert (told.process.pid, told.process.uid, told.process.is_held) == (os.getpid(), os.geteuid(), True)
    assert told.process.executable == str(Path("/proc/self/exe").readlink())
    assert told.process.started_at > 0
    (unix,) = told.attestors
    assert (unix.name, unix.state, unix.code) == ("unix", "ok", "attested")
    assert ME in unix.selectors
    assert told.strengths[ME] == "kernel"
    assert [(one.id, one.code) for one in told.entries] == [("e1", "issued")]
    assert (told.considered, told.code, told.status) == (1, "issued", "OK")


async def test_an_entry_that_names_nodes_is_neither_counted_nor_advised() -> None:
    """Our server keeps them to itself; another one's agents are told of them."""
    alias = entry_message("alias", "/nodes/all", ["unix:uid:4000000001"])
    alias.entry.parent_id.path = "/spire/server"
    far = entry_message("far", "/far", ["k8s:sa:x", "unix:gid:4000000001"])
    async with estate(entries=(alias, far)) as agent:
        _, denial_id = await refused_with(agent)
        kept = (await denial(agent, denial_id)).explanation
        now = await explained(agent, pid=os.getpid())
        for told in (kept, now):
            assert ([one.id for one in told.entries], told.considered) == (["far"], 1)
            assert "entry far is the nearest" in told.most_likely
        for named in (
            await explained(agent, pid=os.getpid(), entry_id="alias"),
            await explained(agent, entry_id="alias"),
        ):
            assert [(one.id, one.code) for one in named.entries] == [("alias", "names_nodes")]
            assert named.most_likely == "entry alias: names nodes, not workloads"


async def test_a_process_without_one_is_told_nothing_and_its_operator_all() -> None:
    async with estate(entries=(STRANGER, entry_message("far", "/far", ["k8s:sa:x", "unix:uid:4000000001"]))) as agent:
        error, denial_id = await refused_with(agent)
        assert (error.code(), error.details()) == (grpc.StatusCode.PERMISSION_DENIED, "no identity issued")
        seen = from_rpc_error(error)
        assert isinstance(seen, NoIdentity)
        assert denial_id in seen.hint
        assert "4000000001" not in str(error.trailing_metadata())
        kept = await denial(agent, denial_id)
        now = await explained(agent, pid=os.getpid())
    assert kept.method == "/SpiffeWorkloadAPI/FetchX509SVID"
    assert not kept.is_late
    assert kept.explanation.process.pid == os.getpid()
    for told in (now, kept.explanation):
        nearest, far = told.entries
        assert (nearest.id, nearest.code, list(nearest.lacks)) == (
            "other",
            "selectors_missing",
            ["unix:uid:4000000001"],
        )
        assert "no attestor of this agent gives k8s:sa:x" in far.note
        assert told.strengths["k8s:sa:x"] == "unknown"
        assert (told.code, told.message, told.status) == (
            "no_identity_issued",
            "no identity issued",
            "PERMISSION_DENIED",
        )
        assert [row.state for row in told.attestors] == ["ok"]
        assert told.most_likely.startswith("entry other is the nearest")


async def test_an_attestor_that_failed_and_one_that_has_nothing_to_say() -> None:
    labelled = entry_message("docked", "/docked", [ME, "docker:label:app:orders"])
    async with estate(entries=(labelled,)) as agent:
        real = agent.agent.workloads._attestors
        agent.agent.workloads._attestors = (
            *real,
            Docker(AttestorFailed("cannot reach the runtime", hint="add the agent to the group docker")),
        )
        error, denial_id = await refused_with(agent)
        assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "workload attestation failed")
        kept = (await denial(agent, denial_id)).explanation
        now = await explained(agent, pid=os.getpid())
        for told in (kept, now):
            failed = told.attestors[1]
            assert (failed.name, failed.state, failed.code) == ("docker", "fail", "attestor_failed")
            assert failed.hint == "add the agent to the group docker"
            assert told.status == "UNAVAILABLE"
            assert told.most_likely.endswith(failed.hint)
        assert "the attestor docker failed" in now.entries[0].note

        agent.agent.workloads._attestors = (*real, Docker(frozenset()))
        told = await explained(agent, pid=os.getpid())
        assert (told.attestors[1].state, told.code) == ("not-mine", "no_identity_issued")


async def test_secrets_of_containers_are_hidden_unless_allowed(caplog, capsys) -> None:
    needs = entry_message("e", "/e", ["docker:env:PASSWORD=hunter2", "docker:label:app:orders"])
    held = frozenset({Selector("docker:env:TOKEN=hunter3"), Selector("docker:label:app:payments")})
    async with estate(entries=(needs,), explain_selectors=("docker:label:app",)) as agent:
        agent.agent.workloads._attestors = (Docker(held),)
        _, denial_id = await refused_with(agent)
        for told in ((await denial(agent, denial_id)).explanation, await explained(agent, pid=os.getpid())):
            assert "hunter" not in str(told)
            assert list(told.attestors[0].selectors) == ["docker:env:TOKEN=<hidden>", "docker:label:app:payments"]
            assert list(told.entries[0].lacks) == ["docker:env:PASSWORD=<hidden>", "docker:label:app:orders"]
    shown = caplog.text + "".join(capsys.readouterr())
    assert denial_id in shown
    assert "hunter" not in shown


async def test_selectors_and_entries_by_themselves() -> None:
    hinted = [
        entry_message(name, f"/{name}", ["unix:uid:5"], hint="web", created_at=n) for n, name in ((1, "a"), (2, "b"))
    ]
    over = entry_message("over", "/over", ["unix:uid:6"])
    over.entry.expires_at = 1_700_000_000
    async with estate(entries=(*hinted, over)) as agent:
        told = await explained(agent, selectors=["unix:uid:5"])
        assert [(one.id, one.code) for one in told.entries] == [
            ("a", "issued"),
            ("b", "hint_taken"),
            ("over", "selectors_missing"),
        ]
        assert not told.HasField("process")
        alone = await explained(agent, entry_id="over")
        assert list(alone.selectors) == ["unix:uid:6"]
        assert [(one.id, one.code) for one in alone.entries] == [("over", "entry_expired")]
        assert "entry over is over" in alone.most_likely
        one = await explained(agent, selectors=["unix:uid:5"], entry_id="b")
        assert ([entry.id for entry in one.entries], one.code) == (["b"], "no_identity_issued")


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ({}, "explain_what"),
        ({"pid": 1, "selectors": ["a:b"]}, "explain_what"),
        ({"pid": 1, "selectors": ["a:b"], "entry_id": "e1"}, "explain_what"),
        ({"pid": -5}, "bad_pid"),
        ({"pid": 2**40}, "bad_pid"),
        ({"pid": 2**31 - 1}, "process_not_found"),
        ({"selectors": ["nonsense"]}, "selector_no_colon"),
        ({"entry_id": "nowhere"}, "entry_not_known"),
        ({"pid": os.getpid(), "entry_id": "nowhere"}, "entry_not_known"),
    ],
)
async def test_questions_without_an_answer(request_, code) -> None:
    async with estate() as agent:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await explained(agent, **request_)
    assert from_rpc_error(refused.value).reason == code


async def test_before_the_server_was_heard() -> None:
    async with estate(synced=False, server_port=1) as agent:
        told = await explained(agent, pid=os.getpid())
    assert (told.code, told.status) == ("not_synced", "UNAVAILABLE")
    assert told.attestors[0].state == "ok"


async def test_an_entry_of_self_declared_selectors_alone_is_not_matched(monkeypatch) -> None:
    def offers(group):
        return (*installed(group), Offer("says", "identity-broker", lambda: SaysSo))

    monkeypatch.setattr(app, "Catalogue", lambda trusted: Catalogue(trusted, offers))
    entries = (
        entry_message("weak", "/weak", ["says:me"]),
        entry_message("strong", "/strong", ["says:me", ME]),
    )
    attestors = {"workload": {"unix": {}, "says": {}}}
    async with estate(entries=entries, attestors=attestors) as agent:
        assert [svid.spiffe_id for svid in (await agent.x509()).svids] == ["spiffe://example.org/strong"]
        told = await explained(agent, pid=os.getpid())
    assert [(one.id, one.code) for one in told.entries] == [("strong", "issued"), ("weak", "self_declared_only")]
    assert "nobody but the workload vouches" in told.entries[1].note
    assert told.strengths["says:me"] == "self-declared"


async def test_who_a_process_is() -> None:
    async with estate() as agent, agent.workload() as stub:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async with asking(agent) as admin:
                await admin.FindSessions(admin_pb2.FindSessionsRequest(pid=os.getpid()))
        assert from_rpc_error(refused.value).reason == "session_not_found"
        call = stub.FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=HEADER)
        await call.read()
        async with asking(agent) as admin:
            found = await admin.FindSessions(admin_pb2.FindSessionsRequest(pid=os.getpid()))
        call.cancel()
    (session,) = found.sessions
    (identity,) = session.identities
    assert (identity.spiffe_id, identity.entry_id) == ("spiffe://example.org/wl/me", "e1")
    assert identity.session_id.startswith("ws_")
    assert identity.x509_not_after > 0
    assert session.connections == 1
    assert session.strengths[ME] == "kernel"


async def test_refusals_in_a_storm_are_explained_when_somebody_asks() -> None:
    async with estate(entries=(STRANGER,), first_identity_wait="1ms") as agent:
        log = agent.agent.doors.public._denials._log
        log._lines = 10_000
        _, denial_id = await refused_with(agent)
        late = await denial(agent, denial_id)
    assert late.is_late
    assert late.explanation.code == "no_identity_issued"
    assert [one.id for one in late.explanation.entries] == ["other"]
    assert late.explanation.most_likely


async def test_one_user_drives_nobody_elses_refusals_out() -> None:
    async with estate() as agent:
        denials = agent.agent.doors.public._denials

        class OfUser:
            session, answers, executable = None, (), ""

            def __init__(self, uid: int, facts) -> None:
                self.process = type("P", (), {"pid": 1, "uid": uid, "gid": 1, "facts": facts})()

        facts = type("F", (), {"start_time": 1})()
        error = NotAttested("the process is gone", code="process_gone")
        first = denials.record("/x", OfUser(1, facts), error)
        ids = [denials.record("/x", OfUser(2, facts), error) for _ in range(MAX_OF_ONE_USER + 5)]
        assert denials.find(first).explanation.code == "process_gone"
        assert denials.find(ids[-1])
        assert len(denials) == MAX_OF_ONE_USER + 1
        for uid in range(3, 10):
            for _ in range(MAX_OF_ONE_USER):
                denials.record("", OfUser(uid, facts), error)
        assert len(denials) == MAX_DENIALS
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await denial(agent, first)
        assert from_rpc_error(refused.value).reason == "denial_not_known"


async def test_a_process_that_ends_while_it_is_looked_at() -> None:
    async with estate() as agent:
        sleeper = subprocess.Popen(["/bin/sleep", "60"])
        real = agent.agent.workloads._attestors[0]

        class Ending:
            name = "ending"

            async def attest(self, process):
                found = await real.attest(process)
                sleeper.kill()
                sleeper.wait()
                return found

        agent.agent.workloads._attestors = (Ending(),)
        told = await explained(agent, pid=sleeper.pid)
        assert (told.code, told.status) == ("process_gone", "PERMISSION_DENIED")
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(grpc.aio.AioRpcError):
            await explained(agent, pid=sleeper.pid)
        await until(lambda: len(os.listdir("/proc/self/fd")) <= before)
