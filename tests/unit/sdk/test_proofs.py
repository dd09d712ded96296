"""DPoP at a service: its own nonces, for as long as they are good, and each proof once."""

from typing import Any

import pytest

from broker.errors import BrokerError
from broker.sdk import proofs
from broker.sdk.dpop import ProofKey
from broker.sdk.proofs import NONCE_SECONDS, DpopRequest, ProofJudge
from broker.tasks import NonceWanted
from broker.tasks.dpop import PROOF_LEEWAY, PROOF_SECONDS
from tests.unit.sdk.world import SteppedClock

URL = "https://tickets.example.org/tickets/1"


class Case:
    def __init__(self) -> None:
        self.clock = SteppedClock()
        self.judge = ProofJudge("https://tickets.example.org/tickets", self.clock)
        self.key = ProofKey(self.clock)

    def request(self, url: str = URL, *, token: str = "token", path: str = "/tickets/1", **fields: Any) -> DpopRequest:
        made = self.key.proof("GET", url, token=token, **{"nonce": self.judge.nonce} | fields)
        return DpopRequest((made,), "GET", path)

    def code(self, request: DpopRequest, *, spend: bool = False) -> str:
        try:
            proof = self.judge.judge(request, "token")
            if spend:
                self.judge.spend(proof)
        except BrokerError as error:
            return error.reason
        return "good"


@pytest.fixture
def case() -> Case:
    return Case()


def test_a_proof_is_for_this_address_this_token_and_this_service(case: Case) -> None:
    assert case.code(case.request()) == "good"
    assert case.code(case.request(path="/tickets/2")) == "invalid_dpop_proof"
    assert case.code(case.request("https://other.example.org/tickets/1")) == "invalid_dpop_proof"
    assert case.code(case.request(token="another")) == "invalid_dpop_proof"
    assert case.code(case.request(path="/../x")) == "invalid_dpop_proof"


@pytest.mark.parametrize("nonce", ["", "of-another-replica"])
def test_a_nonce_of_its_own_is_wanted_and_given(case: Case, nonce: str) -> None:
    with pytest.raises(NonceWanted) as wanted:
        case.judge.judge(case.request(nonce=nonce), "token")
    assert wanted.value.nonce == case.judge.nonce


def test_a_nonce_is_taken_for_one_turn_more_and_no_longer(case: Case) -> None:
    first = case.judge.nonce
    case.clock.step(NONCE_SECONDS)
    assert case.judge.nonce != first
    assert case.code(case.request(nonce=first)) == "good"
    case.clock.step(NONCE_SECONDS)
    assert case.code(case.request(nonce=first)) == "use_dpop_nonce"
    second = case.judge.nonce
    # Nobody called for two turns: the last one is over, although no other was handed out since.
    case.clock.step(2 * NONCE_SECONDS)
    assert case.code(case.request(nonce=second)) == "use_dpop_nonce"


@pytest.mark.bears("PB04")
def test_a_proof_is_good_once_for_as_long_as_anybody_would_take_it(case: Case) -> None:
    request = case.request()
    assert case.code(request, spend=True) == "good"
    assert case.code(request, spend=True) == "proof_replayed"
    proof = case.judge.judge(request, "token")
    case.clock.step(PROOF_SECONDS + 2 * PROOF_LEEWAY - 1)
    with pytest.raises(BrokerError) as again:
        case.judge.spend(proof)
    assert again.value.reason == "proof_replayed"


@pytest.mark.bears("PB09")
def test_a_memory_that_is_full_refuses_rather_than_forgets(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proofs, "MOST_PROOFS", 2)
    assert [case.code(case.request(), spend=True) for _ in range(3)] == ["good", "good", "dpop_busy"]
    case.clock.step(PROOF_SECONDS + 2 * PROOF_LEEWAY)
    assert case.code(case.request(), spend=True) == "good"
