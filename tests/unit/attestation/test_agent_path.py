"""How agents are named by a template: closed fields, one segment each."""

import pytest

from broker.attestation.agent_path import Fields, PathTemplate
from broker.errors import NotAttested

FIELDS = Fields(("Own", "Map.", "Way"), paths=("Way",))


def parse(text: str) -> PathTemplate:
    return PathTemplate.parse(text, FIELDS, plugin="pop")


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("{{ .PluginName }}/{{ .Own }}", "/pop/one"),
        ("/pop/x-{{.Own}}", "/pop/x-one"),
        ("pop/{{ .TrustDomain }}/{{ .Map.site }}", "/pop/example.org/berlin"),
        ("pop/{{ .Way }}", "/pop/a/b"),
    ],
)
def test_filled_in(text, path) -> None:
    values = {"PluginName": "pop", "TrustDomain": "example.org", "Own": "one", "Map.site": "berlin", "Way": "a/b"}
    assert parse(text).path(values) == path


@pytest.mark.parametrize(
    "text",
    [
        "", "pop", "pop/all", "pop/{{ .TrustDomain }}", "{{ .Own }}/pop", "popp/{{ .Own }}", "pop/{{ .Other }}", "pop/{{ .Map. }}",
        "pop/{{ .Map.a.b }}", "pop/{{ .Map }}", "pop/{{ Own }}", "pop/{{ .Own", "pop/{{ .Own | lower }}", "pop/{{ .Own }} ", "//pop/{{ .Own }}",
    ],
)  # fmt: skip
def test_templates_that_name_nobody(text) -> None:
    with pytest.raises(ValueError, match="agent_path_template"):
        parse(text)


@pytest.mark.parametrize("value", [None, "", "a/b", "..", ".", "\u00e4", "a b", "a\n", "x" * 3000])
def test_values_that_are_no_segment(value) -> None:
    with pytest.raises(NotAttested) as refused:
        parse("pop/{{ .Own }}").path({"PluginName": "pop"} | ({} if value is None else {"Own": value}))
    assert refused.value.reason == "agent_path"


@pytest.mark.parametrize("value", ["", "a//b", "../x", "/a", "a/"])
def test_a_way_is_a_path(value) -> None:
    with pytest.raises(NotAttested):
        parse("pop/{{ .Way }}").path({"PluginName": "pop", "Way": value})
