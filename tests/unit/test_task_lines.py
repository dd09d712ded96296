"""Every attack on tasks and tokens, and every line on revocation, is borne by a test that asks something which runs, or says why not.

Ids: TX exchange, AC chains of actors, JW tokens as JWTs, PB binding, SP SPIFFE and federation, RV revocation and task life, X the
OAuth surface, V revocation and trees.
"""

from functools import cache
from pathlib import Path

from tests.conformance.test_every_number import marks

TESTS = Path(__file__).parents[1]


def of(family: str, *numbers: int) -> set[str]:
    return {f"{family}{number:02}" for number in numbers}


LISTED = (
    of("TX", 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15, 17, 18, 19, 20, 21, 23, 24, 25, 27, 28)
    | of("AC", *range(1, 10))
    | of("JW", *range(4, 19), 20, 21, 22)
    | of("PB", 1, 2, 4, 5, 6, 8, 9, 11, 12, 14, 15, 16)
    | of("SP", 1, 3, 4, 5, 6, 7, 8, 9, 11)
    | of("RV", 3, 4, *range(7, 24))
    | of("X", *range(1, 8), 10)
    | of("V", *range(1, 8), 9, 10, 11)
)
LATER: dict[str, str] = {}
"""Ids without a test that bears all they ask, each with the reason."""


@cache
def bearers() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for file in TESTS.rglob("test_*.py"):
        source = file.read_text("utf-8")
        for number in marks(source) if "bears(" in source else ():
            found.setdefault(number, set()).add(file.relative_to(TESTS).parts[0])
    return found


def test_every_id_is_borne_or_says_why_not() -> None:
    assert sorted(LISTED - bearers().keys() - LATER.keys()) == []


def test_every_id_is_asked_of_something_that_runs() -> None:
    # A rule may be right and a program wrong: each id is also asked through a real port or socket.
    found = bearers()
    assert sorted(one for one in LISTED - LATER.keys() if found[one] <= {"unit", "fuzz"}) == []


def test_reasons_are_of_listed_ids_and_say_something() -> None:
    assert sorted(LATER.keys() - LISTED) == []
    assert all(len(reason) > 40 for reason in LATER.values())
