"""What was done is not done again: a real server, a real node agent, services by the SDK and at the HTTPS port, with the audit record."""

import asyncio
import base64
import json
import re
import sqlite3
import sys
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc.aio
import httpx2
import pytest

from broker._proto.broker.agent.v1 import actions_pb2
from broker._proto.broker.server.v1 import actions_pb2 as server_pb2
from broker._proto.service import Stub
from broker.agent.listener import ACTIONS
from broker.errors import BrokerError
from broker.sdk import Workload
from broker.sdk.verify import Caller, TokenVerifier
from broker.server.api.grpc import actions
from broker.server.authority import plan
from broker.server.failpoints import EXIT_STATUS
from broker.server.tasks import exchange
from broker.server.tasks.records import sha256
from broker.tasks import issue_claims
from broker.tasks.action import digest_of_parameters
from broker.transport.rpc_errors import from_rpc_error
from tests.attacks.tasks.binding_rig import eventually, short_directory
from tests.attacks.tasks.life_rig import Life, environment_of, inhabited, living, settings_of
from tests.attacks.tasks.outward_rig import NEIGHBOUR, SERVICE, TICKETS, TRIAGE, Rig, rig
from tests.fakes.oidc import OidcIssuer
from tests.fakes.replicas import Replica, replica
from tests.fakes.running_agent import HEADER
from tests.integration.identity_rig import DEADLINE, Estate, own_bundle, running

pytestmark = pytest.mark.timeout(180)

STEP = "write-4711"
WRITE = {"resource": "4711", "step": STEP, "parameters": {"text": "done", "notify": ["alice"]}}
ROOT = Path(__file__).resolve().parents[3]
GUIDE = ROOT / "docs/how-to/do-things-once.md"


@dataclass
class Scene:
    """A service that verifies by the SDK, and an agent with a task."""

    house: Rig
    me: Workload
    verifier: TokenVerifier
    task: str = ""

    async def token(self) -> str:
        """A new token of the one task."""
        fields = {"task": self.task} if self.task else {}
        issued = await self.house.issued(**fields)
        self.task = issued["task"]
        token: str = issued["access_token"]
        return token

    async def caller(self) -> Caller:
        chain, _, _ = self.house.files[TRIAGE]
        return await self.verifier.verify(await self.token(), chain)

    def told(self, event: str) -> list[Any]:
        return [one for one in self.house.records(event) if one.subject == self.task]

    def refusals(self) -> list[str]:
        return [str(one.fields["reason"]) for one in self.house.records("action_refused")]

    def time_passes(self) -> None:
        """Whatever was claimed was claimed too long ago."""
        with closing(sqlite3.connect(f"{self.house.estate.directory}/broker.db")) as database:
            database.execute("UPDATE actions SET settle_by = claimed_at")
            database.commit()


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        house = await stack.enter_async_context(rig())
        me = await stack.enter_async_context(Workload.connect(f"unix:{house.agent.socket}", spiffe_id=SERVICE))
        found = await TokenVerifier.discover(house.issuer, audience=TICKETS, workload=me, timeout=30)
        yield Scene(house, me, await stack.enter_async_context(found))


async def refused(asked: Awaitable[Any]) -> str:
    try:
        answer = await asked
    except BrokerError as error:
        return error.reason
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error).reason
    raise AssertionError(f"it was not refused: {answer}")


async def entered(caller: Caller, **changes: Any) -> tuple[bool, Any]:
    """Do nothing within the block: it counts as done when it is left."""
    async with caller.action(**{"action": "ticket.write"} | WRITE | changes) as doing:
        return doing.is_duplicate, doing.outcome


