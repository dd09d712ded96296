"""The user's side attacked: who may end a session, what an ended one can still do, and whether every door ends alike."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from broker.audit.events import Event
from broker.server.store.user_rows import LivingTasks
from broker.spiffe import SpiffeId
from broker.tasks import State
from tests.attacks.tasks.userends_rig import APP, CAEP, RISC, Scene, Work, outcome, playing
from tests.fakes.oidc import OidcIssuer
from tests.unit.server.api.http.door import assert_error
from tests.unit.server.tasks.estate import AGENT, NEIGHBOUR, TICKETS, X5T_2, authority, detail

SESSION_REVOKED = CAEP + "session-revoked"


@pytest.fixture(scope="module")
def oidc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OidcIssuer]:
    with OidcIssuer.start(tmp_path_factory.mktemp("oidc")) as issuer:
        yield issuer


@pytest.fixture
async def scene(tmp_path: Path, oidc: OidcIssuer) -> AsyncIterator[Scene]:
    async with playing(tmp_path, oidc) as open_scene:
        yield open_scene


class TestAfterTheEnd:
    @pytest.mark.bears("TX20")
    @pytest.mark.parametrize("named", [{"sid": "s-1"}, {"sub": "alice"}, {"sub": "alice", "sid": "s-1"}])
    async def test_a_signed_out_user_gives_nothing_more(self, scene: Scene, named: dict[str, str]) -> None:
        work = await scene.work()
        old = scene.user_token()
        scene.estate.clock.advance(10)
        answer = await scene.logout(scene.logout_token(**named))
        assert (answer.status_code, answer.content, answer.headers["cache-control"]) == (200, b"", "no-store")
        assert await work.is_dead()
        assert (await work.state()).state is State.REVOKED
        # The token of before is good for minutes yet; a refresh in the old session does not help it either.
        assert await outcome(scene.estate.start(user_token=old)) == "user_session_ended"
        scene.estate.clock.advance(10)
        assert await work.exchange(auth_time=scene.now() - 25) == "user_session_ended"
        # At the HTTPS door it is the grant that is over (RFC 6749 §5.2).
        scene.door.come_as(AGENT)
        body = assert_error(await scene.door.token(subject_token=old), 400, "invalid_grant")
        assert body["error_code"] == "user_session_ended"
        refused = await scene.records(Event.TASK_REFUSED, Event.TOKEN_REFUSED)
        assert {record.fields["reason"] for record in refused} >= {"user_session_ended"}
        # A new sign-in is another session.
        assert await work.exchange(sid="s-2") == "done"

    @pytest.mark.bears("TX20")
    async def test_another_session_of_the_user_goes_on(self, scene: Scene) -> None:
        work, other = await scene.work(), await scene.work(sid="s-2")
        await scene.logout(scene.logout_token(sub="alice", sid="s-1"))
        assert await work.is_dead()
        assert (await other.introspected(), await other.verifier(), await other.renewal()) == (True, "alive", "done")

    @pytest.mark.bears("TX20", "RV16")
    async def test_a_disabled_user_gives_nothing_until_enabled_and_signed_in_anew(self, scene: Scene) -> None:
        made = (await scene.delegate()).json()
        work = await scene.work()
        stopped = await scene.estate.ends.users.disable("alice", by="operator:uid:0", reason="left the company")
        assert stopped.tasks_ended == 1
        assert await work.is_dead()
        assert await work.exchange() == "user_disabled"
        assert await outcome(scene.estate.start(user_token="", delegation_id=made["id"])) == "delegation_withdrawn"
        # A word given beforehand is not redeemed afterwards either.
        await scene.estate.ends.users.enable("alice", by="operator:uid:0")
        assert await work.exchange() == "user_ended"
        scene.estate.clock.advance(31)
        assert await work.exchange() == "done"
        records = await scene.records(Event.TASKS_STOPPED, Event.USER_ENABLED, Event.DELEGATION_ENDED)
        assert [(record.event, record.actor) for record in records] == [
            (Event.DELEGATION_ENDED, "operator:uid:0"),
            (Event.TASKS_STOPPED, "operator:uid:0"),
            (Event.USER_ENABLED, "operator:uid:0"),
        ]
        assert records[1].fields["reasons"] == ("left the company",)

    @pytest.mark.bears("RV16")
    async def test_what_was_delegated_is_not_redeemed_once_the_issuer_disabled_the_user(self, scene: Scene) -> None:
        """As with an approval that is redeemed later: the user's state of that moment decides."""
        made = (await scene.delegate()).json()
        assert (await scene.push(scene.event(RISC + "account-disabled"))).status_code == 202
        assert await outcome(scene.estate.start(user_token="", delegation_id=made["id"])) == "user_disabled"
        (refused,) = await scene.records(Event.TASK_REFUSED)
        assert (refused.actor, refused.fields["reason"]) == (str(AGENT), "user_disabled")

    async def test_a_token_is_never_dead_when_it_is_issued(self, scene: Scene) -> None:
        """What is stopped as a whole is told by seconds: in the second of the stop nothing is issued."""
        await scene.estate.ends.users.stop_agent(AGENT, by="operator:uid:0")
        task = await scene.estate.start()
        assert await outcome(scene.estate.issue(task)) == "stopped_just_now"
        scene.estate.clock.advance(1)
        work = Work(scene, task, await scene.estate.issue(task))
        assert (await work.introspected(), await work.verifier()) == (True, "alive")


