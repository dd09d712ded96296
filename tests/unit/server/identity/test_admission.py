import asyncio
from datetime import timedelta

import pytest

from broker.attestation.contract import Evidence
from broker.errors import Invalid, NotAttested, Refused
from broker.server.identity import admission
from broker.server.identity.join_tokens import handle_of
from broker.server.identity.nodes import AgentRefused
from broker.spiffe import SpiffeId, verify_x509_svid
from tests.unit.server.identity.world import csr

SCRIPTED = SpiffeId("spiffe://example.org/spire/agent/scripted/one")


async def nobody(challenge):
    raise AssertionError(challenge)


async def code_of(awaitable, kind=Refused):
    with pytest.raises(kind) as caught:
        await awaitable
    return caught.value.reason


async def test_a_node_is_admitted_with_its_selectors_and_serial(here):
    svid = await here.attest()
    node = here.directory.node(SCRIPTED)
    assert svid.id == SCRIPTED
    assert (node.serial, node.new_serial) == (str(svid.serial), "")
    assert node.selectors == here.attestor.selectors
    assert node.expires_at == svid.not_after
    assert here.nodes.require_active(svid) == node


async def test_challenges_go_to_the_node_and_its_answers_back(here):
    here.attestor.challenges = (b"one", b"two")
    await here.attest()
    assert here.attestor.responses == [b"answer to one", b"answer to two"]


async def test_too_many_challenges_end_it(here):
    here.attestor.challenges = (b"more",) * (admission.MAX_CHALLENGES + 1)
    assert await code_of(here.attest()) == "attestation_failed"


async def test_what_cannot_attest_again_is_admitted_once(here):
    await here.attest()
    assert await code_of(here.attest()) == "agent_attested_before"
    await here.nodes.delete(SCRIPTED, "test")
    await here.attest()


async def test_what_can_attest_again_replaces_its_svid(here):
    here.attestor.reattestable = True
    first = await here.attest()
    second = await here.attest()
    assert first.id == second.id
    here.nodes.require_active(second)
    with pytest.raises(AgentRefused):
        here.nodes.require_active(first)


@pytest.mark.parametrize(("before", "now"), [(True, False), (False, True)])
async def test_it_could_then_and_it_can_now_or_it_is_another(here, before, now):
    here.attestor.reattestable = before
    svid = await here.attest()
    here.attestor.reattestable = now
    assert await code_of(here.attest()) == "agent_attested_before"
    here.nodes.require_active(svid)


async def test_a_long_answer_to_a_challenge_ends_it(here, monkeypatch):
    here.attestor.challenges = (b"one",)
    monkeypatch.setattr(admission, "MAX_PAYLOAD", len(b"answer to one") - 1)
    assert await code_of(here.attest(), Invalid) == "evidence_size"
    assert not list(here.directory.nodes())


async def test_a_banned_node_stays_out_until_it_is_deleted(here):
    here.attestor.reattestable = True
    svid = await here.attest()
    await here.nodes.ban(SCRIPTED, "test")
    with pytest.raises(AgentRefused) as caught:
        here.nodes.require_active(svid)
    assert caught.value.reason == "agent_banned"
    assert await code_of(here.attest()) == "agent_banned"
    await here.nodes.delete(SCRIPTED, "test")
    await here.attest()


@pytest.mark.parametrize("path", ["/other/one", "/scripted", "/", "", "/scripted/../server", "/../server"])
async def test_an_attestor_names_nodes_below_its_own_name_only(here, path):
    here.attestor.path = path
    with pytest.raises((NotAttested, Invalid)):
        await here.attest()
    assert not list(here.directory.nodes())


@pytest.mark.bears("I11")
async def test_a_join_token_admits_once_and_is_in_no_id(here):
    here.attestor.consumes = True
    token = await here.join_tokens.create("test")
    svid = await here.attest(token.value.encode())
    assert svid.id.path.endswith(f"/{handle_of(token.value)}")
    assert await code_of(here.attest(token.value.encode())) == "join_token_unknown"


async def test_a_join_token_ends(here):
    here.attestor.consumes = True
    token = await here.join_tokens.create("test", ttl=timedelta(seconds=60))
    here.clock.advance(timedelta(seconds=60))
    assert await code_of(here.attest(token.value.encode())) == "join_token_unknown"


@pytest.mark.parametrize("path", ["", "/spire", "/spire/server", "/spire/agent/x"])
async def test_an_extra_identity_is_no_servers_and_no_agents(here, path):
    for trust_domain in ("example.org", "other.org"):
        with pytest.raises(Invalid) as caught:
            await here.join_tokens.create("test", agent_id=SpiffeId(f"spiffe://{trust_domain}{path}"))
        assert caught.value.reason == "invalid_agent_id"
    with pytest.raises(Invalid):
        await here.join_tokens.create("test", agent_id=SpiffeId("spiffe://other.org/node"))


