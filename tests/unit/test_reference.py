"""The reference says what the program does."""

import pytest

from tests.reference import DIRECTORY, PAGES


@pytest.mark.parametrize("name", sorted(PAGES))
def test_the_reference_is_the_programs_own(name: str) -> None:
    assert (DIRECTORY / name).read_text(encoding="utf-8") == PAGES[name](), "run: make docs"
