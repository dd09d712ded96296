"""Every line of the fault and attack plan that identity answers for is borne by a test; the tests say what each line asks."""

from pathlib import Path

from tests.conformance.test_every_number import marks

LAST = {"A": 25, "W": 16, "I": 15, "K": 9, "O": 6}
"""Attestation, Workload API, issuance, keys, outages: how many lines each has, from 1."""
LINES = {f"{family}{line:02}" for family, last in LAST.items() for line in range(1, last + 1)}
TESTS = Path(__file__).parents[1]


def test_every_line_is_borne() -> None:
    borne = {line for file in TESTS.rglob("test_*.py") for line in marks(file.read_text("utf-8"))}
    assert sorted(LINES - borne) == []


def test_no_line_is_borne_by_unit_tests_alone() -> None:
    # A rule may be right and a program wrong: each line is also asked of something that runs.
    running = {
        line
        for file in TESTS.rglob("test_*.py")
        if "unit" not in file.relative_to(TESTS).parts or "estate(" in (source := file.read_text("utf-8")) or "serving(" in source
        for line in marks(file.read_text("utf-8"))
    }  # fmt: skip
    assert sorted(LINES - running) == []
