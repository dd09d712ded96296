"""``/approvals`` at an open door: what is shown, what may be said, and in which words it is refused."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest

from broker.audit.events import Event
from broker.server.api.http.approvals import shown
from broker.server.tasks.approvals import MAX_USE_WITHIN
from broker.tasks.approval import Approval, ApprovalState, lapse, use, withdraw
from tests.fakes.oidc import OidcIssuer
from tests.unit.server.api.http.door import HttpDoorway, assert_error, open_door
from tests.unit.server.tasks.estate import AGENT, ISSUER, running
from tests.unit.tasks.test_approval import ASKED, MINUTE, NOW, WANTED, approved

APP = "console"
MEMBERS = {
    "id", "state", "task", "agent", "user", "issuer", "audience", "authorization_details", "scope", "purpose",
    "parameter_digest", "rules", "created_at", "expires_at", "decided_at", "decided_by", "reason", "approved_until", "used_at",
}  # fmt: skip


@dataclass
class Office:
    """An open door, and an approval that waits for what is done for alice."""

    door: HttpDoorway
    approval: Approval

    async def ask(self, method: str, path: str, *, user: str = "alice", **sent: Any) -> httpx2.Response:
        at = int(self.door.estate.clock.now().timestamp())
        token = self.door.estate.user_token(user, azp=APP, sid=f"s-{user}", auth_time=at)
        headers = {"authorization": f"Bearer {token}"} | sent.pop("headers", {})
        return await self.door.client.request(method, path, headers=headers, **sent)

    async def say(self, verb: str, **sent: Any) -> httpx2.Response:
        return await self.ask("POST", f"/approvals/{self.approval.id}/{verb}", **sent)


@pytest.fixture
async def office(tmp_path: Path, oidc: OidcIssuer) -> AsyncIterator[Office]:
    clients = {"clients": frozenset({APP}), "approval_clients": frozenset({APP})}
    async with running(tmp_path, oidc, **clients) as estate, open_door(estate) as door:
        task, now = await estate.start(), estate.clock.now()
        wanted = replace(WANTED, task=task.id, root=task.root, issuer=oidc.issuer)
        times = {"created_at": now, "asked_at": now, "expires_at": now + timedelta(hours=1)}
        approval = replace(ASKED, wanted=wanted, **times)
        await estate.store.write(lambda writer: writer.add_approval(approval))
        door.come_as(None)
        yield Office(door, approval)


def test_what_is_shown_says_who_decided_and_never_which_token() -> None:
    used = use(approved(reason="invoice seen"), "jti_1", NOW + 2 * MINUTE)
    assert shown(used, NOW + 3 * MINUTE) == {
        "id": "apr_1",
        "state": "used",
        "task": "tsk_1",
        "agent": "spiffe://example.org/triage",
        "user": "alice",
        "issuer": "https://idp.example.org",
        "audience": "https://bank.example.org",
        "authorization_details": WANTED.authority.to_json(),
        "scope": "payment.transfer",
        "purpose": "pay the invoice",
        "parameter_digest": None,
        "rules": ["payments"],
        "created_at": "2026-11-28T12:00:00Z",
        "expires_at": "2026-11-28T13:00:00Z",
        "decided_at": "2026-11-28T12:01:00Z",
        "decided_by": "carol",
        "reason": "invoice seen",
        "approved_until": "2026-11-28T12:06:00Z",
        "used_at": "2026-11-28T12:02:00Z",
    }


@pytest.mark.parametrize(
    ("approval", "after", "state"),
    [
        (ASKED, MINUTE, "pending"),
        (ASKED, 60 * MINUTE, "expired"),
        (approved(), 2 * MINUTE, "approved"),
        (approved(), 6 * MINUTE, "expired"),
        (lapse(ASKED, NOW + 60 * MINUTE), 61 * MINUTE, "expired"),
        (withdraw(approved(), by="carol", now=NOW + 2 * MINUTE), 3 * MINUTE, "withdrawn"),
    ],
)
def test_the_state_is_the_one_that_counts_now(approval: Approval, after: timedelta, state: str) -> None:
    members = shown(approval, NOW + after)
    assert members["state"] == state
    assert members.keys() == MEMBERS


async def test_whom_it_is_done_for_sees_it_and_says_no(office: Office) -> None:
    path = f"/approvals/{office.approval.id}"
    seen = await office.ask("GET", path)
    assert (seen.status_code, seen.json()["state"], seen.headers["cache-control"]) == (200, "pending", "no-store")
    for _ in range(2):
        denied = await office.say("deny", json={"reason": "not today"})
        assert denied.status_code == 200, denied.text
        assert (denied.json()["state"], denied.json()["decided_by"], denied.json()["reason"]) == (
            "denied", "alice", "not today",
        )  # fmt: skip
    assert_error(await office.say("withdraw"), 409, "approval_not_given")
    [record] = await office.door.estate.records(Event.APPROVAL_DENIED)
    assert (record.actor, record.subject) == ("alice", office.approval.id)
    assert (await office.ask("GET", path)).json()["state"] == "denied"


@pytest.mark.parametrize("verb", ["approve", "deny", "withdraw"])
@pytest.mark.parametrize(
    ("sent", "code"),
    [
        ({"content": b"{", "headers": {"content-type": "application/json"}}, "invalid_json"),
        ({"content": b"{}"}, "content_type"),
        ({"data": {"reason": "x"}}, "content_type"),
        ({"json": []}, "invalid_approval"),
        ({"content": b"null", "headers": {"content-type": "application/json"}}, "invalid_approval"),
        ({"json": {"surprise": 1}}, "invalid_approval"),
        ({"json": {"reason": 1}}, "invalid_approval"),
        ({"json": {"reason": "x" * 2000}}, None),
        ({"json": {}, "params": {"a": "b"}}, "parameter_in_query"),
    ],
)
async def test_only_what_may_be_said_is_heard(
    office: Office, verb: str, sent: dict[str, Any], code: str | None
) -> None:
    answer = await office.say(verb, **sent)
    assert answer.status_code == 400, answer.text
    assert code is None or answer.json()["error"] == code
    found = await office.door.estate.ends.approvals.get(office.approval.id)
    assert found.state is ApprovalState.PENDING
    [record] = await office.door.estate.records(Event.APPROVAL_REFUSED)
    assert record.fields["code"] == answer.json()["error"]


@pytest.mark.parametrize("use_within", [-1, MAX_USE_WITHIN + 1, True, "60", None, [1]])
async def test_a_time_is_whole_seconds_within_bounds(office: Office, use_within: object) -> None:
    assert_error(await office.say("approve", json={"use_within": use_within}), 400, "invalid_approval")
    # How long a no is good nobody can say.
    assert_error(await office.say("deny", json={"use_within": 60}), 400, "invalid_approval")


@pytest.mark.parametrize("sent", [{}, {"json": {}}, {"json": {"reason": "", "use_within": 0}}])
async def test_a_body_may_be_left_out(office: Office, sent: dict[str, Any]) -> None:
    # Read as a request, and then refused for whose it is.
    assert_error(await office.say("approve", **sent), 403, "approver_is_requester")


async def test_without_a_token_there_is_a_challenge_and_a_record(office: Office) -> None:
    client, path = office.door.client, f"/approvals/{office.approval.id}"
    tries = [
        ("GET", "/approvals"),
        ("GET", path),
        *(("POST", f"{path}/{verb}") for verb in ("approve", "deny", "withdraw")),
    ]
    for method, at in tries:
        answer = await client.request(method, at)
        assert_error(answer, 401, "invalid_client")
        assert answer.headers["www-authenticate"] == "Bearer"
    # A certificate is none; it is on record who came with it.
    office.door.come_as(AGENT)
    assert_error(await client.post(f"{path}/approve"), 401, "invalid_client")
    records = await office.door.estate.records(Event.APPROVAL_REFUSED)
    assert [one.actor for one in records] == ["anonymous"] * len(tries) + [str(AGENT)]


async def test_what_is_no_id_is_no_approval(office: Office) -> None:
    for wrong in ("apr_x", "x" * 500, "a%20b", "..%2fapprovals"):
        for method, path in (("GET", f"/approvals/{wrong}"), ("POST", f"/approvals/{wrong}/deny")):
            answer = await office.ask(method, path)
            assert answer.status_code == 404, (path, answer.text)
            assert answer.json()["error"] in {"approval_unknown", "not_found"}


async def test_a_list_has_one_parameter(office: Office) -> None:
    assert_error(await office.ask("GET", "/approvals", params={"state": "used"}), 400, "parameter_unknown")
    assert_error(
        await office.ask("GET", "/approvals", params=[("after", "a"), ("after", "b")]), 400, "parameter_unknown"
    )
    assert_error(await office.ask("GET", "/approvals", params={"after": "x"}), 400, "invalid_page_token")
    # What is done for alice is never alice's to decide.
    assert (await office.ask("GET", "/approvals")).json() == {"approvals": []}


async def test_the_metadata_says_where(office: Office) -> None:
    body = (await office.door.client.get("/.well-known/oauth-authorization-server")).json()
    assert body["approvals_endpoint"] == f"{ISSUER}/approvals"