class TestMaximumWins:
    @pytest.mark.bears("RV10")
    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)])
    async def test_of_several_ends_the_latest_counts_whatever_the_order(
        self, scene: Scene, order: tuple[int, ...]
    ) -> None:
        start = scene.now()
        scene.estate.clock.advance(100)
        told = [
            scene.event(SESSION_REVOKED, happened=start + 10),
            scene.event(CAEP + "credential-change", happened=start + 60),
            scene.logout_token(sub="alice", iat=start + 30),
        ]
        for at in order:
            answer = await (scene.logout(told[at]) if at == 2 else scene.push(told[at]))
            assert answer.status_code in (200, 202)

        async def given(at: int) -> str:
            return await outcome(scene.estate.start(user_token=scene.user_token(auth_time=start + at, sid="s-9")))

        assert [await given(at) for at in (5, 20, 45, 60)] == ["user_session_ended"] * 4
        assert await given(61) == "done"

    @pytest.mark.bears("RV10")
    async def test_one_source_does_not_take_back_anothers_stop(self, scene: Scene) -> None:
        await scene.estate.ends.users.disable("alice", by="operator:uid:0")
        await scene.push(scene.event(RISC + "account-disabled"))
        scene.estate.clock.advance(60)
        await scene.push(scene.event(RISC + "account-enabled"))
        assert await outcome(scene.estate.start(user_token=scene.user_token())) == "user_disabled"
        await scene.estate.ends.users.enable("alice", by="operator:uid:0")
        scene.estate.clock.advance(60)
        assert await outcome(scene.estate.start(user_token=scene.user_token())) == "done"

    @pytest.mark.bears("RV10", "RV19")
    async def test_an_older_word_does_not_overtake_a_newer_one(self, scene: Scene) -> None:
        start = scene.now()
        scene.estate.clock.advance(100)
        await scene.push(scene.event(RISC + "account-disabled", happened=start + 50))
        assert (await scene.push(scene.event(RISC + "account-enabled", happened=start + 20))).status_code == 202
        assert await outcome(scene.estate.start(user_token=scene.user_token())) == "user_disabled"
        await scene.push(scene.event(RISC + "account-enabled", happened=start + 60))
        await scene.push(scene.event(RISC + "account-disabled", happened=start + 40))
        scene.estate.clock.advance(1)
        assert await outcome(scene.estate.start(user_token=scene.user_token())) == "done"
        effects = [record.fields["effect"] for record in await scene.records(Event.SIGNAL_RECEIVED)]
        assert effects == ["done", "stale", "done", "stale"]


Door = Callable[[Scene, Work], Awaitable[Any]]


