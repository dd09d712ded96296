from typing import Any

import pytest

from broker.errors import Invalid, InvalidToken, Refused
from broker.spiffe import SpiffeId
from broker.tasks import BindingMatch, Confirmation, PeerEvidence, check_binding
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
