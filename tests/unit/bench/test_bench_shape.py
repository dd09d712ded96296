"""The bench measures something and says it in one form; how fast anything is, is not asked here."""

import json

import pytest

from tests.bench.__main__ import ALONE, IN_HOUSE, Run
from tests.bench.measure import Item, at_least, at_most, result, within
from tests.bench.verifying import verify_cold

MEMBERS = {"name", "value", "unit", "limit", "ratio", "budget", "met"}


def test_a_cheap_item_has_its_limit_and_its_budget_beside_it() -> None:
    document = json.loads(json.dumps(result(verify_cold(tokens=3, rounds=1))))
    assert document["kind"] == "bench"
    (item,) = document["items"]
    assert item.keys() == MEMBERS
    assert (item["name"], item["unit"]) == ("verify_cold", "us")
    assert item["value"] > 0
    assert item["limit"] > 0
    assert item["ratio"] == pytest.approx(item["value"] / item["limit"], rel=0.01)
    assert isinstance(item["met"], bool)


@pytest.mark.parametrize(("value", "met"), [(40, True), (39, False)])
def test_a_share_of_the_limit(value: float, met: bool) -> None:
    item = at_least("one", value, "1/s", 100, 0.4)
    assert (item.met, item.budget) == (met, ">= 40% of the limit")


@pytest.mark.parametrize(("value", "met"), [(4.9, True), (5, False)])
def test_a_fixed_bound(value: float, met: bool) -> None:
    assert within("one", value, "ms", 1, 5).met is met


@pytest.mark.parametrize(("value", "met"), [(200, True), (201, False)])
def test_so_many_times_the_limit(value: float, met: bool) -> None:
    item = at_most("one", value, "ms", 100, 2)
    assert (item.met, item.budget) == (met, "<= 2 x the limit")


def test_without_a_limit_there_is_no_ratio() -> None:
    assert Item("one", 1, "ms", None, "", True).to_json()["ratio"] is None


async def test_one_failure_hides_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(ALONE, "verify_cold", lambda: [Item("one", 1, "us", 2, "any", False)])
    monkeypatch.setitem(ALONE, "verify_warm", lambda: 1 / 0)
    run = Run(["verify_cold", "verify_warm"], 1.0)
    await run.take()
    assert [item.name for item in run.items] == ["one"]
    assert run.failed == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "MISSED" in told.err
    assert "ZeroDivisionError" in told.err


def test_every_item_can_be_named() -> None:
    assert len({*ALONE, *IN_HOUSE}) == len(ALONE) + len(IN_HOUSE)
