"""What has ended is over at once, at every consumer: rounds of ends and of tainted keys, through the real port and the real feed."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from broker._proto.broker.server.v1 import authorities_pb2 as pb
from broker.errors import BrokerError
from broker.sdk.verify import TokenVerifier
from broker.sdk.workload import Workload
from broker.server.api.http.token_formats import TXN_TOKEN
from broker.spiffe import jose
from tests.attacks.tasks.outward_rig import SERVICE, TICKETS, TRIAGE, Rig, rig
from tests.fakes.running_agent import until

pytestmark = pytest.mark.timeout(180)

BOUND = 5.0
"""Seconds within which a verifier must have heard; here it takes milliseconds."""


@pytest.fixture
async def house() -> AsyncIterator[Rig]:
    async with rig() as made:
        yield made


@pytest.mark.bears("V01", "RV02")
async def test_nobody_hears_active_after_the_end_was_answered(house: Rig) -> None:
    """Rounds of end against introspection: a question that began after the 200 never hears yes."""
    rounds, wrong, asked = 40, [], 0

    async def listen(token: str, ended: asyncio.Event) -> None:
        nonlocal asked
        after = 0
        while after < 3:
            began_after = ended.is_set()
            if await house.active(token) and began_after:
                wrong.append(token)
            asked += 1
            after += began_after

    for number in range(rounds):
        issued = await house.issued()
        ended = asyncio.Event()
        listening = [asyncio.create_task(listen(issued["access_token"], ended)) for _ in range(2)]
        if number % 2:
            answer = await house.post("/revoke", [("token", issued["access_token"]), ("end", "task")])
        else:
            answer = await house.clients[TRIAGE].post(f"/tasks/{issued['task']}/complete")
        assert answer.status_code == 200
        ended.set()
        await asyncio.gather(*listening)
    assert wrong == []
    assert asked >= rounds * 6
    assert len(house.records("task_ended")) == rounds


@pytest.mark.bears("JW21", "RV07")
async def test_a_rotated_key_has_grace_and_a_tainted_one_has_none(house: Rig) -> None:
    """At the verifier, by the feed, and at once at introspection."""
    chain, _, _ = house.files[TRIAGE]
    async with Workload.connect(f"unix:{house.agent.socket}", spiffe_id=SERVICE) as me:
        verifier = await TokenVerifier.discover(house.issuer, audience=TICKETS, workload=me, timeout=30)
        async with verifier:
            before = (await house.issued())["access_token"]
            kid = jose.parse_compact(before).kid
            assert verifier.verify_now(before, chain).user == "alice"
            task = pb.AUTHORITY_KIND_TASK
            prepared = await house.operator.PrepareAuthority(pb.PrepareAuthorityRequest(kind=task), timeout=30)
            wanted = pb.ActivateAuthorityRequest(kind=task, id=prepared.authority.id)
            await house.operator.ActivateAuthority(wanted, timeout=30)
            after = (await house.issued())["access_token"]
            assert jose.parse_compact(after).kid == prepared.authority.id
            await until(lambda: accepts(verifier, after, chain))
            assert accepts(verifier, before, chain), "grace: what it signed still counts"
            assert await house.active(before)
            assert set(await house.keys()) == {kid, prepared.authority.id}
            await house.operator.TaintAuthority(pb.TaintAuthorityRequest(kind=task, id=kid), timeout=30)
            assert not await house.active(before)
            assert set(await house.keys()) == {prepared.authority.id}
            await until(lambda: not accepts(verifier, before, chain))
            assert accepts(verifier, after, chain)
            txn = {"requested_token_type": TXN_TOKEN, "audience": "example.org", "resource": None, "authorization_details": None, "scope": "ticket.read"}  # fmt: skip
            refused = await house.token(subject_token=before, **txn)
            assert (refused.status_code, refused.json()["error"]) == (400, "invalid_request")
            assert house.records("token_refused")[-1].fields["reason"] == "token_key_unknown"
            assert [one.subject for one in house.records("authority_tainted")] == [kid]


@pytest.mark.bears("V01", "RV02", "JW22")
async def test_a_verifier_hears_of_each_end_within_its_bound(house: Rig) -> None:
    """Also of a token that it has accepted before and remembers."""
    chain, _, _ = house.files[TRIAGE]
    delays = []
    async with Workload.connect(f"unix:{house.agent.socket}", spiffe_id=SERVICE) as me:
        verifier = await TokenVerifier.discover(house.issuer, audience=TICKETS, workload=me, timeout=30)
        async with verifier:
            for _ in range(20):
                issued = await house.issued()
                for _ in range(3):
                    assert accepts(verifier, issued["access_token"], chain)
                await house.post("/revoke", [("token", issued["access_token"]), ("end", "task")])
                answered = time.perf_counter()
                await until(lambda: not accepts(verifier, issued["access_token"], chain))  # noqa: B023
                delays.append(time.perf_counter() - answered)
    assert max(delays) < BOUND, delays


def accepts(verifier: TokenVerifier, token: str, chain: Any) -> bool:
    try:
        verifier.verify_now(token, chain)
    except BrokerError as error:
        if error.reason not in {"token_key_unknown", "task_ended", "token_revoked"}:
            raise
        return False
    return True
