"""Who asks, judged by the rows of this moment: at both doors, and for whoever brings a token of another."""

from datetime import timedelta

import pytest

from broker.errors import Refused
from broker.server.store.revocation_rows import RevokedSvid
from broker.server.tasks.admission import Caller, admit_requester, identify
from broker.server.tasks.requests import Actor
from tests.unit.server.tasks.estate import AGENT, NEIGHBOUR, NODE, X5T, Estate, node


async def requester(estate: Estate, actor: Actor) -> Caller:
    return await estate.store.read(lambda reader: admit_requester(reader, actor, estate.clock.now()))


async def refused(estate: Estate, actor: Actor) -> str:
    with pytest.raises(Refused) as caught:
        await requester(estate, actor)
    return caught.value.reason


async def test_a_session_that_ended_starts_nothing_through_its_node_agent(estate: Estate) -> None:
    await estate.report("ws_1", X5T)
    await estate.sessions.report(NODE, [], ["ws_1"])
    with pytest.raises(Refused) as caught:
        await estate.start()
    assert caught.value.reason == "session_ended"


async def test_a_session_is_found_by_a_certificate_of_its_own_identity_alone(estate: Estate) -> None:
    await estate.report("ws_1", X5T)

    for actor, session in ((estate.caller(), "ws_1"), (estate.caller(spiffe_id=NEIGHBOUR), None)):
        caller = await estate.store.read(lambda reader, actor=actor: identify(reader, actor))
        assert caller.session == session


async def test_who_brings_a_token_shows_a_certificate_that_is_good(estate: Estate) -> None:
    await estate.report("ws_1", X5T)
    assert (await requester(estate, estate.caller(serial="a1"))).session == "ws_1"
    assert await refused(estate, estate.caller(not_after=estate.clock.now())) == "svid_expired"
    now = estate.clock.now()
    row = RevokedSvid("ca-1", "a1", str(AGENT), "entry-1", now + timedelta(hours=1), now, 0)
    await estate.store.write(lambda writer: writer.add_revoked(row))
    assert await refused(estate, estate.caller(serial="a1")) == "svid_revoked"


async def test_who_brings_a_token_lives_on_a_node_that_is_admitted(estate: Estate) -> None:
    await estate.report("ws_1", X5T)
    await estate.store.write(lambda writer: writer.put_node(node(NODE, banned=True)))
    assert await refused(estate, estate.caller()) == "agent_not_admitted"
