"""One thing is revoked at a time, and a person is asked before many are."""

import pytest

from broker._proto.broker.server.v1 import revocations_pb2
from broker.cli.main import main
from broker.cli.svid_revoke import REASONS

REVOKE = ["svid", "revoke", "--dry-run"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--serial", "ab"], "the SVID with the serial number ab"),
        (["--serial", "ab", "--authority", "ca"], "the SVID with the serial number ab"),
        (["--session", "ws_1"], "held by the session ws_1"),
        (["--entry", "e1"], "of the entry e1"),
        (["-spiffeID", "spiffe://a.test/x"], "of spiffe://a.test/x"),
    ],
)
def test_a_dry_run_says_what_would_be_done(given: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*REVOKE, *given]) == 0
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["--serial", "ab", "--entry", "e1"],
        ["--entry", "e1", "--authority", "ca"],
        ["--entry", "e", "--reason", "x"],
    ],
)
def test_it_is_one_thing(given: list[str]) -> None:
    assert main([*REVOKE, *given]) == 2


def test_nobody_is_asked_where_nobody_may_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["svid", "revoke", "--entry", "e1", "--no-input"]) != 0
    assert "--yes" in capsys.readouterr().err


def test_the_reasons_are_those_of_the_wire() -> None:
    names = {f"REVOCATION_REASON_{name.upper().replace('-', '_')}": number for name, number in REASONS.items()}
    assert names == dict(revocations_pb2.RevocationReason.items())
