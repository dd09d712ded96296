"""Who stands behind a selector, by the attestors' own documentation."""

import pytest

from attestors.workload.docker import DockerAttestor
from attestors.workload.unix import UnixAttestor
from broker.attestation.contract import SelectorDoc, Strength
from broker.attestation.strength import Strengths
from broker.spiffe import Selector

DOCS = (
    SelectorDoc("env:<NAME=value>", "says so itself", Strength.SELF_DECLARED),
    SelectorDoc("env:kernel:<number>", "a longer form", Strength.KERNEL),
    SelectorDoc("env:fixed", "no placeholder", Strength.RUNTIME),
)


@pytest.mark.parametrize(
    ("text", "strength"),
    [
        ("env:A=b", Strength.SELF_DECLARED),
        ("env:kernel:1", Strength.KERNEL),
        ("env:fixed", Strength.RUNTIME),
        ("env:fixed:more", Strength.SELF_DECLARED),
        ("other:x", None),
    ],
)
def test_the_longest_form_counts(text: str, strength: Strength | None) -> None:
    strengths = Strengths(DOCS)
    assert strengths.of(Selector(text)) is strength
    assert strengths.is_vouched(Selector(text)) is (strength in {Strength.KERNEL, Strength.RUNTIME})


def test_a_form_of_any_type_is_for_types_that_no_other_has() -> None:
    strengths = Strengths([*DOCS, SelectorDoc("<prefix>:<value>", "a program's", Strength.RUNTIME)])
    assert strengths.of(Selector("mine:x")) is Strength.RUNTIME
    assert strengths.of(Selector("env:A=b")) is Strength.SELF_DECLARED


def test_ours() -> None:
    strengths = Strengths.of_attestors((UnixAttestor, DockerAttestor))
    assert strengths.of(Selector("unix:uid:0")) is Strength.KERNEL
    assert strengths.of(Selector("docker:label:a:b")) is Strength.RUNTIME
    assert strengths.of(Selector("docker:env:A=b")) is Strength.RUNTIME
    assert strengths.of(Selector("unix:whatever")) is None
