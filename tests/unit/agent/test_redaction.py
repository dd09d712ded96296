"""Secrets in selectors are not shown, unless the operator says so."""

import pytest

from broker.agent.redaction import Redaction
from broker.spiffe import Selector


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("docker:env:PASSWORD=hunter2=x", "docker:env:PASSWORD=<hidden>"),
        ("docker:env:hunter2", "docker:env:<hidden>"),
        ("docker:label:app:hunter2:y", "docker:label:app:<hidden>"),
        ("docker:label:hunter2", "docker:label:<hidden>"),
        ("docker:image_id:nginx", "docker:image_id:nginx"),
        ("unix:uid:1", "unix:uid:1"),
    ],
)
def test_values_are_hidden(text: str, shown: str) -> None:
    assert Redaction()(Selector(text)) == shown
    assert Redaction(["docker:label:other", "unix"])(Selector(text)) == shown
    assert Redaction(["docker"])(Selector(text)) == text


def test_the_allow_list_is_of_whole_words() -> None:
    show = Redaction(["docker:label:app", "docker:env:REGION=", ""])
    assert show(Selector("docker:label:app:x")) == "docker:label:app:x"
    assert show(Selector("docker:label:apple:x")) == "docker:label:apple:<hidden>"
    assert show(Selector("docker:env:REGION=eu")) == "docker:env:REGION=eu"
    assert show(Selector("docker:env:REGIONAL=eu")) == "docker:env:REGIONAL=<hidden>"