async def _withdrawn(scene: Scene, work: Work) -> None:
    found = await scene.estate.ends.delegations.list("alice")
    token = scene.user_token(azp=APP)
    address = f"/delegations/{found.delegations[0].id}"
    answer = await scene.door.client.delete(address, headers={"authorization": f"Bearer {token}"})
    assert answer.status_code == 200


async def _operator_revoked(scene: Scene, work: Work) -> None:
    found = await scene.estate.ends.delegations.list("alice")
    await scene.estate.ends.delegations.revoke(found.delegations[0].id, by="operator:uid:0")


DOORS: dict[str, tuple[Door, str, str]] = {
    # door: (what is done, the cause, whom the record names)
    "operator_ends_the_task": (
        lambda s, w: s.estate.lifecycle.revoke(w.task.id, by="operator:uid:0"), "operator", "operator",
    ),
    "session_loss": (lambda s, w: s.estate.sessions.report(w.task.session and NODE_ID, [], ["ws_1"]), "process_exited", "node"),
    "logout_sid": (lambda s, w: s.logout(s.logout_token(sid="s-1")), "user_logout", "issuer"),
    "logout_sub": (lambda s, w: s.logout(s.logout_token(sub="alice")), "user_logout", "issuer"),
    "caep_session_revoked": (
        lambda s, w: s.push(s.event(SESSION_REVOKED, subject=s.subject(session="s-1"))), "user_logout", "issuer",
    ),
    "caep_credential_change": (lambda s, w: s.push(s.event(CAEP + "credential-change")), "user_changed", "issuer"),
    "caep_token_claims_change": (lambda s, w: s.push(s.event(CAEP + "token-claims-change")), "user_changed", "issuer"),
    "caep_assurance_level_change": (lambda s, w: s.push(s.event(CAEP + "assurance-level-change")), "user_changed", "issuer"),
    "risc_credential_compromise": (lambda s, w: s.push(s.event(RISC + "credential-compromise")), "user_changed", "issuer"),
    "risc_account_disabled": (lambda s, w: s.push(s.event(RISC + "account-disabled")), "user_disabled", "issuer"),
    "risc_account_purged": (lambda s, w: s.push(s.event(RISC + "account-purged")), "user_disabled", "issuer"),
    "user_disabled": (lambda s, w: s.estate.ends.users.disable("alice", by="operator:uid:0"), "user_disabled", "operator"),
    "user_stopped": (lambda s, w: s.estate.ends.users.stop_user("alice", by="operator:uid:0"), "operator", "operator"),
    "agent_stopped": (lambda s, w: s.estate.ends.users.stop_agent(AGENT, by="operator:uid:0"), "operator", "operator"),
    "audience_stopped": (
        lambda s, w: s.estate.ends.users.stop_audience(TICKETS, by="operator:uid:0"), "operator", "operator",
    ),
    "delegation_withdrawn": (_withdrawn, "delegation_withdrawn", "user"),
    "delegation_revoked": (_operator_revoked, "delegation_withdrawn", "operator"),
}  # fmt: skip
NODE_ID = SpiffeId("spiffe://example.org/spire/agent/join_token/one")
WHO = {"operator": "operator:uid:0", "node": str(NODE_ID), "user": "alice"}


