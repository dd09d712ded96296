from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import Invalid, Refused
from broker.tasks import Delegation
from tests.unit.tasks.world import NOW, delegation

TIMES = st.datetimes(timezones=st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=30))]))
NAMES = st.none() | st.from_regex(r"[!-~]([ -~]{0,20}[!-~])?", fullmatch=True)


def test_it_ends_at_its_own_moment() -> None:
    made = delegation(expires_at=NOW)
    made.require_live(NOW - timedelta(microseconds=1))
    with pytest.raises(Refused) as refused:
        made.require_live(NOW)
    assert refused.value.reason == "delegation_expired"


@given(TIMES, st.none() | TIMES, NAMES, NAMES, NAMES)
def test_the_stored_form_reads_as_itself(
    expires_at: datetime, auth_time: datetime | None, client: str | None, session: str | None, acr: str | None
) -> None:
    made = delegation(expires_at=expires_at, auth_time=auth_time, client=client, session=session, acr=acr)
    assert Delegation.parse(made.to_json()) == made


@pytest.mark.parametrize(
    "fields",
    [
        {"issuer": "http://idp.example.org"},
        {"user": ""},
        {"user": "a\nb"},
        {"token_hash": "A" * 43},
        {"token_hash": "eyJhbGciOiJFUzI1NiJ9.e30.AA"},
        {"client": ""},
        {"session": "x" * 256},
        {"acr": "é"},
        {"expires_at": datetime(2026, 1, 1)},  # noqa: DTZ001
        {"auth_time": datetime(2026, 1, 1)},  # noqa: DTZ001
    ],
)
def test_what_is_not_a_delegation_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(Invalid):
        delegation(**fields)


@pytest.mark.parametrize(
    "change",
    [
        {"expires_at": True},
        {"expires_at": 1.5},
        {"expires_at": 10**20},
        {"expires_at": None},
        {"user": 7},
        {"client": 7},
        {"extra": 1},
    ],
)
def test_what_was_not_stored_by_us_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(Invalid):
        Delegation.parse(delegation().to_json() | change)
    with pytest.raises(Invalid):
        Delegation.parse([])
