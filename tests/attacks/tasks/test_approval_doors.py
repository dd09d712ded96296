"""The doors of approvals attacked: whatever is refused there is on record, and nothing that opens anything is shown."""

import json
from collections.abc import AsyncIterator

import pytest

from broker.audit.events import Event
from broker.errors import BrokerError
from broker.spiffe import jose
from tests.attacks.tasks.approval_rig import Bank, bank, payment
from tests.fakes.oidc import OidcIssuer, SigningKey
from tests.integration.identity_rig import Estate
from tests.integration.test_token_endpoint import TRIAGE, Process


@pytest.fixture
async def ground(ground_of: Estate, oidc: OidcIssuer) -> AsyncIterator[Bank]:
    async with bank(ground_of, oidc) as one:
        yield one


@pytest.fixture
async def agent(ground: Bank) -> AsyncIterator[Process]:
    async with ground.rig.agent(TRIAGE, "ws_triage") as one:
        yield one


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


@pytest.mark.bears("RV18")
async def test_every_refusal_at_the_address_is_on_record(ground: Bank, agent: Process) -> None:
    """Also of a request that is refused before anybody's token was looked at, and of one that only wanted to see."""
    task = (await ground.start(agent)).id
    approval = (await ground.ask_https(agent, task)).json()["approval"]
    address = f"/approvals/{approval}"
    carol, mallory, alice = (bearer(ground.person(name)) for name in ("carol", "mallory", "alice"))
    agents = bearer(ground.rig.oidc.token("carol"))
    forged = bearer(ground.person(key=SigningKey("key-1", is_strangers=True)))
    json_type = {"content-type": "application/json"}
    tries = (
        ("GET", "/approvals", {}, b"", 401, "invalid_client"),
        ("GET", "/approvals?state=used", carol, b"", 400, "parameter_unknown"),
        ("GET", "/approvals?after=x", carol, b"", 400, "invalid_page_token"),
        ("GET", "/approvals", agents, b"", 403, "approval_client"),
        ("GET", "/approvals", forged, b"", 401, None),
        ("GET", address, {}, b"", 401, "invalid_client"),
        ("GET", address, mallory, b"", 404, "approval_unknown"),
        ("POST", f"{address}/approve", {}, b"", 401, "invalid_client"),
        ("POST", f"{address}/approve", carol | json_type, b"{", 400, "invalid_json"),
        ("POST", f"{address}/approve", carol | json_type, b'{"use_within": 3601}', 400, "invalid_approval"),
        ("POST", f"{address}/approve", carol, b"{}", 400, "content_type"),
        ("POST", f"{address}/approve?reason=x", carol, b"", 400, "parameter_in_query"),
        ("POST", f"{address}/approve", agents, b"", 403, "approval_client"),
        ("POST", f"{address}/approve", alice, b"", 403, "approver_is_requester"),
        ("POST", f"{address}/approve", mallory, b"", 404, "approval_unknown"),
        ("POST", f"{address}/deny", mallory, b"", 404, "approval_unknown"),
        ("POST", f"{address}/withdraw", mallory, b"", 404, "approval_unknown"),
        ("POST", f"{address}/withdraw", carol, b"", 409, "approval_not_given"),
        ("POST", "/approvals/apr_x/approve", carol, b"", 404, "approval_unknown"),
    )
    for method, at, headers, body, status, code in tries:
        before = len(ground.records(Event.APPROVAL_REFUSED))
        answer = await ground.people.request(method, at, headers=headers, content=body)
        records = ground.records(Event.APPROVAL_REFUSED)[before:]
        assert answer.status_code == status, (method, at, answer.text)
        assert code is None or answer.json()["error"] == code
        assert [one.fields["code"] for one in records] == [answer.json()["error"]], (method, at)
        assert ("www-authenticate" in answer.headers) is (status == 401)
    # With an agent's certificate beside the person's token it is on record whose it was.
    brought = await agent.http.post(f"{address}/approve", headers=agents)
    assert brought.status_code == 403
    last = ground.records(Event.APPROVAL_REFUSED)[-1]
    assert (last.actor, last.subject, last.fields["code"]) == (str(TRIAGE), "carol", "approval_client")
    assert (await ground.seen(approval))["state"] == "pending"
    assert ground.records(Event.APPROVAL_GIVEN, Event.APPROVAL_DENIED, Event.APPROVAL_WITHDRAWN) == []


@pytest.mark.bears("RV17")
async def test_who_sees_an_approval_holds_nothing_by_it(ground: Bank, agent: Process) -> None:
    """No token, no id of one, no hash of the user's word: what is shown opens nothing, not even to the agent itself."""
    task = (await ground.start(agent)).id
    approval = (await ground.ask_https(agent, task)).json()["approval"]
    said = ground.person()
    await ground.say(approval, token=said, reason="invoice seen")
    issued = await ground.ask_https(agent, task)
    assert issued.status_code == 200, issued.text
    claims = jose.parse_compact(issued.json()["access_token"]).payload
    seen = json.dumps(await ground.seen(approval))
    given = ground.records(Event.APPROVAL_GIVEN)[0].fields
    for secret in (str(claims["jti"]), issued.json()["access_token"], said, str(given["subject_hash"]), "s-carol"):
        assert secret not in seen
    # As a token it is none, and as a parameter it is not known.
    for changes in ({"subject_token": approval}, {"approval": approval}):
        answer = await ground.ask_https(agent, task, payment("200"), **changes)
        assert (answer.status_code, "access_token" in answer.json()) == (400, False)
    with pytest.raises(BrokerError):
        jose.parse_compact(approval)