@pytest.mark.bears("RV15")
async def test_a_retry_with_a_new_token_is_told_what_came_of_it(scene: Scene) -> None:
    async with (await scene.caller()).action("ticket.write", **WRITE) as doing:
        assert (doing.is_duplicate, doing.outcome, doing.is_settled) == (False, None, False)
        await doing.complete({"comment": 7, "by": "the service"})
    first = doing.id
    for _ in range(2):
        # The agent has lost its answer: it asks for another token, and tries again.
        async with (await scene.caller()).action("ticket.write", **WRITE) as again:
            assert (again.is_duplicate, again.outcome) == (True, {"comment": 7, "by": "the service"})
            assert await refused(again.complete({"comment": 8})) == "action_settled"
            assert await refused(again.release()) == "action_settled"
        assert again.id == first
    (claimed,), (settled,), suppressed = (
        scene.told(event) for event in ("action_claimed", "action_settled", "action_suppressed")
    )
    for record in (claimed, settled, *suppressed):
        assert record.actor == record.fields["service"] == str(SERVICE)
        assert (record.fields["user"], record.fields["agent"]) == ("alice", str(TRIAGE))
        assert (record.fields["audience"], record.fields["action"]) == (TICKETS, "ticket.write")
        assert (record.fields["action_id"], record.fields["door"]) == (first, "agent")
        assert record.fields["step_hash"] == sha256(STEP.encode())
        assert record.fields["parameter_digest"] == digest_of_parameters(WRITE["parameters"])
        assert not any(word in record.body() for word in (b"eyJ", STEP.encode(), b"by the service", b"comment"))
    hashes = {record.fields["jti_hash"] for record in (claimed, *suppressed)}
    assert len(hashes) == 3, "each was another token"
    assert (settled.fields["state"], settled.fields["prior_state"]) == ("completed", "claimed")
    assert suppressed[0].fields["outcome_hash"] == settled.fields["outcome_hash"] is not None
    assert scene.refusals() == []


@pytest.mark.bears("RV15")
async def test_of_two_at_once_one_does_it(scene: Scene) -> None:
    one, other = await scene.caller(), await scene.caller()
    door = scene.house.clients[SERVICE]

    async def by_socket(caller: Caller, step: str) -> str:
        try:
            # Claimed, and not left: nothing more is said of it.
            await caller.action("ticket.write", step=step).__aenter__()
        except BrokerError as error:
            return error.reason
        return "claimed"

    async def by_https(caller: Caller, step: str) -> str:
        answer = await door.post("/actions", json={"action": "ticket.write", "step": step, "token": caller._shown})
        return str(answer.json().get("result") or answer.json()["error"])

    ways = [(by_socket, by_socket), (by_https, by_https), (by_socket, by_https), (by_https, by_socket)]
    for number, (first, second) in enumerate(ways * 2):
        told = await asyncio.gather(first(one, f"step {number}"), second(other, f"step {number}"))
        assert sorted(told) == ["action_in_progress", "claimed"]
    assert len(scene.told("action_claimed")) == 8
    assert scene.refusals() == ["action_in_progress"] * 8