async def test_a_join_token_may_bring_an_extra_identity(here):
    here.attestor.consumes = True
    alias = SpiffeId("spiffe://example.org/node/a")
    token = await here.join_tokens.create("test", agent_id=alias)
    svid = await here.attest(token.value.encode())
    await here.add("/app", alias)
    assert {str(entry.spiffe_id) for entry in here.directory.authorized(svid.id)} == {
        str(alias),
        "spiffe://example.org/app",
    }


async def test_the_secret_is_nowhere_in_the_store(here, tmp_path):
    here.attestor.consumes = True
    token = await here.join_tokens.create("test")
    await here.attest(token.value.encode())
    assert await code_of(here.attest(token.value.encode())) == "join_token_unknown"
    for path in tmp_path.iterdir():
        assert token.value.encode() not in path.read_bytes()


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"chosen": "short"}, "weak_join_token"),
        ({"chosen": "x" * 15 + "\n"}, "weak_join_token"),
        ({"ttl": timedelta(0)}, "invalid_ttl"),
        ({"ttl": timedelta(days=30)}, "invalid_ttl"),
        ({"agent_id": SpiffeId("spiffe://other.org/a")}, "invalid_agent_id"),
        ({"agent_id": SpiffeId("spiffe://example.org/spire/server")}, "invalid_agent_id"),
        ({"agent_id": SpiffeId("spiffe://example.org")}, "invalid_agent_id"),
    ],
)
async def test_a_join_token_is_strong_short_lived_and_ours(here, fields, code):
    assert await code_of(here.join_tokens.create("test", **fields), Invalid) == code


async def test_an_unknown_attestor_or_a_bad_request_spends_nothing(here):
    here.attestor.consumes = True
    token = (await here.join_tokens.create("test")).value.encode()
    attest = here.admission.attest
    assert await code_of(attest(Evidence("none", token), csr(), nobody)) == "attestor_unknown"
    assert await code_of(attest(Evidence("scripted", token), b"nonsense", nobody), Invalid) == "csr_malformed"
    big = b"x" * (admission.MAX_PAYLOAD + 1)
    assert await code_of(attest(Evidence("scripted", big), csr(), nobody), Invalid) == "evidence_size"
    await here.attest(token)


async def test_a_refusal_is_recorded(here):
    await here.attest()
    await code_of(here.attest())
    records = await here.store.read(lambda reader: reader.records(0, 100))
    assert sum(b'"node_refused"' in record.body for record in records) == 1
    assert sum(b'"node_attested"' in record.body for record in records) == 1


async def test_renewal_replaces_the_serial_at_the_first_use(here):
    first = await here.attest()
    renewed = await here.admission.renew(first, csr())
    node = here.directory.node(SCRIPTED)
    assert (node.serial, bool(node.new_serial)) == (str(first.serial), True)
    here.nodes.require_active(first)

    second = verify_x509_svid(renewed.chain_der, here.authorities.bundles, now=here.clock.now())
    here.nodes.require_active(second)
    with pytest.raises(AgentRefused) as caught:
        here.nodes.require_active(first)
    assert caught.value.reason == "agent_not_active"
    loop = asyncio.create_task(here.nodes.run())
    async with asyncio.timeout(30):
        while here.directory.node(SCRIPTED).serial != str(second.serial):
            await asyncio.sleep(0.005)
    loop.cancel()
    assert here.directory.node(SCRIPTED).new_serial == ""
    here.nodes.require_active(second)


async def test_what_can_attest_again_must(here):
    here.attestor.reattestable = True
    svid = await here.attest()
    assert await code_of(here.admission.renew(svid, csr())) == "agent_must_reattest"


async def test_the_reasons_of_a_refused_agent(here):
    svid = await here.attest()
    await here.nodes.delete(SCRIPTED, "test")
    with pytest.raises(AgentRefused) as caught:
        here.nodes.require_active(svid)
    assert caught.value.reason == "agent_not_attested"
    here.clock.advance(timedelta(hours=2))
    with pytest.raises(AgentRefused) as caught:
        here.nodes.require_active(svid)
    assert caught.value.reason == "agent_expired"


async def test_an_agents_version_is_noted(here):
    svid = await here.attest()
    await here.nodes.report(svid, "1.2.3")
    assert here.directory.node(SCRIPTED).agent_version == "1.2.3"
    assert await code_of(here.nodes.report(svid, "x" * 256), Invalid) == "invalid_version"
