"""SVIDs of sessions: own keys, rotation, spares, outages, and nothing expired or forged."""

import asyncio
from dataclasses import replace
from datetime import timedelta

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from broker._proto.spiffe import workload_pb2
from broker.agent import svids as module
from broker.spiffe import SpiffeId, TrustDomain
from broker.spiffe.x509svid import split_der
from tests.fakes.fake_server import TD, FakeCa, entry_message
from tests.fakes.processes import held_connection
from tests.fakes.running_agent import HEADER, ME, RunningAgent, estate, until


def leaf(svid) -> x509.Certificate:
    return x509.load_der_x509_certificate(split_der(svid.x509_svid)[0])


def serial(svid) -> int:
    return leaf(svid).serial_number


def by_name(message) -> dict[str, workload_pb2.X509SVID]:
    return {one.spiffe_id.removeprefix("spiffe://example.org"): one for one in message.svids}


async def stream(stub):
    call = stub.FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=HEADER)
    return call, await asyncio.wait_for(call.read(), 30)


async def of_another_process(agent: RunningAgent, number: int = 1):
    """What another process of the same user is given; it ends afterwards."""
    async with held_connection(agent.socket, agent.directory / f"r{number}", "stay") as held:
        return await fetched(held)


async def fetched(held):
    async with grpc.aio.insecure_channel(
        f"unix:{held.relay}", options=(("grpc.use_local_subchannel_pool", 1),)
    ) as channel:
        call = channel.unary_stream(
            "/SpiffeWorkloadAPI/FetchX509SVID", response_deserializer=workload_pb2.X509SVIDResponse.FromString
        )
        return await asyncio.wait_for(call(b"", metadata=HEADER).read(), 30)


async def test_connections_of_one_process_share_and_processes_do_not() -> None:
    async with estate() as agent:
        first, again = await agent.x509(), await agent.x509()
        other = await of_another_process(agent)
        assert first == again
        assert serial(first.svids[0]) != serial(other.svids[0])
        assert first.svids[0].x509_svid_key != other.svids[0].x509_svid_key


async def test_the_spare_answers_the_next_process_without_the_server() -> None:
    async with estate() as agent:
        await agent.x509()
        await until(lambda: "e1" in agent.agent.svids.spares._held)
        spare = agent.agent.svids.spares._held["e1"]
        agent.server.sign_gate.clear()  # whoever needs the server now waits
        other = await of_another_process(agent)
        assert other.svids[0].x509_svid == spare.chain_der
        agent.server.sign_gate.set()
        await until(lambda: agent.agent.svids.spares._held.get("e1") not in {None, spare})


async def test_requests_of_one_moment_go_in_one_batch() -> None:
    entries = [entry_message(f"e{n}", f"/wl/{n}", [ME]) for n in range(40)]
    async with estate(entries=entries) as agent:
        response = await agent.x509()
        assert len(response.svids) == 40
        assert agent.server.batches[0] == 40
        assert len({one.x509_svid_key for one in response.svids}) == 40


async def test_rotation_at_half_life_reaches_the_open_stream() -> None:
    async with estate() as agent, agent.workload() as stub:
        agent.server.svid_ttl = timedelta(seconds=8)
        call, first = await stream(stub)
        began = asyncio.get_running_loop().time()
        second = await asyncio.wait_for(call.read(), 30)
        assert 2.0 < asyncio.get_running_loop().time() - began < 7.5
        assert serial(first.svids[0]) != serial(second.svids[0])
        assert first.svids[0].x509_svid_key != second.svids[0].x509_svid_key
        await until(lambda: agent.agent.reports.is_settled)
        (session,) = agent.server.sessions.values()
        assert (
            session.not_after
            == x509.load_der_x509_certificate(split_der(second.svids[0].x509_svid)[0]).not_valid_after_utc.timestamp()
        )


async def test_a_changed_entry_is_signed_anew() -> None:
    async with estate() as agent, agent.workload() as stub:
        call, first = await stream(stub)
        changed = entry_message("e1", "/wl/me", [ME], revision=1)
        changed.entry.dns_names.append("me.example.org")
        agent.server.put(changed)
        second = await asyncio.wait_for(call.read(), 30)
        assert serial(first.svids[0]) != serial(second.svids[0])
        moved = entry_message("e1", "/wl/moved", [ME], revision=2)
        agent.server.put(moved)
        third = await asyncio.wait_for(call.read(), 30)
        assert third.svids[0].spiffe_id == "spiffe://example.org/wl/moved"
        # The old identity is over for the server, too.
        await until(lambda: len(agent.server.ended) == 1)


