"""The verifier: what it accepts, what it refuses, and that remembering never outlives an end."""

import json
from datetime import timedelta
from typing import Any

import pytest

from broker._proto.broker.server.v1 import feed_pb2
from broker.errors import BrokerError, InvalidSvid, InvalidToken, PolicyDenied, Refused, Unavailable
from broker.sdk.feed import Risk
from broker.spiffe import BundleSet, TrustDomain
from broker.spiffe.jose import b64url_decode, b64url_encode
from broker.tasks import Authority as Authority_
from broker.tasks import BindingMatch
from broker.tasks.transactions import TransactionClaims
from broker.transport.tls import Anonymous, SvidPeer
from tests.unit.sdk.world import World, frame, heartbeat, snapshot
from tests.unit.tasks.world import AGENT, ISSUER, TICKETS, TokenKey
from tests.unit.transport.pki import Authority


@pytest.fixture
def world() -> World:
    made = World()
    made.hear(snapshot(made.key))
    return made


def refused(world: World, token: str, chain=None) -> BrokerError:
    with pytest.raises(BrokerError) as caught:
        world.verifier.verify_now(token, world.identity.chain_der if chain is None else chain)
    return caught.value


async def test_a_good_token_names_user_agent_and_task(world: World) -> None:
    caller = await world.verifier.verify(world.token(), world.identity.chain_der)
    assert (caller.user, caller.agent, caller.task) == ("usr_1", AGENT, "tsk_1")
    assert caller.binding is BindingMatch.X5T
    await caller.check("ticket.read")
    with pytest.raises(PolicyDenied) as denied:
        await caller.check("ticket.delete")
    assert denied.value.reason == "insufficient_authorization"


@pytest.mark.bears("V09", "RV07")
def test_before_the_first_snapshot_nothing_is_accepted() -> None:
    world = World()
    error = refused(world, world.token())
    assert isinstance(error, Unavailable)
    assert error.reason == "feed_unknown"


def test_a_snapshot_in_pages_counts_only_when_it_is_whole() -> None:
    world = World()
    world.hear(snapshot(world.key, more=True))
    assert refused(world, world.token()).reason == "feed_unknown"
    world.hear(heartbeat())
    assert refused(world, world.token()).reason == "feed_unknown"
    world.hear(snapshot(world.key))
    world.verifier.verify_now(world.token(), world.identity.chain_der)


@pytest.mark.bears("JW22")
@pytest.mark.parametrize(
    ("members", "code"),
    [
        ({"kind": "subtree", "root": "tsk_1", "epoch": 1}, "task_ended"),
        ({"kind": "task", "task": "tsk_1"}, "task_ended"),
        ({"kind": "session", "session": "ws_1"}, "session_ended"),
        ({"kind": "token", "jti": "jti_1"}, "token_revoked"),
    ],
)
def test_an_end_reaches_a_token_that_is_remembered(world: World, members, code: str) -> None:
    token = world.token()
    world.verifier.verify_now(token, world.identity.chain_der)
    world.hear(frame(2, **members))
    assert refused(world, token).reason == code


def test_an_end_of_another_task_reaches_nobody_else(world: World) -> None:
    token = world.token()
    for number, members in enumerate(
        (
            {"kind": "subtree", "root": "tsk_2", "epoch": 9},
            {"kind": "task", "task": "tsk_2"},
            {"kind": "session", "session": "ws_2"},
        ),
        2,
    ):
        world.hear(frame(number, **members))
    world.verifier.verify_now(token, world.identity.chain_der)


@pytest.mark.bears("RV08")
def test_an_older_frame_revives_nothing(world: World) -> None:
    token = world.token()
    world.hear(frame(2, kind="subtree", root="tsk_1", epoch=5))
    world.hear(frame(3, kind="subtree", root="tsk_1", epoch=0))
    assert refused(world, token).reason == "task_ended"


def test_a_frame_of_an_unknown_kind_is_not_taken_for_nothing(world: World) -> None:
    with pytest.raises(Unavailable) as caught:
        world.hear(frame(2, kind="planet"))
    assert caught.value.reason == "feed_unknown_frame"


