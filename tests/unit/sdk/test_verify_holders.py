"""Who may show a token: proofs that are spent, and leaves that the node agent answers for."""

import pytest

from broker._proto.broker.server.v1 import feed_pb2
from broker.errors import BrokerError, Refused
from broker.sdk.dpop import ProofKey
from broker.sdk.proofs import DpopRequest
from broker.tasks import BindingMatch, Confirmation
from tests.unit.sdk.world import World, heartbeat, snapshot
from tests.unit.tasks.world import AGENT, TICKETS


class Told:
    """A node agent that gives the same answer of every leaf, and counts who asked."""

    def __init__(self, held: bool) -> None:
        self.held, self.asked = held, 0

    async def FindLeaf(self, *_: object, **__: object) -> feed_pb2.FindLeafResponse:
        self.asked += 1
        return feed_pb2.FindLeafResponse(held=self.held)


@pytest.fixture
def world() -> World:
    made = World()
    made.hear(snapshot(made.key))
    return made


def proof(world: World, key: ProofKey, token: str) -> DpopRequest:
    made = key.proof("GET", f"{TICKETS.text}/tickets/1", token=token, nonce=world.verifier.proofs.nonce)
    return DpopRequest((made,), "GET", "/tickets/1")


def refused(world: World, token: str, dpop: DpopRequest) -> str:
    with pytest.raises(BrokerError) as caught:
        world.verifier.verify_now(token, world.identity.chain_der, dpop=dpop)
    return caught.value.reason


def test_a_proof_is_good_for_one_call(world: World) -> None:
    key = ProofKey(world.clock)
    token = world.token(cnf=Confirmation(jkt=key.jkt))
    shown = proof(world, key, token)
    assert world.verifier.verify_now(token, (), dpop=shown).binding is BindingMatch.DPOP
    assert refused(world, token, shown) == "proof_replayed"


def test_remembering_a_holder_takes_no_proof_that_was_not_judged(world: World) -> None:
    token, key = world.token(), ProofKey(world.clock)
    world.verifier.verify_now(token, world.identity.chain_der)
    assert refused(world, token, proof(world, key, token)) == "dpop_unexpected"


async def test_a_leaf_of_another_identity_is_worth_no_question(world: World) -> None:
    agent = world.verifier._leaves._api = Told(held=True)
    other = world.authority.issue("/other")
    with pytest.raises(Refused) as caught:
        await world.verifier.verify(world.token(), other.chain_der)
    assert (caught.value.reason, agent.asked) == ("binding_mismatch", 0)


async def test_a_leaf_that_the_node_agent_denied_stays_denied(world: World) -> None:
    agent = world.verifier._leaves._api = Told(held=False)
    other = world.authority.issue(AGENT.path)
    world.clock.step(120)
    world.hear(heartbeat())
    token = world.token()
    for _ in range(2):
        with pytest.raises(Refused) as caught:
            await world.verifier.verify(token, other.chain_der)
        assert caught.value.reason == "binding_mismatch"
    assert agent.asked == 1
    agent.held = True
    world.clock.step(1)
    assert (await world.verifier.verify(token, other.chain_der)).binding is BindingMatch.SESSION
