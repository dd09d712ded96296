"""What holds for every test: what needs root says so by its mark, and is skipped with its reason elsewhere."""

import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() == 0:
        return
    for item in items:
        mark = item.get_closest_marker("root")
        if mark is not None:
            item.add_marker(pytest.mark.skip(reason=f"needs root: {mark.args[0] if mark.args else 'see the test'}"))
