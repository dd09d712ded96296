"""YAML that means one thing, and what is refused of the rest."""

import contextlib

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.spiffe.strictyaml import MAX_DEPTH, NotYaml, read_yaml


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a: [", " at line 1"),
        ("a: 1\na: 2\n", ""),
        ("1: a\n", ""),
        ("? [a]\n: b\n", ""),
        ("a: &x {b: c}\nd: *x\n", ""),
        ("a: {<<: {b: c}}\n", ""),
        ("a: !!python/object/apply:os.system [id]\n", " at line 1"),
        ("--- {a: 1}\n--- {b: 2}\n", " at line 2"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), ""),
        ("[" * 100_000, ""),
    ],
)
def test_what_json_could_not_say_is_refused(text: str, place: str) -> None:
    with pytest.raises(NotYaml) as refused:
        read_yaml(text)
    assert refused.value.place == place


def test_times_are_text_and_depth_is_the_callers() -> None:
    assert read_yaml("a: 2026-01-02\nb: 2026-01-02T03:04:05Z\n") == {"a": "2026-01-02", "b": "2026-01-02T03:04:05Z"}
    deep = "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)
    assert read_yaml(deep, max_depth=MAX_DEPTH + 1)


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=12,
)


@settings(deadline=None)
@given(VALUE)
def test_what_can_be_written_is_read_as_it_was(value) -> None:
    assert read_yaml(yaml.dump(value, Dumper=_Plain)) == value


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(text) -> None:
    with contextlib.suppress(NotYaml):
        read_yaml(text)
