"""Every numbered line of the standards is borne by a test of this package, or is listed with the reason why not."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.not_applicable import NOT_APPLICABLE
from tests.conformance.numbers import ALL, BY_ONE_CLIENT, OF_FILE


def marks(source: str) -> Iterator[str]:
    """The ids of every ``pytest.mark.bears(…)`` that decorates a test, or a case of its table."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not node.name.startswith("test_"):
            continue
        for mark in (inner for outer in node.decorator_list for inner in ast.walk(outer)):
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.bears":
                yield from (argument.value for argument in mark.args if isinstance(argument, ast.Constant))


def borne() -> set[str]:
    return {number for file in Path(__file__).parent.glob("test_*.py") for number in marks(file.read_text("utf-8"))}


def test_every_number_is_borne_or_listed() -> None:
    here = {file.name for file in Path(__file__).parent.iterdir()}
    awaited = {number for name, numbers in OF_FILE.items() if name not in here for number in numbers}
    assert sorted(ALL - borne() - NOT_APPLICABLE.keys() - awaited) == []


def test_no_number_is_both_or_unknown() -> None:
    assert sorted(borne() & NOT_APPLICABLE.keys()) == []
    assert sorted(NOT_APPLICABLE.keys() - ALL) == []
    assert sorted(frozenset().union(*OF_FILE.values()) - ALL) == []
    assert all(len(reason) > 20 for reason in NOT_APPLICABLE.values())


def test_the_workload_api_is_tested_with_every_client() -> None:
    everybodys = set(marks(Path(__file__).with_name("test_three_clients.py").read_text("utf-8")))
    workload_api = {number for number in ALL if number.startswith("WA-")}
    assert sorted(workload_api - everybodys - NOT_APPLICABLE.keys()) == sorted(BY_ONE_CLIENT)
    assert all(len(reason) > 20 for reason in BY_ONE_CLIENT.values())


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('@pytest.mark.bears("X5-01", "X5-02")\ndef test_a(): ...', {"X5-01", "X5-02"}),
        ('@pytest.mark.bears("X5-01")\nasync def test_a(): ...', {"X5-01"}),
        (
            '@pytest.mark.parametrize("a", [pytest.param(1, marks=pytest.mark.bears("X5-01"))])\ndef test_a(a): ...',
            {"X5-01"},
        ),
        ('@pytest.mark.bears("X5-01")\ndef helper(): ...', set()),
        ('# bears("X5-01")\ndef test_a(): ...', set()),
    ],
)
def test_only_marks_of_tests_count(source: str, found: set[str]) -> None:
    assert set(marks(source)) == found