@pytest.mark.bears("K04")
async def test_a_tainted_authority_is_left_and_a_removed_one_is_not_served() -> None:
    async with estate() as agent, agent.workload() as stub:
        old = agent.server.ca
        call, first = await stream(stub)
        token = (await agent.jwt("a")).svids[0].svid
        new = FakeCa()
        agent.server.ca, agent.server.more_authorities = new, (old,)
        agent.server.push_bundles(new.message((old,), tainted=True))
        second = await asyncio.wait_for(call.read(), 30)
        while serial(second.svids[0]) == serial(first.svids[0]):
            second = await asyncio.wait_for(call.read(), 30)
        assert x509.load_der_x509_certificate(split_der(second.svids[0].x509_svid)[0]).issuer == new.root.subject
        # The JWT key of the old authority is gone from the bundle: its tokens are not handed out any more.

        def is_gone() -> bool:
            # Told again: the agent has just left the tainted authority, and its stream may be on the way back.
            agent.server.push_bundles(new.message())
            return old.kid not in agent.agent.cache.own_bundle.jwt_authorities

        await until(is_gone)
        assert (await agent.jwt("a")).svids[0].svid != token


@pytest.mark.bears("O01")
async def test_in_an_outage_what_is_valid_is_served_and_nothing_after_its_end() -> None:
    async with estate(share_when_offline=False) as agent, agent.workload() as stub:
        agent.server.svid_ttl = timedelta(seconds=8)
        agent.server.jwt_ttl = timedelta(seconds=8)
        call, first = await stream(stub)
        token = (await agent.jwt("a")).svids[0].svid
        await agent.server.listener.stop()
        assert (await agent.x509()).svids[0] == first.svids[0]
        assert (await agent.jwt("a")).svids[0].svid == token
        end = x509.load_der_x509_certificate(split_der(first.svids[0].x509_svid)[0]).not_valid_after_utc
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await asyncio.wait_for(call.read(), 30)
        assert ended.value.code() == grpc.StatusCode.UNAVAILABLE
        assert agent.server.ca.clock.now() >= end
        for attempt in (agent.x509(), agent.jwt("a")):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await attempt
            assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


@pytest.mark.bears("O01", "O02")
async def test_a_process_that_restarts_in_an_outage_shares_the_spare_until_the_server_is_back() -> None:
    async with estate() as agent:
        mine = await agent.x509()
        await until(lambda: "e1" in agent.agent.svids.spares._held and agent.agent.reports.is_settled)
        await agent.server.__aexit__()
        await until(lambda: not agent.agent.sync.is_online)
        async with (
            held_connection(agent.socket, agent.directory / "r1", "stay") as one,
            held_connection(agent.socket, agent.directory / "r2", "stay") as two,
        ):
            first, second = await fetched(one), await fetched(two)
            assert first == second != mine
            assert len(agent.agent.sessions) == 3
            # A shared SVID is nobody's own: the server is not told, and no task may hang on it.
            assert len(agent.server.sessions) == 1
            async with agent.server:
                await until(lambda: agent.agent.sync.is_online)
                for session in agent.agent.sessions:
                    entries = agent.agent.sessions.entries(session)
                    for identity in await agent.agent.svids.x509(session, entries):
                        assert not identity.x509.shared
                await until(lambda: len(agent.server.sessions) == 3)
        await agent.server.__aenter__()


async def test_without_leave_to_share_a_new_process_is_told_to_wait() -> None:
    async with estate(share_when_offline=False) as agent:
        await agent.x509()
        await until(lambda: "e1" in agent.agent.svids.spares._held)
        await agent.server.listener.stop()
        await until(lambda: not agent.agent.sync.is_online)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await of_another_process(agent)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


def other_id(server):
    return lambda entry, key: [server.ca.leaf(SpiffeId.of(TD, "/wl/victim"), key)]


