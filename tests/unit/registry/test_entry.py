from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from broker.errors import Invalid
from broker.registry import Entry
from broker.registry.entry import MAX_AUDIENCES, MAX_FEDERATES_WITH, MAX_HINT, MAX_SELECTORS, MAX_TTL
from broker.spiffe import SpiffeId, TrustDomain
from tests.unit.registry.estate import AGENT, NOW, SERVER, entry, selectors


def test_an_entry_keeps_what_it_was_given() -> None:
    made = entry("one", "unix:uid:1", "unix:gid:2", hint="main", dns_names=("Web.Example.ORG", "*.other.org"))
    assert made.selectors == selectors("unix:gid:2", "unix:uid:1")
    assert made.dns_names == ("web.example.org", "*.other.org")
    assert made.hint == "main"
    assert not made.is_alias
    assert entry("two", parent=SERVER).is_alias


def test_the_servers_trust_domain_is_asked_for() -> None:
    made = entry("one")
    assert made.validated(TrustDomain("example.org")) is made
    with pytest.raises(Invalid) as refused:
        made.validated(TrustDomain("other.org"))
    assert refused.value.reason == "invalid_entry"


@pytest.mark.bears("A17")
def test_an_entry_without_selectors_is_refused() -> None:
    with pytest.raises(Invalid, match="no selectors"):
        Entry(
            id="one",
            spiffe_id=SpiffeId("spiffe://example.org/web"),
            parent_id=AGENT,
            selectors=frozenset(),
            created_at=NOW,
        )


@pytest.mark.bears("WA-26")
def test_a_hint_is_counted_in_bytes() -> None:
    assert entry("one", hint="x" * MAX_HINT).hint
    with pytest.raises(Invalid, match="hint is too long, max length is 1024 characters"):
        entry("one", hint="é" * (MAX_HINT // 2 + 1))


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"id": ""}, id="no id"),
        pytest.param({"id": "a b"}, id="space in the id"),
        pytest.param({"id": "a\n"}, id="newline after the id"),
        pytest.param({"id": "x" * 256}, id="long id"),
        pytest.param({"spiffe_id": SpiffeId("spiffe://example.org")}, id="the trust domain itself"),
        pytest.param({"parent_id": SpiffeId("spiffe://example.org")}, id="parent is the trust domain"),
        pytest.param({"parent_id": SpiffeId("spiffe://other.org/a")}, id="parent elsewhere"),
        pytest.param({"spiffe_id": SpiffeId("spiffe://example.org/spire/server")}, id="the server's own ID"),
        pytest.param({"spiffe_id": SpiffeId("spiffe://example.org/spire/agent/x/y")}, id="an agent's ID"),
        pytest.param({"spiffe_id": SpiffeId("spiffe://example.org/spire")}, id="the reserved name"),
        pytest.param({"selectors": selectors(*(f"a:{n}" for n in range(MAX_SELECTORS + 1)))}, id="many selectors"),
        pytest.param({"x509_svid_ttl": -1}, id="negative X.509 ttl"),
        pytest.param({"jwt_svid_ttl": MAX_TTL + 1}, id="ttl beyond int32"),
        pytest.param({"revision": -1}, id="negative revision"),
        pytest.param({"created_at": datetime(2026, 1, 1)}, id="naive creation"),  # noqa: DTZ001
        pytest.param({"expires_at": datetime(2026, 1, 1)}, id="naive expiry"),  # noqa: DTZ001
        pytest.param({"federates_with": frozenset({TrustDomain("example.org")})}, id="federates with itself"),
        pytest.param(
            {"federates_with": frozenset(TrustDomain(f"t{n}.org") for n in range(MAX_FEDERATES_WITH + 1))},
            id="federates with many",
        ),
        pytest.param({"allowed_audiences": frozenset({""})}, id="empty audience"),
        pytest.param({"allowed_audiences": frozenset(map(str, range(MAX_AUDIENCES + 1)))}, id="many audiences"),
        pytest.param({"allowed_audiences": frozenset({"a\nb"})}, id="newline in an audience"),
        pytest.param({"hint": "a\x00b"}, id="NUL in the hint"),
        pytest.param({"owner": "\ud800"}, id="surrogate in the owner"),
        pytest.param({"description": "x" * 1025}, id="long description"),
        pytest.param({"dns_names": ("a b.org",)}, id="a DNS name that is none"),
    ],
)
def test_what_cannot_be_an_entry_is_refused(fields: dict[str, Any]) -> None:
    valid = {
        "id": "one",
        "spiffe_id": SpiffeId("spiffe://example.org/web"),
        "parent_id": AGENT,
        "selectors": selectors("a:b"),
        "created_at": NOW,
    }
    assert Entry(**valid).id == "one"
    with pytest.raises(Invalid) as refused:
        Entry(**valid | fields)
    assert refused.value.reason == "invalid_entry"


def test_expiry_is_reached_at_its_own_moment() -> None:
    made = entry("one", expires_at=NOW)
    assert made.is_expired(NOW)
    assert not made.is_expired(NOW - timedelta(microseconds=1))
    assert not entry("two").is_expired(datetime.max.replace(tzinfo=UTC))
