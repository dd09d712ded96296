"""What an identity provider says of its users, attacked: forged, repeated, misdirected and malformed words end nothing."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.audit.events import Event
from broker.server.tasks.signals import LOGOUT_EVENT
from broker.tasks import State
from tests.attacks.tasks.userends_rig import CAEP, RISC, Scene, outcome, playing
from tests.fakes.oidc import OidcIssuer, SigningKey
from tests.unit.server.api.http.door import assert_error

SESSION_REVOKED = CAEP + "session-revoked"


@pytest.fixture(scope="module")
def oidc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OidcIssuer]:
    with OidcIssuer.start(tmp_path_factory.mktemp("oidc")) as issuer:
        yield issuer


@pytest.fixture
async def scene(tmp_path: Path, oidc: OidcIssuer) -> AsyncIterator[Scene]:
    async with playing(tmp_path, oidc) as open_scene:
        yield open_scene


class TestForeignWords:
    @pytest.mark.bears("RV20")
    async def test_a_logout_token_is_no_users_token_and_the_other_way_round(self, scene: Scene) -> None:
        told = scene.logout_token(sub="alice", sid="s-1", azp="broker", nonce=None)
        for kind in ("logout+jwt", "JWT", None):
            as_user = scene.logout_token(sub="alice", header={"typ": kind})
            assert await outcome(scene.estate.start(user_token=as_user)) == "token_type"
        assert await outcome(scene.estate.start(user_token=told)) == "token_type"
        work = await scene.work()
        for header in ({}, {"typ": "logout+jwt"}):
            id_token = scene.oidc.token(
                "alice", header=header, sid="s-1", now=scene.now(), jti=f"id-{header}".replace(" ", "")
            )
            assert_error(await scene.logout(id_token), 400, "invalid_request")
        assert await work.renewal() == "done"
        codes = [record.fields["code"] for record in await scene.records(Event.SIGNAL_REFUSED)]
        assert codes == ["signal_type", "signal_event"]

    @pytest.mark.bears("RV20")
    @pytest.mark.parametrize(
        ("changes", "code"),
        [
            ({"header": {"typ": "JWT"}}, "signal_type"),
            ({"header": {"typ": None}}, "signal_type"),
            ({"header": {"typ": "secevent+jwt"}}, "signal_type"),
            ({"iss": "https://evil.example"}, "signal_issuer"),
            ({"iss": None}, "signal_issuer"),
            ({"aud": "another"}, "signal_audience"),
            ({"aud": None}, "signal_audience"),
            ({"nonce": "n"}, "signal_claims"),
            ({"nonce": ""}, "signal_claims"),
            ({"events": None}, "signal_event"),
            ({"events": {}}, "signal_event"),
            ({"events": {"http://schemas.openid.net/event/backchannel-logout": {}, "x": {}}}, "signal_event"),
            ({"events": {"http://schemas.openid.net/event/backchannel-logout": "{}"}}, "signal_event"),
            ({"events": {"http://schemas.openid.net/event/backchannel-logout": []}}, "signal_event"),
            ({"events": {"http://schemas.openid.net/event/backchannel-logout": None}}, "signal_event"),
            ({"events": ["http://schemas.openid.net/event/backchannel-logout"]}, "signal_event"),
            ({"jti": None}, "signal_jti"),
            ({"sub": None, "sid": None}, "signal_subject"),
            ({"exp": 5}, "signal_times"),
            ({"iat": 4_000_000_000, "exp": 4_000_000_100}, "signal_times"),
            ({"exp": 4_000_000_000}, "signal_times"),
            ({"iat": 1_000_000_000, "exp": 1_000_000_100}, "signal_expired"),
            ({"exp": None}, "token_claim_missing"),
        ],
    )
    async def test_a_logout_token_that_is_not_one_changes_nothing(
        self, scene: Scene, changes: dict[str, Any], code: str
    ) -> None:
        work = await scene.work()
        body = assert_error(
            await scene.logout(scene.logout_token(**({"sid": "s-1"} | changes))), 400, "invalid_request"
        )
        assert body["error_code"] == code
        assert (await work.introspected(), await work.verifier(), await work.renewal()) == (True, "alive", "done")
        (refused,) = await scene.records(Event.SIGNAL_REFUSED)
        assert refused.fields["code"] == code

    async def test_the_event_of_a_logout_need_not_be_empty(self, scene: Scene) -> None:
        work = await scene.work()
        told = scene.logout_token(sid="s-1", events={LOGOUT_EVENT: {"reason": "the user left"}})
        assert (await scene.logout(told)).status_code == 200
        assert await work.is_dead()

    @pytest.mark.bears("RV20")
    async def test_a_forged_and_a_repeated_logout_token_change_nothing(self, scene: Scene, tmp_path: Path) -> None:
        work = await scene.work()
        stranger = SigningKey("key-1", is_strangers=True)
        forged = scene.logout_token(sid="s-1", key=stranger)
        assert_error(await scene.logout(forged), 400, "invalid_request")
        good = scene.logout_token(sid="another")
        assert (await scene.logout(good)).status_code == 200
        body = assert_error(await scene.logout(good), 400, "invalid_request")
        assert body["error_code"] == "signal_replayed"
        assert await work.renewal() == "done"

    @pytest.mark.bears("RV19")
    @pytest.mark.parametrize(
        ("changes", "err"),
        [
            ({"iss": "https://evil.example"}, "invalid_issuer"),
            ({"aud": "another"}, "invalid_audience"),
            ({"aud": None}, "invalid_audience"),
            ({"sub": "alice"}, "invalid_request"),
            ({"exp": 4_000_000_000}, "invalid_request"),
            ({"header": {"alg": "none"}}, "invalid_request"),
            ({"header": {"alg": "HS256"}}, "invalid_request"),
            ({"header": {"kid": "other"}}, "invalid_key"),
            ({"header": {"typ": "JWT"}}, "invalid_request"),
            ({"header": {"typ": "logout+jwt"}}, "invalid_request"),
            ({"key": SigningKey("key-1", is_strangers=True)}, "invalid_key"),
            ({"iat": 4_000_000_000}, "invalid_request"),
            ({"iat": 1_000_000_000}, "invalid_request"),
            ({"jti": None}, "invalid_request"),
            ({"sub_id": None}, "invalid_request"),
            ({"sub_id": {"format": "email", "email": "alice@example.org"}}, "invalid_request"),
            ({"sub_id": {"format": "iss_sub", "iss": "https://evil.example", "sub": "alice"}}, "invalid_request"),
            ({"sub_id": {"format": "complex", "tenant": {"format": "opaque", "id": "t"}}}, "invalid_request"),
            ({"events": {}}, "invalid_request"),
            ({"events": {SESSION_REVOKED: {}, CAEP + "credential-change": {}}}, "invalid_request"),
            ({"events": {SESSION_REVOKED: {"event_timestamp": 4_000_000_000}}}, "invalid_request"),
            ({"events": {SESSION_REVOKED: {"event_timestamp": "now"}}}, "invalid_request"),
        ],
    )
    async def test_an_event_that_is_not_one_changes_nothing(
        self, scene: Scene, changes: dict[str, Any], err: str
    ) -> None:
        work = await scene.work()
        answer = await scene.push(scene.event(SESSION_REVOKED, **changes))
        assert (answer.status_code, answer.json()["err"]) == (400, err), answer.text
        assert (await work.introspected(), await work.verifier(), await work.renewal()) == (True, "alive", "done")
        (refused,) = await scene.records(Event.SIGNAL_REFUSED)
        assert refused.fields["door"] == "ssf_push"

    @pytest.mark.bears("RV19")
    async def test_an_event_counts_once_also_after_a_restart(self, tmp_path: Path, oidc: OidcIssuer) -> None:
        async with playing(tmp_path, oidc) as scene:
            told = scene.event(RISC + "account-disabled")
            assert (await scene.push(told)).status_code == 202
            scene.estate.clock.advance(60)
            assert (await scene.push(scene.event(RISC + "account-enabled"))).status_code == 202
        async with playing(tmp_path, oidc) as scene:
            scene.estate.clock.advance(70)
            answer = await scene.push(told)
            assert (answer.status_code, answer.json()["err"]) == (400, "invalid_request")
            assert await outcome(scene.estate.start(user_token=scene.user_token())) == "done"

    @pytest.mark.bears("RV19")
    async def test_the_body_is_an_event_or_refused(self, scene: Scene) -> None:
        scene.door.come_as(None)
        good = scene.event(SESSION_REVOKED)
        for kind, body in (
            ("application/json", good),
            ("application/secevent+jwt", "é"),
            ("application/secevent+jwt", "a.b"),
        ):
            answer = await scene.door.raw("/ssf/events", body.encode(), {"content-type": kind})
            assert (answer.status_code, answer.json()["err"]) == (400, "invalid_request")

    @pytest.mark.parametrize(
        ("direction", "ends"), [("increase", False), ("decrease", True), ("sideways", True), (None, True), (1, True)]
    )
    async def test_a_level_of_assurance_that_does_not_rise_ends_what_was_given(
        self, scene: Scene, direction: Any, ends: bool
    ) -> None:
        work = await scene.work()
        scene.estate.clock.advance(5)
        kind = CAEP + "assurance-level-change"
        told = {"namespace": "RFC8176", "current_level": "pwd", "change_direction": direction}
        assert (await scene.push(scene.event(kind, events={kind: told}))).status_code == 202
        assert await work.is_dead() is ends

    async def test_an_event_that_asks_for_nothing_is_acknowledged(self, scene: Scene) -> None:
        work = await scene.work()
        for kind in (
            "https://schemas.openid.net/secevent/ssf/event-type/verification",
            CAEP + "device-compliance-change",
        ):
            assert (await scene.push(scene.event(kind))).status_code == 202
        assert await work.renewal() == "done"
        assert {record.fields["effect"] for record in await scene.records(Event.SIGNAL_RECEIVED)} == {"none"}

    @pytest.mark.bears("TX20")
    @pytest.mark.parametrize("told", ["logout", "event"])
    async def test_what_was_given_in_no_named_session_ends_with_any(self, scene: Scene, told: str) -> None:
        """Access tokens of many issuers have no ``sid``; their sign-outs name user and session."""
        old = scene.user_token(sid=None)
        work, other = await scene.work(sid=None), await scene.work(sid="s-2")
        bobs = await scene.work("bob", sid=None)
        scene.estate.clock.advance(10)
        if told == "logout":
            await scene.logout(scene.logout_token(sub="alice", sid="s-9"))
        else:
            await scene.push(scene.event(SESSION_REVOKED, subject=scene.subject(session="s-9")))
        assert await work.is_dead()
        assert (await work.state()).state is State.REVOKED
        assert await outcome(scene.estate.start(user_token=old)) == "user_session_ended"
        for going in (other, bobs):
            assert (await going.introspected(), await going.verifier(), await going.renewal()) == (
                True,
                "alive",
                "done",
            )
        # Whoever signs in anew, or is signed in elsewhere and gets a token later, goes on.
        scene.estate.clock.advance(10)
        assert await work.exchange(sid=None) == "done"
        assert await outcome(scene.estate.start(user_token=scene.user_token(sid=None, auth_time=None))) == "done"