@pytest.mark.bears("RV15")
async def test_a_service_that_is_killed_leaves_a_doubt_that_only_it_resolves(scene: Scene) -> None:
    chain, _, _ = scene.house.files[TRIAGE]
    told = {
        "socket": f"unix:{scene.house.agent.socket}",
        "spiffe_id": str(SERVICE),
        "issuer": scene.house.issuer,
        "audience": TICKETS,
        "token": await scene.token(),
        "chain": [base64.b64encode(one).decode() for one in chain],
        "action": "ticket.write",
        "step": STEP,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.fakes.doing_service", cwd=ROOT,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(told).encode() + b"\n")
    async with asyncio.timeout(60):
        began = json.loads(await process.stdout.readline())
    assert began["is_duplicate"] is False
    process.kill()
    await process.wait()

    plain = {"resource": None, "parameters": None}
    assert await refused(entered(await scene.caller(), **plain)) == "action_in_progress"
    scene.time_passes()
    for _ in range(2):
        assert await refused(entered(await scene.caller(), **plain)) == "action_indeterminate"
    # The service has started again, and finds on its own record that it was done.
    await scene.verifier.settle_action(began["id"], is_done=True, outcome={"comment": 7})
    assert await entered(await scene.caller(), **plain) == (True, {"comment": 7})
    assert await refused(scene.verifier.settle_action(began["id"], is_done=False)) == "action_settled"
    (settled,) = scene.told("action_settled")
    assert (settled.fields["prior_state"], settled.fields["action_id"]) == ("indeterminate", began["id"])
    assert scene.refusals() == ["action_in_progress", "action_indeterminate", "action_indeterminate", "action_settled"]


@pytest.mark.bears("RV15")
async def test_a_block_that_an_error_leaves_says_nothing_and_one_that_releases_lets_others_do_it(scene: Scene) -> None:
    with pytest.raises(ZeroDivisionError):
        async with (await scene.caller()).action("ticket.write", **WRITE) as doing:
            raise ZeroDivisionError
    assert await refused(entered(await scene.caller())) == "action_in_progress"
    scene.time_passes()
    assert await refused(entered(await scene.caller())) == "action_indeterminate"
    await scene.verifier.settle_action(doing.id, is_done=False)
    async with (await scene.caller()).action("ticket.write", **WRITE) as second:
        await second.release()
    assert second.id != doing.id
    # Left in good order it counts as done, without an outcome.
    assert [await entered(await scene.caller()) for _ in range(2)] == [(False, None), (True, None)]


@pytest.mark.bears("RV15")
async def test_one_step_with_other_parameters_is_refused(scene: Scene) -> None:
    await entered(await scene.caller())
    others: tuple[dict[str, Any], ...] = (
        {"parameters": {"text": "something else"}},
        {"parameters": None},
        {"resource": "4712"},
        {"action": "ticket.read"},
    )
    for other in others:
        assert await refused(entered(await scene.caller(), **other)) == "idempotency_key_reused"
    assert scene.refusals() == ["idempotency_key_reused"] * len(others)
    assert (len(scene.told("action_claimed")), scene.told("action_suppressed")) == (1, [])


@pytest.mark.bears("RV15")
async def test_a_token_of_an_ended_task_claims_nothing(scene: Scene) -> None:
    caller = await scene.caller()
    given_back = await scene.token()
    await scene.house.post("/revoke", [("token", given_back)])
    wire = {"action": "ticket.write", "step": STEP}
    door = scene.house.clients[SERVICE]
    answer = await door.post("/actions", json=wire | {"token": given_back})
    assert (answer.status_code, answer.json()["error"]) == (403, "token_not_alive")
    await scene.house.post("/revoke", [("token", caller._shown), ("end", "task")])
    # What the service has seen before the end helps nobody: the server asks for itself.
    assert await refused(entered(caller)) == "token_not_alive"
    assert scene.refusals() == ["token_not_alive"] * 2
    assert [one.subject for one in scene.house.records("action_refused")] == [scene.task] * 2
    assert scene.told("action_claimed") == []


@pytest.mark.bears("RV15")
async def test_another_service_neither_claims_nor_settles(scene: Scene) -> None:
    caller = await scene.caller()
    with pytest.raises(ZeroDivisionError):
        async with caller.action("ticket.write", **WRITE) as doing:
            raise ZeroDivisionError
    socket = Stub(scene.me.channel, ACTIONS)
    for who in (NEIGHBOUR, TRIAGE):
        # The agent itself is no more its own service than a stranger is.
        wire = {"action": "ticket.write", "step": "s2", "token": caller._shown}
        claim = actions_pb2.ClaimActionRequest(spiffe_id=str(who), **wire)
        assert await refused(socket.ClaimAction(claim, metadata=HEADER, timeout=30)) == "audience_not_own"
        for state in ("completed", "released"):
            settle = actions_pb2.SettleActionRequest(spiffe_id=str(who), id=doing.id, state=state)
            assert await refused(socket.SettleAction(settle, metadata=HEADER, timeout=30)) == "action_not_own"
        door = scene.house.clients[who]
        assert (await door.post("/actions", json=wire)).json()["error"] == "audience_not_own"
        answer = await door.post(f"/actions/{doing.id}", json={"state": "completed"})
        assert (answer.status_code, answer.json()["error"]) == (403, "action_not_own")
    refusals = scene.house.records("action_refused")
    assert [one.actor for one in refusals] == [str(NEIGHBOUR)] * 5 + [str(TRIAGE)] * 5
    assert len(scene.told("action_claimed")) == 1 and scene.told("action_settled") == []
    await scene.verifier.settle_action(doing.id, is_done=True)


@pytest.mark.bears("RV15")
async def test_a_token_for_one_use_serves_one_action(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    await scene.token()
    monkeypatch.setattr(exchange, "issue_claims", lambda *a, **k: issue_claims(*a, **(k | {"use": "once"})))
    caller = await scene.caller()
    # To look at it alone would let it be shown again and again.
    assert await refused(caller.check("ticket.write")) == "single_use"
    async with caller.action("ticket.write", step="a") as doing:
        await doing.release()
    for step in ("a", "b"):
        with pytest.raises(BrokerError) as caught:
            async with caller.action("ticket.write", step=step):
                pass
        assert caught.value.reason == "token_used"
    door, wire = scene.house.clients[SERVICE], {"token": caller._shown, "action": "ticket.write", "step": "c"}
    answer = await door.post("/actions", json=wire)
    assert (answer.status_code, answer.json()["error"]) == (403, "token_used")
    assert scene.refusals() == ["token_used"] * 3
    # At once, it serves one of them.
    another = (await scene.caller())._shown
    answers = await asyncio.gather(
        *(door.post("/actions", json=wire | {"token": another, "step": f"d{n}"}) for n in range(8))
    )
    assert sorted(one.json().get("result") or one.json()["error"] for one in answers) == [
        "claimed",
        *["token_used"] * 7,
    ]


class Tickets:
    """What the how-to's service stands on: it keeps what it did, and its answer is lost where a test says so."""

    def __init__(self) -> None:
        self.added: dict[str, dict[str, int]] = {}
        self.is_lost = False

    async def add(self, number: str, text: str, *, key: str) -> int:
        self.added[key] = {"comment": len(self.added) + 1}
        if self.is_lost:
            raise ConnectionError
        return self.added[key]["comment"]

    async def find(self, *, key: str) -> dict[str, int] | None:
        return self.added.get(key)


@pytest.mark.bears("RV15")
async def test_the_how_tos_service_comments_once(scene: Scene) -> None:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)
    assert len(blocks) == 2
    tickets = Tickets()
    names: dict[str, Any] = {"tickets": tickets}
    for block in blocks:
        exec(block, names)
    comment, after_a_crash = names["comment"], names["after_a_crash"]
    said = [await comment(await scene.caller(), "4711", "s-1", "done") for _ in range(3)]
    assert (said, len(tickets.added)) == ([{"comment": 1}] * 3, 1)
    tickets.is_lost = True
    with pytest.raises(ConnectionError):
        await comment(await scene.caller(), "4711", "s-2", "done")
    scene.time_passes()
    assert await refused(comment(await scene.caller(), "4711", "s-2", "done")) == "action_indeterminate"
    await after_a_crash(scene.verifier, list(tickets.added)[-1])
    assert await comment(await scene.caller(), "4711", "s-2", "done") == {"comment": 2}
    assert len(tickets.added) == 2


# ---- both doors of the server, on both stores


@pytest.mark.bears("RV15")
@pytest.mark.parametrize("ground_of", ["sqlite", "postgres"], indirect=True)
async def test_at_both_doors_it_is_one_step(ground_of: Estate, oidc: OidcIssuer) -> None:
    async with living(ground_of, oidc) as life:
        service, node = await life.agent(SERVICE, "ws_service"), Stub(life.channel, actions.BINDING)
        agent = await life.agent(TRIAGE, "ws_1")
        task = await life.start(agent)

        async def wire() -> dict[str, str]:
            token = await life.issue(agent, task.id)
            return {"token": token, "action": "ticket.read", "identifier": "4711", "step": STEP}

        asked = server_pb2.ClaimActionRequest(workload=service.session, **await wire())
        claimed = await node.ClaimAction(asked, timeout=DEADLINE)
        assert (claimed.result, claimed.action.state, claimed.action.task_id) == ("claimed", "claimed", task.id)
        answer = await service.http.post("/actions", json=await wire())
        assert (answer.status_code, answer.json()["error"]) == (409, "action_in_progress")
        settled = await service.http.post(f"/actions/{claimed.action.id}", json={"state": "completed", "outcome": 7})
        assert (settled.status_code, settled.json()["outcome"]) == (200, 7)
        asked = server_pb2.ClaimActionRequest(workload=service.session, **await wire())
        again = await node.ClaimAction(asked, timeout=DEADLINE)
        assert (again.result, again.action.outcome, again.action.id) == ("duplicate_suppressed", "7", claimed.action.id)
        if not ground_of.store_url:
            events = ("action_claimed", "action_refused", "action_settled", "action_suppressed")
            told = [(one.event, one.fields["door"]) for one in life.about(task.id, *events)]
            assert told == list(zip(events, ("agent", "https", "https", "agent"), strict=True))


@pytest.mark.bears("RV15")
async def test_of_two_replicas_at_once_one_lets_it_be_done(
    oidc: OidcIssuer, postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # How long a second replica waits before it signs: nobody here looks at bundles seldom.
    monkeypatch.setattr(plan, "AHEAD", timedelta(seconds=1))
    with short_directory() as one, short_directory() as two:
        async with (
            living(Estate(one, postgresql), oidc) as life,
            running(Estate(two, postgresql), **settings_of(oidc)) as second,
        ):
            life.node.trusted = await own_bundle(second)
            agent, service = await life.agent(TRIAGE, "ws_1"), await life.agent(SERVICE, "ws_2")
            base = f"https://127.0.0.1:{second.port}"
            other = await life.stack.enter_async_context(
                httpx2.AsyncClient(verify=service.tls, base_url=base, trust_env=False)
            )
            task = await life.start(agent)
            wire = {"action": "ticket.read", "identifier": "4711"}

            async def raced(token: str, *steps: str) -> list[str]:
                doors = zip((service.http, other) * 3, steps, strict=True)
                sent = (door.post("/actions", json=wire | {"token": token, "step": step}) for door, step in doors)
                answers = await asyncio.gather(*sent)
                return sorted(str(each.json().get("result") or each.json()["error"]) for each in answers)

            token = await life.issue(agent, task.id)

            async def is_known() -> bool:
                return bool((await other.post("/introspect", data={"token": token})).json().get("active"))

            await eventually(is_known)
            for number in range(8):
                assert await raced(token, *[f"s{number}"] * 6) == [*["action_in_progress"] * 5, "claimed"]
            # A token for one use serves one of many steps.
            monkeypatch.setattr(exchange, "issue_claims", lambda *a, **k: issue_claims(*a, **(k | {"use": "once"})))
            for number in range(8):
                once = await life.issue(agent, task.id)
                steps = [f"once {number} {each}" for each in range(6)]
                assert await raced(once, *steps) == ["claimed", *["token_used"] * 5]


@pytest.mark.bears("RV15")
async def test_a_server_that_dies_in_the_middle_of_a_claim(ground_of: Estate, oidc: OidcIssuer) -> None:
    """Killed before the commit nothing was claimed; killed after it, it was: once."""
    directory, url = ground_of.directory, f"sqlite://{ground_of.directory}/data/broker.db"
    (directory / "data").mkdir()
    environment = environment_of(oidc)
    wire = {"action": "ticket.read", "identifier": "4711", "step": STEP}

    def armed(point: str) -> dict[str, str]:
        return environment | {"BROKER_SERVER__ALLOW_FAILPOINTS": "true", "BROKER_FAILPOINTS": f"{point}=exit"}

    async def claimed(life: Life, session: str) -> httpx2.Response:
        service = await life.agent(SERVICE, session)
        return await service.http.post("/actions", json=wire | {"token": token})

    async def dies(life: Life, one: Replica, session: str) -> None:
        with pytest.raises(httpx2.TransportError):
            await claimed(life, session)
        async with asyncio.timeout(DEADLINE):
            assert await one.process.wait() == EXIT_STATUS

    point = armed("actions.before_commit")
    async with replica(directory, "one", url, **point) as one, inhabited(ground_of, one.server, oidc) as life:
        agent = await life.agent(TRIAGE, "ws_agent")
        task = await life.start(agent)
        token = await life.issue(agent, task.id)
        await dies(life, one, "ws_1")
    point = armed("actions.after_claim")
    async with replica(directory, "one", url, **point) as one, inhabited(ground_of, one.server, oidc) as life:
        assert life.about(task.id, "action_claimed") == []
        await dies(life, one, "ws_2")
    async with replica(directory, "one", url, **environment) as one, inhabited(ground_of, one.server, oidc) as life:
        answer = await claimed(life, "ws_3")
        assert (answer.status_code, answer.json()["error"]) == (409, "action_in_progress"), answer.text
        assert [one.event for one in life.about(task.id, "action_claimed", "action_refused")] == [
            "action_claimed",
            "action_refused",
        ]
