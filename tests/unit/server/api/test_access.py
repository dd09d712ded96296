import os
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from broker._proto.service import ServiceBinding
from broker.errors import Refused
from broker.server.api import access
from broker.server.api.access import METHODS, REQUESTS_IN_MESSAGES, Access, LocalPeer, Role, admit_local, name_of
from broker.server.api.grpc import (
    actions,
    agent,
    approvals,
    authorities,
    bundle,
    debug,
    delegations,
    entries,
    entry,
    feed,
    health,
    local_authority,
    logger,
    policies,
    revocations,
    sessions,
    svid,
    tasks,
    trustdomain,
    watch,
)
from broker.server.authority import profile
from broker.server.authority.profile import Leaf
from broker.spiffe import Bundle, BundleSet, SpiffeId, verify_x509_svid
from broker.transport import reflection
from broker.transport.peercred import KernelPeer
from broker.transport.tls import Anonymous, SvidPeer
from tests.unit.server.authority.world import DOMAIN, authority, root_der
from tests.unit.server.identity.world import AGENT, world

SERVED = {
    actions: actions.Actions,
    agent: agent.Agent,
    approvals: approvals.Approvals,
    authorities: authorities.Authorities,
    bundle: bundle.Bundle,
    debug: debug.Debug,
    entries: entries.Entries,
    entry: entry.Entry,
    feed: feed.Feed,
    health: health.Health,
    local_authority: local_authority.LocalAuthority,
    logger: logger.Logger,
    policies: policies.Policies,
    delegations: delegations.Delegations,
    revocations: revocations.Revocations,
    sessions: sessions.Sessions,
    svid: svid.Svid,
    tasks: tasks.Tasks,
    trustdomain: trustdomain.TrustDomains,
    watch: watch.Watch,
}
TOOLS = (reflection.V1, reflection.V1ALPHA)
BINDINGS: list[ServiceBinding] = [*(module.BINDING for module in SERVED), delegations.STOPS, *TOOLS]
PATHS = {method.path for binding in BINDINGS for method in binding.methods.values()}
SERVED_PATHS = {
    method.path
    for module, servicer in SERVED.items()
    for method in module.BINDING.methods.values()
    if hasattr(servicer, method.name)
} | {method.path for binding in (delegations.STOPS, *TOOLS) for method in binding.methods.values()}


@pytest.fixture
async def here(tmp_path):
    async with world(tmp_path) as one:
        yield one


@pytest.fixture
def rules(here):
    return Access(DOMAIN, here.directory, here.nodes, frozenset({SpiffeId("spiffe://example.org/named")}))


def peer(here, text, serial=1):
    """A TLS peer with this identity, under the world's own authority."""
    signer = here.authorities.x509()
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = Leaf(SpiffeId(text), serial, signer.validity(here.clock.now(), timedelta(hours=1)))
    return SvidPeer(
        verify_x509_svid((signer.sign(leaf, key.public_key()),), here.authorities.bundles, now=here.clock.now())
    )


def allowed(rules, caller, roles):
    try:
        return rules.allows(caller, frozenset(roles))
    except Refused:
        return False


def test_every_line_is_a_method_and_every_served_method_has_a_line():
    assert METHODS.keys() <= PATHS
    assert METHODS.keys() == SERVED_PATHS


def test_only_attestation_and_the_bundle_are_for_everybody():
    assert {path.rsplit("/", 1)[1] for path, roles in METHODS.items() if Role.ANY in roles} == {
        "AttestAgent",
        "GetBundle",
    }


def test_no_method_is_for_agents_and_for_changing_what_they_may():
    for path, roles in METHODS.items():
        if path.rsplit("/", 1)[1].startswith(
            ("BatchCreate", "BatchUpdate", "BatchSet", "BatchDelete", "Append", "Refresh", "Ban", "Mint", "CreateJoin")
        ):
            assert roles == {Role.LOCAL, Role.ADMIN}