def other_key(server):
    return lambda entry, key: [
        server.ca.leaf(SpiffeId.of(TD, "/wl/me"), ec.generate_private_key(ec.SECP256R1()).public_key())
    ]


def ten_years(server):
    return lambda entry, key: [server.ca.leaf(SpiffeId.of(TD, "/wl/me"), key, timedelta(days=3650))]


def other_ca(server):
    return lambda entry, key: [FakeCa().leaf(SpiffeId.of(TD, "/wl/me"), key)]


def other_domain(server):
    return lambda entry, key: [FakeCa(TrustDomain("other.example")).leaf(SpiffeId("spiffe://other.example/wl/me"), key)]


def rubbish(server):
    return lambda entry, key: [b"rubbish"]


def nothing(server):
    return lambda entry, key: []


@pytest.mark.bears("O06")
@pytest.mark.parametrize("forge", [other_id, other_key, ten_years, other_ca, other_domain, rubbish, nothing])
async def test_a_server_that_signs_wrongly_is_not_believed(forge) -> None:
    async with estate() as agent:
        agent.server.forge = forge(agent.server)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await agent.x509()
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        assert not agent.server.sessions


@pytest.mark.bears("O06")
async def test_a_wrong_jwt_svid_is_not_handed_on() -> None:
    me, victim = SpiffeId.of(TD, "/wl/me"), SpiffeId.of(TD, "/wl/victim")
    async with estate() as agent:
        for forge in [
            lambda entry, audience: agent.server.ca.token(victim, audience),
            lambda entry, audience: agent.server.ca.token(me, [*audience, "more"]),
            lambda entry, audience: agent.server.ca.token(me, ["other"]),
            lambda entry, audience: agent.server.ca.token(me, audience, timedelta(days=3650)),
            lambda entry, audience: agent.server.ca.token(me, audience, timedelta(hours=-1)),
            lambda entry, audience: FakeCa().token(me, audience),
            lambda entry, audience: "",
        ]:
            agent.server.forge_jwt = forge
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await agent.jwt("a")
            assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_jwt_svids_are_cached_per_session_and_audience_set_until_half_life() -> None:
    async with estate() as agent:
        agent.server.jwt_ttl = timedelta(seconds=12)
        first = (await agent.jwt("a", "b")).svids[0].svid
        assert (await agent.jwt("b", "a", "a")).svids[0].svid == first
        assert (await agent.jwt("a")).svids[0].svid != first
        assert agent.server.jwts_signed == 2

        async def renewed() -> str:
            return (await agent.jwt("a", "b")).svids[0].svid

        began = asyncio.get_running_loop().time()
        while (second := await renewed()) == first:
            await asyncio.sleep(0.05)
        assert 4 < asyncio.get_running_loop().time() - began < 11
        # Past its half-life and the server hangs: the old one is served, within a second of a machine of one's own.
        agent.server.sign_gate.clear()
        until_half = asyncio.get_running_loop().time() + 3.2
        while asyncio.get_running_loop().time() < until_half:
            began = asyncio.get_running_loop().time()
            assert await renewed() == second
            assert asyncio.get_running_loop().time() - began < module.JWT_REFRESH + 3.0
            await asyncio.sleep(0.05)
        agent.server.sign_gate.set()


@pytest.mark.bears("K01", "O06")
async def test_a_jwt_svid_that_ends_while_another_is_waited_for_is_waited_for(monkeypatch) -> None:
    async with estate() as agent:
        agent.server.jwt_ttl = timedelta(seconds=4)
        first = (await agent.jwt("a")).svids[0].svid
        (session,) = agent.agent.sessions
        (held,) = session.jwts.values()
        agent.server.sign_gate.clear()
        # Just before its end: it is valid when the caller begins to wait, and no longer when it stops.
        monkeypatch.setattr(module, "JWT_REFRESH", 1.5)
        await until(lambda: agent.server.ca.clock.now() > held.expires_at - timedelta(seconds=1))
        asked = asyncio.create_task(agent.jwt("a"))
        await until(lambda: agent.server.ca.clock.now() > held.expires_at + timedelta(seconds=1))
        assert not asked.done()
        agent.server.sign_gate.set()
        assert (await asked).svids[0].svid != first


