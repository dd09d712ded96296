"""The index of callers by connection name."""

import re

import pytest

from broker.errors import NotAttested
from broker.transport.callers import CallerIndex


def test_a_name_is_random_and_finds_its_caller_until_it_is_forgotten() -> None:
    index: CallerIndex[str] = CallerIndex()
    name = index.admit("agent")
    assert re.fullmatch(r"[0-9a-f]{32}", name)
    assert name != index.admit("agent")
    assert index.of(f"unix-abstract:{name}") == "agent"
    assert index.is_open(f"unix-abstract:{name}")
    index.forget(name)
    index.forget(name)
    assert not index.is_open(f"unix-abstract:{name}")
    with pytest.raises(NotAttested):
        index.of(f"unix-abstract:{name}")
    assert len(index) == 1


@pytest.mark.parametrize(
    "peer",
    [
        "",
        "unix:",
        "unix:/tmp/x",
        "ipv4:127.0.0.1:80",
        "unix-abstract:",
        "unix-abstract:{name}\n",
        "unix-abstract:{NAME}",
        "unix:{name}",
        " unix-abstract:{name}",
        "unix-abstract:{name}0",
        "unix-abstract:%00{name}",
    ],
)
def test_any_other_peer_is_nobody(peer: str) -> None:
    index: CallerIndex[str] = CallerIndex()
    name = index.admit("agent")
    with pytest.raises(NotAttested):
        index.of(peer.format(name=name, NAME=name.upper() if name.upper() != name else "A" * 32))


def test_a_link_hears_of_its_calls_and_can_be_cut() -> None:
    heard: list[object] = []

    class Line:
        def begun(self) -> None:
            heard.append("begun")

        def cut(self, error: Exception) -> None:
            heard.append(error)

    index: CallerIndex[str] = CallerIndex()
    name = f"unix-abstract:{index.admit('agent', Line())}"
    error = ValueError()
    index.of(name)
    index.cut(name, error)
    assert heard == ["begun", error]
    index.cut(f"unix-abstract:{index.admit('no link')}", error)
    index.cut("unix-abstract:nobody", error)