@pytest.mark.bears("RV07", "V08")
@pytest.mark.parametrize(
    ("risk", "silence", "code"),
    [
        (Risk.HIGH, 2.9, None),
        (Risk.HIGH, 3.1, "feed_stale"),
        (Risk.HIGH, 31, "feed_partitioned"),
        (Risk.NORMAL, 3.1, None),
        (Risk.NORMAL, 31, "feed_partitioned"),
        (Risk.LOW, 31, "feed_partitioned"),
    ],
)
def test_silence_is_not_good_news(risk: Risk, silence: float, code: str | None) -> None:
    world = World(risk=risk)
    world.hear(snapshot(world.key))
    token = world.token()
    world.clock.step(silence)
    if code is None:
        world.verifier.verify_now(token, world.identity.chain_der)
    else:
        assert refused(world, token).reason == code
        world.hear(heartbeat())
        world.verifier.verify_now(token, world.identity.chain_der)


@pytest.mark.bears("SP09", "X03")
def test_another_instance_of_the_same_identity_is_refused(world: World) -> None:
    other = world.authority.issue(AGENT.path)
    error = refused(world, world.token(), other.chain_der)
    assert isinstance(error, Refused)
    assert error.reason == "binding_mismatch"


def test_no_certificate_is_refused(world: World) -> None:
    assert refused(world, world.token(), ()).reason == "binding_missing"
    scope = {"type": "http", "headers": [], "extensions": {}}
    assert refused(world, world.token(), scope).reason == "binding_missing"


@pytest.mark.bears("SP03", "PB12")
def test_a_certificate_under_another_trust_domains_authority_is_refused(world: World) -> None:
    forged = Authority("other.example").issue(f"spiffe://example.org{AGENT.path}")
    assert isinstance(refused(world, world.token(), forged.chain_der), InvalidSvid)


@pytest.mark.bears("PB02")
@pytest.mark.parametrize("claim", ["cnf", "aud", "exp", "task", "act", "client_id", "jti", "sub"])
def test_a_token_of_ours_without_a_claim_is_refused(world: World, claim: str) -> None:
    payload = json.loads(b64url_decode(world.token().split(".")[1]))
    del payload[claim]
    assert refused(world, world.key.token(payload)).reason == "token_claim_missing"


def test_text_that_is_no_token_is_refused_as_one(world: World) -> None:
    for text in ("", "..", "\ud800.a.b", "x" * 100_000):
        assert isinstance(refused(world, text), InvalidToken)


def test_a_changed_claim_breaks_the_signature(world: World) -> None:
    head, body, signature = world.token().split(".")
    payload = json.loads(b64url_decode(body)) | {"sub": "usr_2"}
    changed = f"{head}.{b64url_encode(json.dumps(payload).encode())}.{signature}"
    assert refused(world, changed).reason == "token_signature"


@pytest.mark.bears("JW20", "V06")
def test_a_remembered_token_expires_and_never_comes_back(world: World) -> None:
    token = world.token()
    world.verifier.verify_now(token, world.identity.chain_der)
    for _ in range(4):
        world.clock.step(60)
        world.hear(heartbeat())
    assert refused(world, token).reason == "token_expired"
    assert refused(world, token).reason == "token_expired"


@pytest.mark.bears("V09", "SV15")
@pytest.mark.parametrize("back", [60, 3600, 86400])
def test_a_clock_that_is_set_back_revives_nothing(world: World, back: int) -> None:
    token, ended = world.token(), world.token(jti="jti_2")
    world.verifier.verify_now(ended, world.identity.chain_der)
    world.hear(frame(2, kind="token", jti="jti_2"))
    world.verifier.verify_now(token, world.identity.chain_der)
    for _ in range(5):
        world.clock.step(60)
        world.hear(heartbeat())
    assert refused(world, token).reason == "token_expired"
    world.clock.wall -= timedelta(seconds=back + 300)
    world.hear(heartbeat())
    for each in (token, ended):
        assert refused(world, each).reason in {"token_expired", "token_revoked"}
    assert refused(world, token).reason == "token_expired"


