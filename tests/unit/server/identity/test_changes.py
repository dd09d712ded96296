from dataclasses import fields, replace
from datetime import timedelta

from broker.registry.entry import Entry
from broker.server.identity.changes import entry_of, entry_text, node_of, node_text
from broker.server.store.rows import Node
from broker.spiffe import Selector, TrustDomain
from tests.unit.server.authority.world import StandingClock
from tests.unit.server.identity.world import AGENT, draft

NOW = StandingClock().now()
FULL = draft(
    "/app",
    AGENT,
    StandingClock(),
    x509_svid_ttl=7,
    jwt_svid_ttl=8,
    federates_with=frozenset({TrustDomain("other.org")}),
    admin=True,
    downstream=True,
    expires_at=NOW + timedelta(days=1),
    dns_names=("b.example", "a.example"),
    revision=3,
    store_svid=True,
    hint="ü",
    allowed_audiences=frozenset({"x"}),
    may_start_tasks=True,
    description="what it is",
    owner="team",
    disable_x509_svid_prefetch=True,
    jwt_svid_include_jti=True,
)


def test_an_entry_comes_back_as_it_was():
    # Every field differs from its default: one that is forgotten would come back as that.
    plain = draft("/app", AGENT, StandingClock())
    same = {"id", "spiffe_id", "parent_id", "selectors", "created_at"}
    assert all(getattr(FULL, one.name) != getattr(plain, one.name) for one in fields(Entry) if one.name not in same)
    assert entry_of(entry_text(FULL)) == FULL
    assert entry_of(entry_text(plain)) == plain


def test_a_node_comes_back_as_it_was():
    node = Node(AGENT, "scripted", "1", "2", NOW, frozenset({Selector("a:b")}), True, True, "1.0")
    assert node_of(node_text(node)) == node
    assert node_of(node_text(replace(node, selectors=frozenset()))).selectors == frozenset()
