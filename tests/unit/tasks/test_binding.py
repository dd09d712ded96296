from datetime import timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from broker.errors import Invalid, InvalidToken, Refused
from broker.spiffe import SpiffeId
from broker.tasks import Accepted, BindingMatch, Confirmation, PeerEvidence, check_binding
from broker.tasks.binding import WINDOW_SKEW
from broker.tasks.dpop import ShownProof, shown
from tests.unit.tasks.world import AGENT, X5T, svid

OTHER = "B" * 42 + "w"


def test_the_claim_reads_as_itself() -> None:
    for cnf in (Confirmation(X5T), Confirmation(X5T, "ws_1"), Confirmation(X5T, "ws_1", OTHER)):
        assert Confirmation.parse(cnf.to_json()) == cnf
    assert Confirmation(X5T).to_json() == {"x5t#S256": X5T}


@pytest.mark.bears("PB02")
@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        [],
        "x",
        {"bind": "window"},
        {"x5t#S256": X5T, "bind": "other"},
        {"x5t#S256": X5T, "spiffe_session": "ws_1", "bind": "window"},
        {"spiffe_session": "ws_1"},
        {"x5t#S256": None},
        {"x5t#S256": ""},
        {"x5t#S256": X5T + "="},
        {"x5t#S256": X5T[:-1]},
        {"x5t#S256": "A" * 42 + "B"},
        {"x5t#S256": X5T + "\n"},
        {"x5t#S256": X5T, "spiffe_session": ""},
        {"x5t#S256": X5T, "spiffe_session": None},
        {"x5t#S256": X5T, "jkt": ""},
        {"x5t#S256": X5T, "jkt": "short"},
        {"x5t#S256": X5T, "x5t": X5T},
        {"x5t#S256": X5T, "jwk": {}},
    ],
)
def test_a_binding_that_is_not_understood_is_refused(value: Any) -> None:
    with pytest.raises(InvalidToken) as refused:
        Confirmation.parse(value)
    assert refused.value.reason == "token_cnf"


def test_a_binding_of_ours_is_well_formed() -> None:
    for fields in ({"x5t": "x"}, {"x5t": X5T, "session": "a b"}, {"x5t": X5T, "jkt": ""}):
        with pytest.raises(Invalid):
            Confirmation(**fields)


def test_evidence_comes_from_a_verified_svid_only() -> None:
    with pytest.raises(TypeError):
        PeerEvidence(AGENT, X5T, None, object())
    held = svid()
    evidence = PeerEvidence.from_svid(held)
    assert (evidence.spiffe_id, evidence.x5t, evidence.session) == (AGENT, held.x5t, None)


@pytest.mark.bears("PB11")
def test_the_certificate_itself_or_its_live_session_is_the_holder() -> None:
    first, rotated = svid(), svid()
    cnf = Confirmation(first.x5t, "ws_1")
    assert check_binding(cnf, AGENT, PeerEvidence.from_svid(first)) is BindingMatch.X5T
    assert check_binding(cnf, AGENT, PeerEvidence.from_svid(rotated, session="ws_1")) is BindingMatch.SESSION


@pytest.mark.bears("PB12", "SP09")
def test_nobody_else_is_the_holder() -> None:
    first, replica = svid(), svid()
    neighbour = svid(SpiffeId("spiffe://example.org/agent2"))
    foreign = svid(SpiffeId("spiffe://other.org/agent"))
    cnf = Confirmation(first.x5t, "ws_1")
    for evidence in (
        PeerEvidence.from_svid(replica),
        PeerEvidence.from_svid(replica, session="ws_2"),
        PeerEvidence.from_svid(neighbour, session="ws_1"),
        PeerEvidence.from_svid(foreign, session="ws_1"),
    ):
        with pytest.raises(Refused) as refused:
            check_binding(cnf, AGENT, evidence)
        assert refused.value.reason == "binding_mismatch"
    with pytest.raises(Refused):
        check_binding(Confirmation(first.x5t), AGENT, PeerEvidence.from_svid(replica))


