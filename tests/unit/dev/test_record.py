"""An estate remembers its processes, privately, and refuses what it did not write."""

from pathlib import Path

import pytest

from broker.dev.configuration import Ports
from broker.dev.processes import Started
from broker.dev.record import Record, read_record, write_record
from broker.errors import Misconfigured

RECORD = Record(Ports(1, 2), ("https://a.test",), {"server": Started(3, 4)})


def test_both_ways(tmp_path: Path) -> None:
    path = tmp_path / "estate.json"
    assert read_record(path) is None
    write_record(path, RECORD)
    assert read_record(path) == RECORD
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"ports":{"server":1,"issuer":2},"audiences":[],"parts":{"server":3}}']
)
def test_something_else(text: str, tmp_path: Path) -> None:
    path = tmp_path / "estate.json"
    path.write_text(text)
    with pytest.raises(Misconfigured):
        read_record(path)