@pytest.mark.bears("RV11", "X05")
@pytest.mark.parametrize("door", sorted(DOORS))
async def test_every_door_ends_alike(scene: Scene, door: str) -> None:
    """One state change, one frame of the tree, one record of the task, whoever ended it; what else is told names the cause."""
    act, cause, who = DOORS[door]
    if door.startswith("delegation"):
        made = (await scene.delegate()).json()
        task = await scene.estate.start(user_token="", delegation_id=made["id"], authority=authority(detail(actions=["ticket.read"])))  # fmt: skip
        work = Work(scene, task, await scene.estate.issue(task))
    else:
        work = await scene.work()
    scene.estate.clock.advance(5)
    before = max((frame.seq for frame in await scene.frames()), default=0)
    assert (await work.introspected(), await work.verifier(), await work.renewal()) == (True, "alive", "done")

    await act(scene, work)
    await act(scene, work) if door.startswith(("user", "agent", "operator_ends")) else None

    after = await work.state()
    assert (after.state, after.cause and after.cause.value, after.version) == (State.REVOKED, cause, 2)
    trees = [frame for frame in await scene.frames(before) if frame.kind == "subtree"]
    assert [(frame.root, frame.epoch, frame.state, frame.cause) for frame in trees] == [
        (work.task.id, 1, "revoked", cause)
    ]
    (ended,) = await scene.records(Event.TASK_ENDED)
    assert ended.actor == WHO.get(who, scene.oidc.issuer)
    assert (ended.subject, ended.fields["cause"], ended.fields["tasks_ended"]) == (work.task.id, cause, 1)
    assert await work.is_dead()
    assert await scene.estate.store.read(lambda reader: reader.unfinished_stops(10)) == ()


@pytest.mark.bears("RV11")
async def test_a_single_token_ends_by_its_own_frame(scene: Scene) -> None:
    """RFC 7009 is of a token: its task goes on, and the next token lives."""
    work = await scene.work()
    before = max((frame.seq for frame in await scene.frames()), default=0)
    scene.door.come_as(AGENT)
    assert (await scene.door.post("/revoke", [("token", work.token.access_token)])).status_code == 200
    assert [frame.kind for frame in await scene.frames(before)] == ["token"]
    assert (await work.introspected(), await work.verifier(), await work.renewal()) == (False, "token_revoked", "done")


