"""People act by a token of their own client, shortly after they signed in; whoever may not is on record."""

from pathlib import Path
from typing import Any

import pytest

from broker.errors import BrokerError, Invalid, Refused
from broker.server.tasks.people import Capacity, People
from broker.server.tasks.subjects import Subject
from tests.fakes.oidc import OidcIssuer
from tests.unit.server.tasks.estate import Estate, running

DESK = Capacity(
    clients=lambda issuer: issuer.approval_clients,
    max_age=lambda issuer: issuer.approval_max_age,
    stranger=lambda: Refused("another client's", code="desk_client"),
)


class Desk:
    """Lets people say their name, and keeps what was refused."""

    def __init__(self, estate: Estate) -> None:
        self.estate = estate
        self.refusals: list[tuple[str, str, str]] = []
        self.people = People(estate.subjects, estate.clock, DESK, self._refused)

    async def _refused(self, error: BrokerError, user: str, by: str) -> None:
        self.refusals.append((error.reason, user, by))

    async def name(self, *, fresh: bool = True, **claims: Any) -> str:
        async def said(subject: Subject) -> str:
            if subject.user == "mute":
                raise Invalid("nothing was said", code="silence")
            return subject.user

        now = int(self.estate.clock.now().timestamp())
        token = self.estate.user_token(**({"sub": "carol", "azp": "console", "auth_time": now} | claims))
        try:
            return await self.people.act(token, said, by="operator:uid:0", fresh=fresh)
        except BrokerError as error:
            return error.reason


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({}, "carol"),
        ({"azp": "broker"}, "desk_client"),
        ({"azp": None}, "desk_client"),
        ({"auth_time": None}, "insufficient_user_authentication"),
        ({"auth_time": None, "fresh": False}, "carol"),
        ({"azp": "broker", "fresh": False}, "desk_client"),
        ({"sub": "mute"}, "silence"),
    ],
)
async def test_a_person_of_the_right_client_acts(
    tmp_path: Path, oidc: OidcIssuer, changes: dict[str, Any], answer: str
) -> None:
    people = {"clients": frozenset({"console"}), "approval_clients": frozenset({"console"})}
    async with running(tmp_path, oidc, **people) as estate:
        desk = Desk(estate)
        assert await desk.name(**changes) == answer
        user = changes.get("sub", "carol")
        assert desk.refusals == ([] if answer == "carol" else [(answer, user, "operator:uid:0")])


async def test_the_sign_in_counts_for_so_long_and_not_from_the_future(tmp_path: Path, oidc: OidcIssuer) -> None:
    people = {"clients": frozenset({"console"}), "approval_clients": frozenset({"console"}), "approval_max_age": 60}
    async with running(tmp_path, oidc, **people) as estate:
        desk, now = Desk(estate), int(estate.clock.now().timestamp())
        answers = [await desk.name(auth_time=now + seconds) for seconds in (-61, -59, 0, 10, 600)]
    lacking = "insufficient_user_authentication"
    assert answers == [lacking, "carol", "carol", "carol", lacking]
