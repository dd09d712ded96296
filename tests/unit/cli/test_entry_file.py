"""Files of entries: what is taken, from whom, and what is refused."""

from pathlib import Path

import pytest

from broker.cli.entry_file import read_entries, write_entries
from broker.cli.entry_values import DEFAULTS, message, values_of
from broker.errors import Invalid

OURS = """
owner: platform
items:
  - spiffe_id: spiffe://a.test/web
    parent_id: spiffe://a.test/node
    selectors: ["unix:uid:1000", unix:path:/usr/bin/web]
    x509_svid_ttl: 1h
    expires_at: 2100-01-01T00:00:00Z
    allowed_audiences: [https://b.test]
    may_start_tasks: true
"""
SPIRE = """{"entries": [{
  "selectors": [{"type": "unix", "value": "uid:1111"}],
  "spiffe_id": "spiffe://example.org/Blog", "parent_id": "spiffe://example.org/spire/agent/join_token/TokenBlog",
  "x509_svid_ttl": 200, "jwt_svid_ttl": 30, "admin": true, "entryExpiry": 4102444800, "entry_id": "blog",
  "federates_with": ["spiffe://b.test"], "additional_attributes": {"disable_x509_svid_prefetch": true}
}]}"""
SPIRE_SHOW = """{"entries": [{
  "id": "x", "spiffe_id": {"trust_domain": "example.org", "path": "/a"},
  "parentId": {"trustDomain": "example.org", "path": "/p"}, "selectors": [{"type": "a", "value": "b:c"}],
  "x509SvidTtl": 5, "expiresAt": "4102444800", "revision_number": "3", "created_at": "1", "hint": "h",
  "additionalAttributes": {"jwtSvidIncludeJti": true}
}], "next_page_token": ""}"""


@pytest.fixture
def file(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "entries"
        path.write_text(text)
        return str(path)

    return write


def test_our_own_file(file) -> None:
    found = read_entries(file(OURS))
    assert found.owner == "platform"
    assert found.entries == [
        {
            "spiffe_id": "spiffe://a.test/web",
            "parent_id": "spiffe://a.test/node",
            "selectors": ["unix:uid:1000", "unix:path:/usr/bin/web"],
            "x509_svid_ttl": 3600,
            "expires_at": 4102444800,
            "allowed_audiences": ["https://b.test"],
            "may_start_tasks": True,
        }
    ]


def test_spire_s_file_for_entry_create(file) -> None:
    (entry,) = read_entries(file(SPIRE)).entries
    assert entry == {
        "id": "blog",
        "spiffe_id": "spiffe://example.org/Blog",
        "parent_id": "spiffe://example.org/spire/agent/join_token/TokenBlog",
        "selectors": ["unix:uid:1111"],
        "x509_svid_ttl": 200,
        "jwt_svid_ttl": 30,
        "admin": True,
        "expires_at": 4102444800,
        "federates_with": ["b.test"],
        "disable_x509_svid_prefetch": True,
    }


def test_what_spire_s_entry_show_writes(file) -> None:
    (entry,) = read_entries(file(SPIRE_SHOW)).entries
    assert entry == {
        "id": "x",
        "spiffe_id": "spiffe://example.org/a",
        "parent_id": "spiffe://example.org/p",
        "selectors": ["a:b:c"],
        "x509_svid_ttl": 5,
        "expires_at": 4102444800,
        "hint": "h",
        "jwt_svid_include_jti": True,
    }


def test_what_is_written_is_read_again(file) -> None:
    full = {
        "id": "one",
        "spiffe_id": "spiffe://a.test/x",
        "parent_id": "spiffe://a.test/y",
        **{name: _other(value) for name, value in DEFAULTS.items()},
        "selectors": ["a:b", 'a:"quoted" # not a comment: \\ '],
    }
    plain = {"id": "two", **DEFAULTS, **{name: full[name] for name in ("spiffe_id", "parent_id", "selectors")}}
    served = [values_of(message(one)) for one in (full, plain)]
    back = read_entries(file(write_entries(served, "me")))
    assert back.owner == "me"
    assert [{**DEFAULTS, **one} for one in back.entries] == [full, plain]


def _other(value: object) -> object:
    if isinstance(value, bool):
        return True
    if isinstance(value, int):
        return 4102444800 // 2
    return ["a.test", "b.test"] if isinstance(value, list) else "true"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("[1]", id="no entry"),
        pytest.param("{}", id="no list"),
        pytest.param("items: []\nentries: []\n", id="two lists"),
        pytest.param("a: &x 1\nitems: [*x]\n", id="an alias"),
        pytest.param("items: 1\nitems: 2\n", id="a name twice"),
        pytest.param("{", id="no JSON"),
        pytest.param("a: [", id="no YAML"),
        pytest.param(OURS.replace("may_start_tasks", "may_start_task"), id="a misspelt name"),
        pytest.param(OURS.replace("true", '"true"'), id="a flag that is a text"),
        pytest.param(OURS.replace("1h", "1 hour"), id="no duration"),
        pytest.param(OURS.replace("2100-01-01T00:00:00Z", "tomorrow"), id="no time"),
        pytest.param(OURS.replace("2100-01-01T00:00:00Z", "2100-01-01T00:00:00"), id="a time without a zone"),
        pytest.param(OURS.replace("spiffe://a.test/web", "spiffe://A.test/web"), id="no SPIFFE ID"),
        pytest.param(OURS.replace('["unix:uid:1000", unix:path:/usr/bin/web]', "[]"), id="no selectors"),
        pytest.param(OURS.replace('"unix:uid:1000"', "unix"), id="no selector"),
        pytest.param(SPIRE.replace("disable_x509_svid_prefetch", "x"), id="an unknown attribute"),
        pytest.param("[" * 50 + "]" * 50, id="too deep"),
        pytest.param("a: " + "{a: " * 50 + "}" * 50, id="too deep in YAML"),
    ],
)
def test_nonsense_is_refused(text: str, file) -> None:
    with pytest.raises(Invalid) as refused:
        read_entries(file(text))
    assert refused.value.reason == "invalid_entry_file"


def test_a_number_that_the_wire_cannot_carry_is_refused(file) -> None:
    (entry,) = read_entries(file(OURS.replace("1h", "99999999999"))).entries
    with pytest.raises(Invalid):
        message(entry)
