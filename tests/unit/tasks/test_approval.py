"""What an approval is bound to, how it moves, and that it is stored as it was."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import BrokerError, Conflict, Invalid, PolicyDenied, Refused
from broker.spiffe import SpiffeId, strictjson
from broker.tasks import Authority, Delegation, Resource
from broker.tasks.approval import (
    MAX_RULES,
    Approval,
    ApprovalPending,
    ApprovalState,
    Verdict,
    Wanted,
    decide,
    lapse,
    use,
    withdraw,
)

NOW = datetime(2026, 11, 28, 12, 0, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
BANK = Resource("https://bank.example.org")


def payment(amount: str = "100", recipient: str = "shop.example", **members: Any) -> Authority:
    constraints = {"max_amount": {"amount": amount, "currency": "EUR"}, "recipient_domain": [recipient]}
    detail = {"type": "api", "locations": [BANK.text], "actions": ["payment.transfer"], "constraints": constraints}
    return Authority.parse([detail | members])


WANTED = Wanted(
    task="tsk_1", root="tsk_0", agent=SpiffeId("spiffe://example.org/triage"), session="ws_1", user="alice",
    issuer="https://idp.example.org", epoch=3, resource=BANK, authority=payment(),
)  # fmt: skip
ASKED = Approval(
    id="apr_1", wanted=WANTED, purpose="pay the invoice", rules=("payments",), policy="sha-256:" + "A" * 43,
    created_at=NOW, expires_at=NOW + 60 * MINUTE, asked_at=NOW,
)  # fmt: skip


def person(user: str = "carol", issuer: str = "https://idp.example.org") -> Delegation:
    return Delegation(
        issuer=issuer, user=user, expires_at=NOW + 5 * MINUTE, token_hash="sha-256:" + "B" * 42 + "A", session="s-9",
        auth_time=NOW, issued_at=NOW,
    )  # fmt: skip


def approved(asked: Approval = ASKED, **changes: Any) -> Approval:
    said = {"by": "carol", "now": NOW + MINUTE, "approver": person(), "until": NOW + 6 * MINUTE}
    return decide(asked, Verdict.APPROVE, **(said | changes))


@pytest.mark.bears("RV17")
@pytest.mark.parametrize(
    "other",
    [
        {"authority": payment("1000")},
        {"authority": payment("100.01")},
        {"authority": payment(recipient="evil.example")},
        {"authority": payment(identifier="4711")},
        {"authority": payment(actions=["payment.transfer", "payment.cancel"])},
        {"resource": Resource("https://bank.example.org/other")},
        {"task": "tsk_2"},
        {"agent": SpiffeId("spiffe://example.org/other")},
        {"session": "ws_2"},
        {"session": None},
        {"user": "bob"},
        {"issuer": "https://idp2.example.org"},
        {"epoch": 4},
        {"parameter_digest": "sha-256:" + "C" * 42 + "A"},
    ],
)
def test_whatever_differs_is_another_approval(other: dict[str, Any]) -> None:
    assert replace(WANTED, **other).digest != WANTED.digest


def test_the_same_is_the_same_however_it_was_written() -> None:
    again = Wanted.parse(strictjson.loads(strictjson.canonical(WANTED.to_json())))
    assert again == WANTED
    assert again.digest == WANTED.digest
    digested = replace(WANTED, session=None, parameter_digest="sha-256:" + "C" * 42 + "A")
    assert Wanted.parse(digested.to_json()) == digested


@pytest.mark.parametrize(
    "wrong",
    [
        {"epoch": True},
        {"epoch": "3"},
        {"task": 1},
        {"session": 1},
        {"more": 1},
        {"user": ""},
        {"parameter_digest": "x"},
    ],
)
def test_what_nobody_wrote_is_not_read(wrong: dict[str, Any]) -> None:
    with pytest.raises(Invalid):
        Wanted.parse(WANTED.to_json() | wrong)


def test_a_yes_is_used_once_within_its_time() -> None:
    yes = approved(reason="invoice seen")
    assert (yes.state, yes.decided_by, yes.reason) == (ApprovalState.APPROVED, "carol", "invoice seen")
    used = use(yes, "jti_1", NOW + 2 * MINUTE)
    assert (used.state, used.jti, used.used_at) == (ApprovalState.USED, "jti_1", NOW + 2 * MINUTE)
    for over, at in ((used, NOW + 2 * MINUTE), (yes, NOW + 6 * MINUTE), (ASKED, NOW)):
        with pytest.raises(Refused):
            use(over, "jti_2", at)


@pytest.mark.bears("RV18")
@pytest.mark.parametrize("who", [person("alice"), person("alice", "https://idp2.example.org")])
def test_nobody_approves_what_is_done_for_them(who: Delegation) -> None:
    with pytest.raises(PolicyDenied) as refused:
        approved(approver=who)
    assert refused.value.reason == "approver_is_requester"


def test_a_yes_has_a_person_and_an_end() -> None:
    for lacking in ({"approver": None}, {"until": None}, {"until": NOW}):
        with pytest.raises(Invalid):
            approved(**lacking)


def test_deciding_twice_is_fine_and_otherwise_is_not() -> None:
    yes, no = approved(), decide(ASKED, Verdict.DENY, by="carol", now=NOW)
    assert approved(yes) is yes
    assert decide(no, Verdict.DENY, by="carol", now=NOW) is no
    for decided, verdict, by in (
        (yes, Verdict.DENY, "carol"),
        (no, Verdict.DENY, "dave"),
        (no, Verdict.APPROVE, "carol"),
    ):
        with pytest.raises(Conflict) as conflict:
            decide(decided, verdict, by=by, now=NOW + MINUTE, approver=person(), until=NOW + 3 * MINUTE)
        assert conflict.value.reason == "approval_decided"


def test_time_is_asked_before_what_is_written() -> None:
    late = NOW + 60 * MINUTE
    assert ASKED.state_at(late - timedelta(microseconds=1)) is ApprovalState.PENDING
    assert ASKED.state_at(late) is ApprovalState.EXPIRED
    with pytest.raises(Refused) as refused:
        approved(now=late, until=late + MINUTE)
    assert refused.value.reason == "approval_expired"
    yes = approved()
    assert [yes.state_at(NOW + n * MINUTE) for n in (5, 6)] == [ApprovalState.APPROVED, ApprovalState.EXPIRED]
    over = lapse(yes, late)
    assert (over.state, over.decided_by, over.approver) == (ApprovalState.EXPIRED, "carol", person())
    nobody = lapse(ASKED, late)
    assert (nobody.state, nobody.decided_by, nobody.decided_at) == (ApprovalState.EXPIRED, "server", late)


def test_a_yes_is_taken_back_used_or_not() -> None:
    used = use(approved(), "jti_1", NOW + 2 * MINUTE)
    for given_ in (approved(), used):
        over = withdraw(given_, by="operator:uid:0", now=NOW + 3 * MINUTE, reason="wrong shop")
        assert (over.state, over.decided_by, over.jti) == (ApprovalState.WITHDRAWN, "operator:uid:0", given_.jti)
        assert withdraw(over, by="carol", now=NOW + 4 * MINUTE) is over
    for never in (ASKED, decide(ASKED, Verdict.DENY, by="carol", now=NOW), lapse(ASKED, NOW)):
        with pytest.raises(Conflict) as conflict:
            withdraw(never, by="carol", now=NOW)
        assert conflict.value.reason == "approval_not_given"


@pytest.mark.parametrize(
    "wrong",
    [
        {"rules": ("r",) * (MAX_RULES + 1)},
        {"expires_at": NOW},
        {"asked_at": datetime(2026, 1, 1)},  # noqa: DTZ001 - what is refused
        {"state": ApprovalState.DENIED},
        {"decided_by": "carol"},
        {"state": ApprovalState.APPROVED, "decided_at": NOW, "decided_by": "carol"},
        {
            "state": ApprovalState.USED,
            "decided_at": NOW,
            "decided_by": "carol",
            "approver": person(),
            "approved_until": NOW,
        },
        {"jti": "jti_1"},
        {"policy": "p"},
        {"purpose": ""},
        {"reason": "\n"},
    ],
)
def test_an_approval_that_exists_is_valid(wrong: dict[str, Any]) -> None:
    with pytest.raises(Invalid):
        replace(ASKED, **wrong)


def test_who_waits_is_told_how() -> None:
    waiting, hasty = ApprovalPending(ASKED), ApprovalPending(ASKED, too_soon=True)
    assert (waiting.reason, hasty.reason) == ("approval_pending", "slow_down")
    assert waiting.approval_id == "apr_1"
    assert "5 seconds" in waiting.hint


FINAL = (ApprovalState.DENIED, ApprovalState.WITHDRAWN, ApprovalState.EXPIRED)


@given(st.lists(st.sampled_from(["approve", "deny", "withdraw", "use", "wait"]), max_size=12))
def test_nothing_leaves_an_end_and_one_yes_is_one_token(steps: list[str]) -> None:
    approval, now, uses = ASKED, NOW, 0
    for step in steps:
        before = approval
        now += 2 * MINUTE
        try:
            match step:
                case "approve":
                    approval = approved(approval, now=now, until=now + 5 * MINUTE)
                case "deny":
                    approval = decide(approval, Verdict.DENY, by="carol", now=now)
                case "withdraw":
                    approval = withdraw(approval, by="carol", now=now)
                case "use":
                    approval = use(approval, f"jti_{uses}", now)
                    uses += 1
                case _:
                    now += 4 * MINUTE
        except BrokerError:
            assert approval is before
        if before.state in FINAL:
            assert approval is before
    assert uses <= 1