def with_attributes(**attributes: bool):
    entry = entry_message("e1", "/wl/me", [ME])
    for name, value in attributes.items():
        setattr(entry.entry.additional_attributes, name, value)
    return entry


async def test_an_entry_that_wants_a_new_token_each_time_gets_one_and_no_old_one() -> None:
    async with estate(entries=[with_attributes(jwt_svid_include_jti=True)]) as agent:
        together = await asyncio.gather(*(agent.jwt("a") for _ in range(4)))
        assert len({one.svids[0].svid for one in together}) == 4
        assert (await agent.jwt("a")).svids[0].svid != (await agent.jwt("a")).svids[0].svid
        assert agent.server.jwts_signed == 6
        await agent.server.listener.stop()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await agent.jwt("a")
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_an_entry_without_prefetch_has_no_spare() -> None:
    entry = with_attributes(disable_x509_svid_prefetch=True)
    async with estate(entries=[entry, entry_message("e2", "/wl/two", [ME])]) as agent:
        assert len((await agent.x509()).svids) == 2
        await until(lambda: "e2" in agent.agent.svids.spares._held)
        assert set(agent.agent.svids.spares._held) == {"e2"}
        assert (await of_another_process(agent)).svids[0].spiffe_id == "spiffe://example.org/wl/me"


async def test_a_spare_goes_when_its_entry_wants_none_any_more() -> None:
    async with estate() as agent:
        await agent.x509()
        await until(lambda: "e1" in agent.agent.svids.spares._held)
        agent.server.put(with_attributes(disable_x509_svid_prefetch=True))
        await until(lambda: agent.agent.cache.entry("e1").disable_x509_svid_prefetch)
        agent.agent.svids.spares.tidy()
        assert agent.agent.svids.spares._held == {}
        assert agent.agent.svids.spares.kept() == ()


@pytest.mark.bears("O06")
async def test_a_server_that_hangs_does_not_hold_an_open_stream_from_ending(monkeypatch) -> None:
    async with estate() as agent, agent.workload() as stub:
        agent.server.sign_gate.clear()
        call = stub.FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=HEADER, timeout=1)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await call.read()
        assert ended.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        # What that call began is used by the next.
        agent.server.sign_gate.set()
        assert (await agent.x509()).svids
        assert sum(agent.server.batches) <= 2  # the SVID and the spare


@pytest.mark.bears("O01", "O06")
async def test_an_answer_that_hangs_keeps_no_other_svid_from_its_rotation_or_its_end() -> None:
    entries = [entry_message(f"e{n}", f"/wl/{n}", [ME]) for n in range(2)]
    for one in entries:  # a spare's signing would be under way, too
        one.entry.additional_attributes.disable_x509_svid_prefetch = True
    async with estate(entries=entries, share_when_offline=False) as agent, agent.workload() as stub:
        agent.server.svid_ttl = timedelta(seconds=10)
        call, first = await stream(stub)
        ends = leaf(by_name(first)["/wl/0"]).not_valid_after_utc
        agent.server.hanging.add("e0")
        changed = entry_message("e0", "/wl/0", [ME], revision=1)
        changed.entry.dns_names.append("me.example.org")
        changed.entry.additional_attributes.disable_x509_svid_prefetch = True
        agent.server.put(changed)
        # The other is replaced while this one is waited for, and this one is handed out as long as it is valid.
        second = by_name(await asyncio.wait_for(call.read(), 30))
        assert agent.server.ca.clock.now() < ends
        assert serial(second["/wl/0"]) == serial(by_name(first)["/wl/0"])
        assert serial(second["/wl/1"]) != serial(by_name(first)["/wl/1"])
        while "/wl/0" in by_name(await asyncio.wait_for(call.read(), 30)):
            pass
        assert agent.server.ca.clock.now() >= ends
        # Who comes now does not wait, either, for what has been waited for in vain.
        began = asyncio.get_running_loop().time()
        assert set(by_name(await agent.x509())) == {"/wl/1"}
        assert asyncio.get_running_loop().time() - began < module.X509_REFRESH + 5
        agent.server.hanging.clear()
        while "/wl/0" not in by_name(await asyncio.wait_for(call.read(), 30)):
            pass