@pytest.mark.bears("V09")
def test_a_leap_forward_and_back_forgets_no_end() -> None:
    world = World()
    world.hear(snapshot(world.key))
    token = world.token()
    soon = int(world.clock.now().timestamp()) + 300
    ended = feed_pb2.Frame(seq=2, kind="task", task="tsk_1", forget_at=soon)
    world.hear(feed_pb2.FeedMessage(seq=2, store="s1", frame=ended))
    assert refused(world, token).reason == "task_ended"
    world.clock.wall += timedelta(hours=1)
    steady = world.verifier._clock
    for number in range(3, 300):
        now = int(steady.now().timestamp())
        world.verifier.feed.apply(heartbeat(number), monotonic=world.clock.monotonic(), now=now)
    world.clock.wall -= timedelta(hours=1)
    assert refused(world, token).reason == "token_expired"


@pytest.mark.bears("V09")
def test_a_clock_that_is_set_forward_goes_on_from_there(world: World) -> None:
    world.clock.wall += timedelta(hours=1)
    world.verifier.verify_now(world.token(), world.identity.chain_der)


@pytest.mark.bears("JW21")
def test_a_key_that_is_withdrawn_dies_with_all_it_signed(world: World) -> None:
    token = world.token()
    world.verifier.verify_now(token, world.identity.chain_der)
    world.hear(frame(2, kind="keys", keys=snapshot(TokenKey("k2")).snapshot.keys))
    assert refused(world, token).reason == "token_key_unknown"


def test_the_wrong_audience_and_issuer_are_refused(world: World) -> None:
    assert refused(world, world.token(issuer="https://broker.example.org:8443/")).reason == "token_issuer"
    payload = json.loads(b64url_decode(world.token().split(".")[1])) | {"aud": "https://other.example.org"}
    assert isinstance(refused(world, world.key.token(payload)), InvalidToken)


def test_what_is_dead_is_forgotten_only_after_its_tokens() -> None:
    world = World()
    world.hear(snapshot(world.key))
    state = world.verifier.feed
    ended = feed_pb2.FeedMessage(
        seq=2, store="s1", frame=feed_pb2.Frame(seq=2, kind="task", task="tsk_1", forget_at=100)
    )
    state.apply(ended, monotonic=0, now=50)
    for number in range(3, 300):
        state.apply(heartbeat(number), monotonic=0, now=99)
    with pytest.raises(Refused):
        state.require_alive(root="tsk_1", epoch=0, task="tsk_1", session=None, jti="j")
    for number in range(300, 600):
        state.apply(heartbeat(number), monotonic=0, now=101)
    state.require_alive(root="tsk_1", epoch=0, task="tsk_1", session=None, jti="j")


@pytest.mark.bears("X03", "JW22")
def test_remembering_the_right_holder_lets_no_other_in(world: World) -> None:
    token, other = world.token(), world.authority.issue(AGENT.path)
    for _ in range(3):
        assert world.verifier.verify_now(token, world.identity.chain_der).agent == AGENT
        assert refused(world, token, other.chain_der).reason == "binding_mismatch"
        for peer, accepted in ((SvidPeer(world.svid()), True), (SvidPeer(world.svid(other)), False)):
            scope = {"type": "http", "extensions": {"broker.peer": peer}}
            if accepted:
                world.verifier.verify_now(token, scope)
            else:
                assert refused(world, token, scope).reason == "binding_mismatch"
        assert refused(world, token, {"extensions": {"broker.peer": Anonymous()}}).reason == "binding_missing"


