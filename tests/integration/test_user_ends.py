"""The user's side as operators and workloads meet it: a real server, its admin socket, the command, and a delegation worked on."""

import asyncio
import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from broker._proto.broker.server.v1 import feed_pb2, tasks_pb2
from broker._proto.service import Stub
from broker.server.api.grpc import feed, tasks
from broker.server.app import Server
from broker.server.task_settings import SubjectSettings
from tests.fakes.oidc import OidcIssuer
from tests.integration.identity_rig import DEADLINE, Estate, attested, running
from tests.integration.test_token_endpoint import (
    DETAILS,
    TRIAGE,
    estate,
    form,
    oidc,
    process,
    register,
    task_settings,
)

__all__ = ["estate", "oidc"]


async def command(one: Server, *arguments: str, code: int = 0) -> Any:
    """Run the command as an operator on this machine does; give what it printed."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "broker.cli.main", *arguments, "--yes", "-o", "json",
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "BROKER_SERVER_SOCKET": f"unix://{one.socket_path}"},
    )  # fmt: skip
    out, err = await child.communicate()
    assert child.returncode == code, (out, err)
    return json.loads(out or err) if code in (0, 4) else None


def fresh(oidc: OidcIssuer, sub: str = "alice", **claims: Any) -> str:
    return oidc.token(sub, azp="console", auth_time=int(time.time()), sid="s-1", **claims)


@pytest.mark.parametrize("estate", ["sqlite", "postgres"], indirect=True)
@pytest.mark.timeout(180)  # a dozen commands, each a process
@pytest.mark.bears("RV11", "X05")
async def test_an_operator_sees_and_ends_what_users_leave_standing(
    estate: Estate, oidc: OidcIssuer, tmp_path: Path
) -> None:
    subject = SubjectSettings(
        issuer=oidc.issuer,
        audiences=("broker",),
        ca_path=oidc.ca_path,
        clients=("console",),
        delegation_clients=("console",),
    )
    settings = task_settings(oidc) | {"subjects": (subject,)}
    async with running(estate, **settings) as one, attested(one) as (node, agent_id, channel):
        entry_id = await register(one, agent_id, TRIAGE)
        async with process(one, node, channel, entry_id, "ws_1", node.trusted) as agent:
            word = tmp_path / "word"
            word.write_text(fresh(oidc))
            terms = [
                "--user-token-file", str(word), "--agent", "spiffe://example.org/*", "--authorization-details",
                json.dumps(DETAILS), "--purpose", "nightly triage", "--ttl", "1h", "--max-task-ttl", "10m",
            ]  # fmt: skip
            made = await command(one, "delegation", "create", *terms)
            assert (made["user"], made["state"], made["max_task_ttl"]) == ("alice", "standing", 600)
            agents_own = tmp_path / "agents"
            agents_own.write_text(oidc.token("alice", auth_time=int(time.time())))
            refused = await command(
                one, "delegation", "create", "--user-token-file", str(agents_own), *terms[2:], code=4
            )
            assert refused["error"]["code"] == "delegation_client"

            stub = Stub(channel, tasks.BINDING)
            start = tasks_pb2.StartTaskRequest(
                workload=agent.session, purpose="p", authorization_details=json.dumps(DETAILS), delegation_id=made["id"]
            )
            task = await stub.StartTask(start, timeout=DEADLINE)
            assert (task.user, task.state, task.expires_at - task.created_at) == ("alice", "active", 600)
            listed = await command(one, "delegation", "list", "--user", "alice")
            assert [item["id"] for item in listed["items"]] == [made["id"]]

            ended = await command(one, "delegation", "revoke", made["id"], "--reason", "no longer needed")
            assert (ended["state"], ended["cause"]) == ("withdrawn", "delegation_withdrawn")
            shown = await command(one, "task", "show", task.id)
            assert (shown["state"], shown["cause"]) == ("revoked", "delegation_withdrawn")

            # All of a user: the verifiers hear one frame that names them.
            listening = Stub(channel, feed.BINDING).Subscribe()
            await listening.write(feed_pb2.SubscribeRequest())
            assert (await asyncio.wait_for(listening.read(), DEADLINE)).WhichOneof("kind") == "snapshot"
            issued = await agent.http.post("/token", data=form(oidc, subject_token=fresh(oidc)))
            assert issued.status_code == 200, issued.text
            stopped = await command(one, "delegation", "revoke", "--user", "alice", "--reason", "left")
            assert stopped["tasks_ended"] == 1
            kinds = []
            while len(kinds) < 2:
                message = await asyncio.wait_for(listening.read(), DEADLINE)
                if message.WhichOneof("kind") == "frame":
                    kinds.append((message.frame.kind, message.frame.name))
            assert kinds == [("user", "alice"), ("subtree", "")]
            answer = await agent.http.post("/token", data=form(oidc, subject_token=fresh(oidc)))
            assert (answer.status_code, answer.json()["error"]) == (400, "invalid_grant")
            assert answer.json()["error_code"] == "user_disabled"
            assert (await command(one, "delegation", "allow", "--user", "alice"))["changed"] is True
            assert (await command(one, "delegation", "allow", "--user", "alice"))["changed"] is False

            # Kill switches of an agent and of a service.
            for options in (["--agent", str(TRIAGE)], ["--audience", "https://tickets.example.org"]):
                bobs = await agent.http.post("/token", data=form(oidc, subject_token=fresh(oidc, "bob")))
                if bobs.status_code == 503:
                    # In the second of the first kill nothing is issued.
                    assert bobs.json()["error_code"] == "stopped_just_now"
                    await asyncio.sleep(1.1)
                    bobs = await agent.http.post("/token", data=form(oidc, subject_token=fresh(oidc, "bob")))
                assert bobs.status_code == 200, bobs.text
                assert (await command(one, "task", "revoke", *options))["tasks_ended"] == 1
                token = {"token": bobs.json()["access_token"]}
                assert (await agent.http.post("/introspect", data=token)).json() == {"active": False}
            await command(one, "task", "revoke", "--agent", str(TRIAGE), "--user", "alice", code=2)


async def test_only_operators_stop(estate: Estate, oidc: OidcIssuer) -> None:
    """The methods are for the admin socket; a node agent's word stops nobody."""
    import grpc.aio  # noqa: PLC0415 - for its error alone

    from broker._proto.broker.server.v1 import delegations_pb2  # noqa: PLC0415
    from broker.server.api.grpc import delegations  # noqa: PLC0415

    async with running(estate, **task_settings(oidc)) as one, attested(one) as (_, _, channel):
        for binding, method, request in (
            (delegations.STOPS, "StopTasks", delegations_pb2.StopTasksRequest(user="alice")),
            (delegations.STOPS, "DisableUser", delegations_pb2.DisableUserRequest(user="alice")),
            (delegations.BINDING, "ListDelegations", delegations_pb2.ListDelegationsRequest()),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await getattr(Stub(channel, binding), method)(request, timeout=DEADLINE)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.bears("TX20", "RV11")
async def test_a_session_that_is_not_confirmed_in_time_suspends_its_tasks_until_it_is(
    estate: Estate, oidc: OidcIssuer
) -> None:
    """With everything real and a lease of three seconds: the feed tells of it; a newer token at /token ends it."""
    subject = SubjectSettings(
        issuer=oidc.issuer, audiences=("broker",), ca_path=oidc.ca_path, session_lease=timedelta(seconds=3)
    )
    settings = task_settings(oidc) | {"subjects": (subject,)}
    async with running(estate, **settings) as one, attested(one) as (node, agent_id, channel):
        entry_id = await register(one, agent_id, TRIAGE)
        async with process(one, node, channel, entry_id, "ws_1", node.trusted) as agent:
            stub = Stub(channel, tasks.BINDING)
            start = tasks_pb2.StartTaskRequest(
                workload=agent.session, user_token=oidc.token("alice", sid="s-1"), purpose="p",
                authorization_details=json.dumps(DETAILS),
            )  # fmt: skip
            task = await stub.StartTask(start, timeout=DEADLINE)
            listening = Stub(channel, feed.BINDING).Subscribe()
            await listening.write(feed_pb2.SubscribeRequest())
            assert (await asyncio.wait_for(listening.read(), DEADLINE)).WhichOneof("kind") == "snapshot"

            async def lapsed() -> None:
                frame = await _next_frame(listening)
                assert (frame.kind, frame.root, frame.cause) == ("subtree", task.id, "user_unconfirmed")
                shown = await command(one, "task", "show", task.id)
                assert (shown["state"], shown["cause"]) == ("suspended", "user_unconfirmed")

            await lapsed()
            fields = form(oidc, subject_token=oidc.token("alice", sid="s-1"), task=task.id)
            del fields["purpose"]
            answer = await agent.http.post("/token", data=fields)
            assert answer.status_code == 200, answer.text


async def _next_frame(listening: Any) -> Any:
    while True:
        message = await asyncio.wait_for(listening.read(), DEADLINE)
        if message.WhichOneof("kind") == "frame":
            return message.frame
