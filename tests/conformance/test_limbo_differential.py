"""Our path validation beside ``openssl verify`` and pyca's, on every case of x509-limbo; I13."""

import shutil
from pathlib import Path

import pytest

from tests.conformance import limbo
from tests.conformance.limbo_rows import ROWS
from tests.conformance.verifiers import are_the_versions_written_down, letters, openssl, pyca

pytestmark = [
    pytest.mark.skipif(not limbo.FOLDER.is_dir(), reason=limbo.REASON),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl command"),
    pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning"),
    pytest.mark.timeout(180),
]


@pytest.mark.bears("I13", "X5-17")
def test_no_row_is_looser_than_both_and_each_difference_is_written_down(tmp_path: Path) -> None:
    said = {
        case.id: letters(case.accepted, limbo.chain_verdict(case), openssl(case, tmp_path), pyca(case))
        for case in limbo.cases()
    }
    assert len(said) > 200
    # Where the suite refuses and both of the others do, so do we: whatever their versions.
    assert [name for name, row in said.items() if row == "RARR"] == []
    # Ours is exact: a row that is not written down is unanimous, or at least ours is the suite's.
    written = {name: row for name, (row, _) in ROWS.items()}
    assert {name: row[:2] for name, row in said.items() if row[0] != row[1]} == {
        name: row[:2] for name, row in written.items() if row[0] != row[1]
    }
    if are_the_versions_written_down():
        assert {name: row for name, row in said.items() if len(set(row)) > 1} == written


def test_the_command_can_refuse_and_accept(tmp_path: Path) -> None:
    # A control: without it, a command that always fails would look like a very strict peer.
    verdicts = {openssl(case, tmp_path) for case in limbo.cases()[:20]}
    assert verdicts == {True, False}


def test_every_written_row_is_a_difference_with_a_reason() -> None:
    assert all(
        len(set(row)) > 1 and set(row) <= {"A", "R"} and len(row) == 4 and reason for row, reason in ROWS.values()
    )
    assert {case.id for case in limbo.cases()} >= set(ROWS)