def transaction(world: World) -> tuple[TransactionClaims, str]:
    at = world.clock.now()
    claims = TransactionClaims(
        iss=ISSUER, aud=TrustDomain("example.org"), iat=int(at.timestamp()), exp=int(at.timestamp()) + 30, jti="jti_9", txn="txn_9", sub="usr_1", scope="ticket.read", act=(AGENT,),
        authorization_details=Authority_.parse([{"type": "api", "locations": [TICKETS.text], "actions": ["ticket.read"]}]), task="tsk_1", root="tsk_1", epoch=0, txn_path=(AGENT,),
    )  # fmt: skip
    return claims, world.key.token(claims.to_payload(), typ="txntoken+jwt")


def test_a_transaction_is_accepted_while_its_task_lives(world: World) -> None:
    first, token = transaction(world)
    assert world.verifier.verify_transaction(token, "example.org").claims == first
    for wrong, domain in ((world.token(), "example.org"), (token, "example.com")):
        with pytest.raises(InvalidToken):
            world.verifier.verify_transaction(wrong, domain)
    assert refused(world, token).reason == "token_type"
    world.hear(frame(2, kind="task", task="tsk_1"))
    with pytest.raises(Refused):
        world.verifier.verify_transaction(token, "example.org")
    world.clock.step(4)
    with pytest.raises(Unavailable):
        world.verifier.verify_transaction(token, "example.org")


@pytest.mark.parametrize(("kind", "name"), [("user", "usr_1"), ("agent", str(AGENT))])
def test_a_stop_of_its_user_or_agent_reaches_a_transaction(world: World, kind: str, name: str) -> None:
    first, token = transaction(world)
    world.hear(frame(2, kind=kind, name=name, not_before=first.iat))
    world.verifier.verify_transaction(token, "example.org")
    # No frame of its task comes: of a user's many tasks this one tells of all.
    world.hear(frame(3, kind=kind, name=name, not_before=first.iat + 1))
    with pytest.raises(Refused) as stopped:
        world.verifier.verify_transaction(token, "example.org")
    assert stopped.value.reason == f"{kind}_stopped"


@pytest.mark.bears("RV10")
@pytest.mark.parametrize(
    ("members", "code"),
    [
        ({"kind": "user", "name": "usr_1"}, "user_stopped"),
        ({"kind": "user", "name": "usr_1", "sid": "s-1"}, "user_stopped"),
        ({"kind": "agent", "name": str(AGENT)}, "agent_stopped"),
        ({"kind": "audience", "name": TICKETS.text}, "audience_stopped"),
    ],
)
def test_a_stop_reaches_what_was_issued_before_it_and_never_less(world: World, members: Any, code: str) -> None:
    token, later = world.token(extra={"sid": "s-1"}), int(world.clock.now().timestamp()) + 1
    world.verifier.verify_now(token, world.identity.chain_der)
    other = {**members, "sid": "s-2"} if "sid" in members else {**members, "name": members["name"] + "x"}
    for seq, told in enumerate(({**members, "not_before": later - 1}, {**other, "not_before": later}), 2):
        world.hear(frame(seq, **told))
        world.verifier.verify_now(token, world.identity.chain_der)
    world.hear(frame(4, **members, not_before=later))
    assert refused(world, token).reason == code
    # An older word that comes late takes nothing back.
    world.hear(frame(5, **members, not_before=later - 1))
    assert refused(world, token).reason == code


def test_a_leaf_that_has_expired_is_nobodys_however_well_it_was_known() -> None:
    world = World()
    world.identity = world.authority.issue(AGENT.path, lifetime=timedelta(seconds=60))
    world.hear(snapshot(world.key))
    token, shown = world.token(), {"extensions": {"broker.peer": SvidPeer(world.svid())}}
    for connection in (world.identity.chain_der, shown):
        world.verifier.verify_now(token, connection)
    world.clock.step(61)
    world.hear(heartbeat())
    for connection in (world.identity.chain_der, shown):
        assert refused(world, token, connection).reason == "svid_expired"


def test_a_certificate_that_was_known_is_judged_anew_under_other_bundles(world: World) -> None:
    token = world.token()
    world.verifier.verify_now(token, world.identity.chain_der)
    world.workload._bundles = BundleSet.of(Authority("example.org").bundle)
    assert isinstance(refused(world, token), InvalidSvid)