def test_the_id_is_asked_even_where_the_thumbprint_agrees() -> None:
    held = svid()
    with pytest.raises(Refused):
        check_binding(Confirmation(held.x5t), SpiffeId("spiffe://example.org/other"), PeerEvidence.from_svid(held))


def test_no_certificate_is_another_answer() -> None:
    with pytest.raises(Refused) as refused:
        check_binding(Confirmation(X5T), AGENT, None)
    assert refused.value.reason == "binding_missing"


def code(*args: Any, **shown_with: Any) -> str:
    try:
        return check_binding(*args, **shown_with).value
    except Refused as error:
        return error.reason


def proof() -> ShownProof:
    return shown(ec.generate_private_key(ec.SECP256R1()).public_key(), "jti", "GET:https://x", 2_000_000_000)


@pytest.mark.bears("PB02")
def test_a_key_is_proven_and_by_no_other_key() -> None:
    mine, other, held = proof(), proof(), PeerEvidence.from_svid(svid())
    cnf = Confirmation(jkt=mine.jkt)
    assert code(cnf, AGENT, None, proof=mine) == "dpop"
    assert code(cnf, AGENT, None, proof=other) == "binding_mismatch"
    assert code(cnf, AGENT, held) == "dpop_required"
    # With a certificate beside the key both are asked for.
    both = Confirmation(held.x5t, jkt=mine.jkt)
    assert code(both, AGENT, held, proof=mine) == "dpop"
    assert code(both, AGENT, PeerEvidence.from_svid(svid()), proof=mine) == "binding_mismatch"
    assert code(both, AGENT, None, proof=mine) == "binding_missing"
    # A session that the token names is no key.
    named = Confirmation(session="ws_1", jkt=mine.jkt)
    assert code(named, AGENT, held.of_session("ws_1")) == "dpop_required"


def test_a_proof_for_a_token_that_names_no_key_is_refused() -> None:
    held = PeerEvidence.from_svid(svid())
    assert code(Confirmation(held.x5t), AGENT, held, proof=proof()) == "dpop_unexpected"
    assert code(None, AGENT, None, proof=proof(), accepted=Accepted(bearer=True)) == "dpop_unexpected"


def test_a_token_that_is_bound_to_nobody_counts_where_it_was_published_only() -> None:
    assert code(None, AGENT, None) == "binding_missing"
    assert code(None, AGENT, PeerEvidence.from_svid(svid()), accepted=Accepted(window=True)) == "binding_missing"
    assert code(None, AGENT, None, accepted=Accepted(bearer=True)) == "bearer"


def test_a_later_leaf_counts_within_the_window_of_a_token_that_says_so() -> None:
    first, later = svid(), PeerEvidence.from_svid(svid())
    window, exact, takes = Confirmation(first.x5t, window=True), Confirmation(first.x5t), Accepted(window=True)
    second = timedelta(seconds=1)

    def shown_in(begin: timedelta, end: timedelta, cnf: Confirmation = window, accepted: Accepted = takes) -> str:
        life = (later.not_before + begin, later.not_before + end)
        return code(cnf, AGENT, later, life=life, accepted=accepted)

    assert shown_in(-second, second) == "window"
    assert shown_in(WINDOW_SKEW, WINDOW_SKEW + second) == "window"
    assert shown_in(WINDOW_SKEW + second, WINDOW_SKEW + 2 * second) == "binding_mismatch"
    assert shown_in(-2 * second, -second) == "binding_mismatch"
    assert shown_in(-second, second, accepted=Accepted(bearer=True)) == "binding_mismatch"
    assert shown_in(-second, second, cnf=exact) == "binding_mismatch"
    assert code(window, AGENT, later, accepted=takes) == "binding_mismatch"
    assert code(window, SpiffeId("spiffe://example.org/b"), later, life=None, accepted=takes) == "binding_mismatch"