class TestConfusedDeputies:
    @pytest.mark.bears("TX15", "X04")
    @pytest.mark.parametrize("claims", [{"azp": "other-app"}, {"client_id": "other-app"}, {"aud": ["broker", "x"]}])
    async def test_a_token_given_to_another_client_is_refused(self, scene: Scene, claims: dict[str, Any]) -> None:
        assert await outcome(scene.estate.start(user_token=scene.user_token(**claims))) == "subject_client"
        (refused,) = await scene.records(Event.TASK_REFUSED)
        assert refused.fields["reason"] == "subject_client"

    @pytest.mark.bears("TX17", "X04")
    @pytest.mark.parametrize("aud", ["another-broker", TICKETS.text, ["another-broker"], "broke", [], None])
    async def test_a_token_for_another_audience_is_refused(self, scene: Scene, aud: Any) -> None:
        assert await outcome(scene.estate.start(user_token=scene.user_token(aud=aud))) == "subject_audience"
        (refused,) = await scene.records(Event.TASK_REFUSED)
        assert refused.fields["reason"] == "subject_audience"

    @pytest.mark.bears("TX18")
    @pytest.mark.parametrize("claims", [{"hd": "evil.example"}, {"hd": ["corp.example"]}, {}, {"hd": ""}])
    async def test_the_wrong_tenant_is_refused_on_every_path(
        self, tmp_path: Path, oidc: OidcIssuer, claims: dict[str, Any]
    ) -> None:
        async with playing(tmp_path, oidc, required_claims=(("hd", "corp.example"),)) as scene:
            token = scene.user_token(**claims)
            assert await outcome(scene.estate.start(user_token=token)) == "subject_claim"
            work = await scene.work(hd="corp.example")
            assert await outcome(scene.estate.issue(work.task, user_token=token)) == "subject_claim"
            scene.door.come_as(AGENT)
            assert_error(await scene.door.token(subject_token=token), 400, "invalid_request")
            made = await scene.delegate(token=scene.user_token(azp=APP, **claims))
            assert_error(made, 401, "subject_claim")
            assert made.headers["www-authenticate"] == 'Bearer error="invalid_token"'

    @pytest.mark.bears("X04")
    async def test_one_users_token_does_not_serve_anothers_task(self, scene: Scene) -> None:
        alice = await scene.work()
        bobs = scene.user_token("bob", sid="s-b")
        assert await outcome(scene.estate.issue(alice.task, user_token=bobs)) == "subject_mismatch"
        await scene.logout(scene.logout_token(sid="s-b"))
        assert await alice.renewal() == "done"

    @pytest.mark.bears("RV18")
    async def test_an_agent_gives_itself_no_delegation(self, scene: Scene) -> None:
        """Whatever user token a workload holds: it was not given to the users' own application."""
        for token in (scene.user_token(), scene.user_token(azp="broker")):
            for who in (AGENT, None):
                scene.door.come_as(who)
                answer = await scene.delegate(token=token)
                assert_error(answer, 403, "delegation_client")
        assert (await scene.estate.ends.delegations.list(None)).delegations == ()
        refused = await scene.records(Event.DELEGATION_REFUSED)
        assert {record.fields["code"] for record in refused} == {"delegation_client"}

    @pytest.mark.bears("RV18")
    async def test_who_signed_out_or_in_long_ago_leaves_nothing_standing(self, scene: Scene) -> None:
        stale = scene.user_token(azp=APP, auth_time=scene.now() - 301)
        answer = await scene.delegate(token=stale)
        assert_error(answer, 401, "insufficient_user_authentication")
        # RFC 9470 §3: what tells the application to have the user sign in anew.
        assert answer.headers["www-authenticate"] == 'Bearer error="insufficient_user_authentication"'
        unknown = scene.estate.user_token(azp=APP)
        assert_error(await scene.delegate(token=unknown), 401, "insufficient_user_authentication")
        nobody = await scene.door.client.post("/delegations", json={})
        assert_error(nobody, 401, "invalid_client")
        assert nobody.headers["www-authenticate"] == "Bearer"
        fresh = scene.user_token(azp=APP)
        await scene.logout(scene.logout_token(sid="s-1"))
        assert_error(await scene.delegate(token=fresh), 403, "user_session_ended")

    @pytest.mark.parametrize("over", ["user_session_ended", "user_disabled"])
    async def test_a_token_of_who_is_gone_shows_nothing_and_ends_nothing(self, scene: Scene, over: str) -> None:
        made = (await scene.delegate()).json()
        token, address = scene.user_token(azp=APP), f"/delegations/{made['id']}"
        scene.estate.clock.advance(5)
        if over == "user_disabled":
            await scene.push(scene.event(RISC + "account-disabled"))
        else:
            await scene.logout(scene.logout_token(sub="alice"))
        scene.door.come_as(None)
        for method, path in (("GET", "/delegations"), ("GET", address), ("DELETE", address)):
            headers = {"authorization": f"Bearer {token}"}
            assert_error(await scene.door.client.request(method, path, headers=headers), 403, over)
        assert (await scene.estate.ends.delegations.get(made["id"])).ended_at is None
        codes = [record.fields["code"] for record in await scene.records(Event.DELEGATION_REFUSED)]
        assert codes == [over] * 3