async def test_who_has_which_role(here, rules):
    await here.add_node(serial="1")
    await here.add("/boss", admin=True)
    await here.add("/below", downstream=True)
    callers = {
        "anonymous": Anonymous(),
        "local": LocalPeer(0, 1),
        "agent": peer(here, str(AGENT)),
        "boss": peer(here, "spiffe://example.org/boss"),
        "named": peer(here, "spiffe://example.org/named"),
        "below": peer(here, "spiffe://example.org/below"),
        "app": peer(here, "spiffe://example.org/app"),
    }
    expected = {
        Role.ANY: set(callers),
        Role.LOCAL: {"local"},
        Role.ADMIN: {"boss", "named"},
        Role.AGENT: {"agent"},
        Role.DOWNSTREAM: {"below"},
        Role.PEER: {"agent", "boss", "named", "below", "app"},
    }
    for role, names in expected.items():
        assert {name for name, caller in callers.items() if allowed(rules, caller, {role})} == names, role
    assert not any(allowed(rules, caller, set()) for caller in callers.values())


async def test_an_agent_that_does_not_count_any_more_has_no_role_at_all(here, rules):
    await here.add_node(serial="1")
    await here.add("/boss", admin=True)
    await here.nodes.ban(AGENT, "test")
    for caller, code in ((peer(here, str(AGENT)), "agent_banned"), (peer(here, f"{AGENT}x"), "agent_not_attested")):
        for role in (Role.AGENT, Role.ADMIN, Role.PEER):
            with pytest.raises(Refused) as caught:
                rules.allows(caller, frozenset({role}))
            assert caught.value.reason == code


async def test_a_refused_agent_hears_spire_s_words_and_why_beside_them(here, rules):
    await here.add_node(serial="1")
    await here.nodes.ban(AGENT, "test")
    path = "/spire.api.server.entry.v1.Entry/GetAuthorizedEntries"
    for caller, code, why in (
        (peer(here, str(AGENT)), "agent_banned", f'agent "{AGENT}" is banned'),
        (peer(here, f"{AGENT}x"), "agent_not_attested", f'agent "{AGENT}x" is not attested; attest the node again'),
        (Anonymous(), "access_denied", "docs/reference/roles.md says which roles may"),
        (peer(here, "spiffe://example.org/app"), "agent_not_attested", "docs/reference/roles.md says which roles may"),
    ):
        with pytest.raises(Refused) as caught:
            rules.checks()[path](caller)
        assert (caught.value.message, caught.value.reason, caught.value.hint) == (
            f"authorization denied for method {path}",
            code,
            why,
        )


async def test_foreign_trust_domains_have_no_role(here):
    foreign = authority()
    key = ec.generate_private_key(ec.SECP256R1())
    now = here.clock.now()
    leaf = Leaf(SpiffeId("spiffe://example.org/named"), 1, foreign.validity(now, timedelta(hours=1)))
    root = x509.load_der_x509_certificate(root_der(foreign.signer))
    verified = verify_x509_svid((foreign.sign(leaf, key.public_key()),), BundleSet.of(Bundle(DOMAIN, (root,))), now=now)
    other = Access(type(DOMAIN)("other.org"), here.directory, here.nodes, frozenset({verified.id}))
    for role in set(Role) - {Role.ANY}:
        assert not allowed(other, SvidPeer(verified), {role})
    assert profile.SERIAL_BITS >= 64


@pytest.mark.parametrize(("uid", "admitted"), [(0, True), (os.geteuid(), True), (os.geteuid() + 4711, False)])
def test_the_admin_socket_is_for_root_and_the_servers_own_user(uid, admitted):
    peer = KernelPeer(1, uid, uid, -1)
    if admitted:
        assert admit_local(peer) == LocalPeer(uid, 1)
    else:
        with pytest.raises(Refused):
            admit_local(peer)


async def test_callers_have_names_for_the_record(here):
    assert name_of(LocalPeer(0, 1)) == "uid:0"
    assert name_of(Anonymous()) == "anonymous"
    assert name_of(peer(here, "spiffe://example.org/app")) == "spiffe://example.org/app"
    with pytest.raises(Refused):
        access.agent_of(LocalPeer(0, 1))


def test_streams_whose_messages_are_requests_are_for_whom_the_requests_alone_are_for() -> None:
    assert {"/broker.server.v1.Tasks/IssueTokens"} == REQUESTS_IN_MESSAGES
    assert METHODS["/broker.server.v1.Tasks/IssueTokens"] == METHODS["/broker.server.v1.Tasks/IssueToken"]
    tokens = tasks.BINDING.methods["IssueTokens"]
    assert tokens.streams_in and tokens.streams_out
