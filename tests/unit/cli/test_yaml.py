"""What is written as YAML is read back as what it was."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.cli.yaml import to_yaml

TRICKY = ["yes", "No", "null", "~", "1", "1.0", "0x1f", "2026-01-02", "a: b", "- a", "#x", "a #x", "", " ", "a\nb", "é", "key:",
          "spiffe://a.test/b", "unix:uid:0", "@x", "%x", "[", "{", "!t", "&a", "*a", "1e3", ".inf", "12:30:00", "on", "=", "<<"]  # fmt: skip


def test_shape() -> None:
    assert to_yaml({"kind": "entries", "items": [{"id": "a", "selectors": ["unix:uid:0"], "ttl": 0, "hint": ""}]}) == (
        'kind: entries\nitems:\n- id: a\n  selectors:\n  - unix:uid:0\n  ttl: 0\n  hint: ""\n'
    )


def test_empty_things() -> None:
    assert to_yaml({"a": [], "b": {}, "c": None, "d": True}) == "a: []\nb: {}\nc: null\nd: true\n"


@pytest.mark.parametrize("text", TRICKY)
def test_text_stays_text(text: str) -> None:
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(to_yaml({"x": text, "y": [text]})) == {"x": text, "y": [text]}


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text(st.characters(codec="utf-8", exclude_categories=["C"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(st.characters(codec="ascii", min_codepoint=32), min_size=1, max_size=8), inner, max_size=3
        )
    ),
    max_leaves=12,
)


@given(_VALUES)
def test_any_value_comes_back(value: object) -> None:
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(to_yaml(value)) == value