class TestStandingDelegations:
    async def test_a_task_starts_on_one_at_the_tasks_address_too(self, scene: Scene) -> None:
        made = (await scene.delegate()).json()
        asked = {
            "subject_token": made["id"],
            "subject_token_type": "urn:broker:token-type:delegation",
            "purpose": "nightly triage",
            "authorization_details": made["authorization_details"],
        }
        scene.door.come_as(NEIGHBOUR)
        assert_error(await scene.door.client.post("/tasks", json=asked), 403, "delegation_agent")
        scene.door.come_as(AGENT)
        task = await scene.door.client.post("/tasks", json=asked)
        assert task.status_code == 201, task.text
        assert task.headers["location"].endswith(f"/tasks/{task.json()['id']}")
        assert task.json()["user"] == "alice"
        wider = asked | {"authorization_details": [{"type": "api", "locations": [TICKETS.text], "actions": ["x"]}]}
        assert_error(await scene.door.client.post("/tasks", json=wider), 403, "invalid_authorization_details")
        assert_error(
            await scene.door.client.post("/tasks", json=asked | {"subject_token": "dlg_x"}), 403, "delegation_agent"
        )

    async def test_an_agent_works_on_it_while_the_user_is_away_and_within_it(self, scene: Scene) -> None:
        answer = await scene.delegate(max_task_ttl=600)
        assert answer.status_code == 201
        made = answer.json()
        assert answer.headers["location"].endswith(f"/delegations/{made['id']}")
        assert (made["state"], made["user"], made["client"]) == ("standing", "alice", APP)
        # The user signs out: it was made for that.
        await scene.logout(scene.logout_token(sub="alice", sid="s-1"))
        read = authority(detail(actions=["ticket.read"]))
        start = {"user_token": "", "delegation_id": made["id"]}
        task = await scene.estate.start(**start, authority=read, ttl=86400)
        assert (task.user, task.delegation.standing, task.delegation.session) == ("alice", made["id"], None)
        assert task.expires_at - task.created_at == timedelta(seconds=600)
        assert await outcome(scene.estate.start(**start)) == "invalid_authorization_details"
        neighbour = scene.estate.actor(spiffe_id=NEIGHBOUR, entry_id="entry-2", session="ws_2", x5t=X5T_2, agent=SpiffeId("spiffe://example.org/spire/agent/join_token/two"))  # fmt: skip
        for unknown in (made["id"], "dlg_unknown"):
            wanted = scene.estate.start(neighbour, user_token="", delegation_id=unknown, authority=read)
            assert await outcome(wanted) == "delegation_agent"
        scene.estate.clock.advance(3601)
        assert await outcome(scene.estate.start(**start, authority=read)) == "delegation_expired"

    async def test_at_the_https_door_its_id_is_the_subject(self, scene: Scene) -> None:
        made = (await scene.delegate(agents=["spiffe://example.org/*"])).json()
        scene.door.come_as(AGENT)
        wanted = {"subject_token": made["id"], "subject_token_type": "urn:broker:token-type:delegation"}
        details = '[{"type":"api","locations":["https://tickets.example.org"],"actions":["ticket.read"]}]'
        answer = await scene.door.token(**wanted, authorization_details=details)
        assert answer.status_code == 200, answer.text
        again = await scene.door.token(**wanted, task=answer.json()["task"], authorization_details=None)
        assert again.status_code == 200, again.text
        other = (await scene.delegate(agents=["spiffe://example.org/*"])).json()
        scene.door.come_as(AGENT)
        mixed = await scene.door.token(**wanted | {"subject_token": other["id"]}, task=answer.json()["task"], authorization_details=None)  # fmt: skip
        assert_error(mixed, 400, "invalid_request")

    async def test_a_prefix_ends_at_a_segment(self, scene: Scene) -> None:
        made = (await scene.delegate(agents=["spiffe://example.org/tri/*"])).json()
        assert await outcome(scene.estate.start(user_token="", delegation_id=made["id"])) == "delegation_agent"

    @pytest.mark.parametrize(
        ("changes", "code"),
        [
            ({"agents": []}, "invalid_agent"),
            ({"agents": ["spiffe://example.org"]}, "invalid_agent"),
            ({"agents": ["spiffe://example.org/tri*"]}, "invalid_agent"),
            ({"agents": ["*"]}, "invalid_agent"),
            ({"expires_in": 0}, "invalid_delegation"),
            ({"expires_in": 400 * 86400}, "invalid_delegation"),
            ({"expires_in": True}, "invalid_delegation"),
            ({"max_hops": 0}, "invalid_delegation"),
            ({"max_hops": 99}, "invalid_delegation"),
            ({"surprise": 1}, "invalid_delegation"),
            ({"purpose": None}, "invalid_delegation"),
            ({"authorization_details": []}, "invalid_authorization_details"),
        ],
    )
    async def test_what_cannot_stand_is_refused(self, scene: Scene, changes: dict[str, Any], code: str) -> None:
        assert_error(await scene.delegate(**changes), 400, code)

    async def test_a_user_sees_and_ends_only_their_own(self, scene: Scene) -> None:
        made = (await scene.delegate()).json()
        bob = {"authorization": f"Bearer {scene.user_token('bob', azp=APP, sid='s-b')}"}
        address = f"/delegations/{made['id']}"
        assert_error(await scene.door.client.get(address, headers=bob), 404, "delegation_unknown")
        assert_error(await scene.door.client.delete(address, headers=bob), 404, "delegation_unknown")
        assert (await scene.door.client.get("/delegations", headers=bob)).json() == {"delegations": []}
        alice = {"authorization": f"Bearer {scene.user_token(azp=APP)}"}
        listed = (await scene.door.client.get("/delegations", headers=alice)).json()
        assert [one["id"] for one in listed["delegations"]] == [made["id"]]
        for _ in range(2):
            ended = await scene.door.client.delete(address, headers=alice)
            assert (ended.status_code, ended.json()["state"]) == (200, "withdrawn")
        assert len(await scene.records(Event.DELEGATION_ENDED)) == 1
        assert_error(await scene.door.client.get("/delegations"), 401, "invalid_client")

    @pytest.mark.bears("RV18")
    async def test_every_refusal_at_the_address_is_on_record(self, scene: Scene) -> None:
        """Also of a request that is refused before anybody's token was looked at, and of one that only wanted to see."""
        client, made = scene.door.client, (await scene.delegate()).json()
        address = f"/delegations/{made['id']}"
        user = {"authorization": f"Bearer {scene.user_token(azp=APP)}"}
        bob = {"authorization": f"Bearer {scene.user_token('bob', azp=APP, sid='s-b')}"}
        agents = {"authorization": f"Bearer {scene.user_token()}"}
        json_type = {"content-type": "application/json"}
        tries = (
            ("POST", "/delegations", {}, b"{}", "invalid_client"),
            ("POST", "/delegations", user | json_type, b"{", "invalid_json"),
            ("POST", "/delegations", user | json_type, b"{}", "invalid_delegation"),
            ("POST", "/delegations", user, b"{}", "content_type"),
            ("POST", "/delegations?a=b", user | json_type, b"{}", "parameter_in_query"),
            ("GET", "/delegations", {}, b"", "invalid_client"),
            ("GET", "/delegations?a=b", user, b"", "parameter_unknown"),
            ("GET", "/delegations", agents, b"", "delegation_client"),
            ("GET", address, {}, b"", "invalid_client"),
            ("GET", address, bob, b"", "delegation_unknown"),
            ("DELETE", address, {}, b"", "invalid_client"),
            ("DELETE", address, bob, b"", "delegation_unknown"),
        )
        for method, at, headers, body, code in tries:
            before = len(await scene.records(Event.DELEGATION_REFUSED))
            answer = await client.request(method, at, headers=headers, content=body)
            records = (await scene.records(Event.DELEGATION_REFUSED))[before:]
            assert [record.fields["code"] for record in records] == [code], (method, at, answer.text)
            assert answer.status_code in {400, 401, 403, 404}, (method, at)
        assert (await client.get(address, headers=user)).json()["state"] == made["state"]


@pytest.mark.bears("RV22")
async def test_many_tasks_of_one_user_end_by_one_frame(scene: Scene) -> None:
    """Two thousand here; what a hundred thousand cost is measured in the benchmark of ends."""
    first = await scene.work()
    others = [await scene.work("bob", sid="s-b")]

    def fill(writer: Any) -> None:
        for number in range(2_000):
            task = writer.task(first.task.id)
            writer.add_task(type(task)(**{name: getattr(task, name) for name in task.__slots__} | {"id": f"tsk_{number}", "root": f"tsk_{number}"}))  # fmt: skip

    await scene.estate.store.write(fill)
    before = max((frame.seq for frame in await scene.frames()), default=0)
    stopped = await scene.estate.ends.users.disable("alice", by="operator:uid:0")
    assert stopped.tasks_ended == 2_001
    assert [(frame.kind, frame.name) for frame in await scene.frames(before)] == [("user", "alice")]
    living = await scene.estate.store.read(lambda reader: reader.living_tasks(LivingTasks(user="alice"), limit=10))
    assert living.tasks == ()
    assert await first.is_dead()
    assert await others[0].renewal() == "done"