@pytest.mark.bears("K01", "K04")
async def test_a_session_that_ended_while_connections_change_loses_no_identity() -> None:
    async with estate() as agent, agent.workload() as stub:
        call, first = await stream(stub)
        await until(lambda: "e1" in agent.agent.svids.spares._held and agent.agent.reports.is_settled)
        # As when the authority is tainted: the session is over for the server, and this agent is on its way to a new connection.
        agent.server.sign_gate.clear()
        agent.agent.sync.is_online = False
        (session,) = agent.agent.sessions
        agent.agent._over(frozenset(one.id for one in session.identities.values()))
        await asyncio.sleep(module.OFFLINE_TRY / 2)
        agent.agent.sync.is_online = True
        await asyncio.sleep(module.OFFLINE_TRY)
        agent.server.sign_gate.set()
        second = await asyncio.wait_for(call.read(), 30)
        assert serial(second.svids[0]) != serial(first.svids[0])


async def test_spares_of_forgotten_entries_are_dropped(monkeypatch) -> None:
    async with estate() as agent:
        await agent.x509()
        await until(lambda: "e1" in agent.agent.svids.spares._held)
        agent.server.remove("e1")
        await until(lambda: len(agent.agent.cache) == 0)
        agent.agent.svids.spares.tidy()
        assert agent.agent.svids.spares._held == {}


async def test_an_old_spare_is_replaced_by_tidying() -> None:
    async with estate() as agent:
        agent.server.svid_ttl = timedelta(seconds=3)
        await agent.x509()
        await until(lambda: "e1" in agent.agent.svids.spares._held)
        spare = agent.agent.svids.spares._held["e1"]
        await until(lambda: agent.server.ca.clock.now() > spare.rotate_at)
        agent.agent.svids.spares.tidy()
        await until(lambda: agent.agent.svids.spares._held["e1"] is not spare)


@pytest.mark.bears("2.5", "2.6")
async def test_a_revoked_svid_is_replaced_at_once_by_another_session() -> None:
    async with estate() as agent, agent.workload() as stub:
        call, first = await stream(stub)
        await until(lambda: "e1" in agent.agent.svids.spares._held and agent.agent.reports.is_settled)
        spare = agent.agent.svids.spares._held["e1"]
        (session,) = agent.agent.sessions
        known_as = session.identities["e1"].id
        # The spare is on the list, too: it must not be the replacement.
        agent.server.push_crls(agent.server.ca.crl(serial(first.svids[0]), spare.svid.serial))
        second = await asyncio.wait_for(call.read(), 30)
        assert serial(second.svids[0]) not in {serial(first.svids[0]), spare.svid.serial}
        assert len(second.crl) == 1
        assert session.identities["e1"].id != known_as
        await until(lambda: known_as in agent.server.ended)
        assert agent.server.causes[agent.server.ended.index(known_as)] == "SESSION_END_SVID_REVOKED"


async def test_a_list_that_is_none_is_not_believed_and_nothing_is_lost() -> None:
    async with estate() as agent:
        first = await agent.x509()
        forged = FakeCa().crl(serial(first.svids[0]), name=agent.server.ca.name)
        for der in (b"garbage", forged):
            watches = len(agent.server.watches)
            agent.server.push_crls(der)
            await until(lambda watches=watches: len(agent.server.watches) > watches and agent.agent.sync.is_online)
            assert agent.server.watches[-1].cursor == 0  # it begins anew
        assert (await agent.x509()).svids == first.svids


@pytest.mark.bears("O02")
async def test_a_spare_that_was_shared_is_nobodys_own_afterwards() -> None:
    async with estate() as agent:
        await agent.x509()
        await until(lambda: "e1" in agent.agent.svids.spares._held)
        await agent.server.listener.stop()
        shared = await of_another_process(agent)
        entry = agent.agent.cache.entry("e1")
        assert agent.agent.svids.spares.can_share(entry)
        assert agent.agent.svids.spares.share(replace(entry, spiffe_id=SpiffeId.of(TD, "/renamed"))) is None
        agent.agent.sync.is_online = True  # heard, and no spare has been signed yet
        assert agent.agent.svids.spares.take(entry) is None
        assert agent.agent.svids.spares.share(entry) is None  # a server that is heard, and does not sign, has spoken
        assert agent.agent.svids.spares._held["e1"].chain_der == shared.svids[0].x509_svid
