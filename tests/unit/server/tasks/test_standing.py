"""A word that nobody can date counts no longer where an issuer's silence counts."""

from datetime import timedelta

from broker.server.tasks.standing import Standing
from tests.unit.server.tasks.estate import Estate
from tests.unit.tasks.world import delegation


async def test_a_session_that_nothing_ever_confirmed_is_unconfirmed(estate: Estate) -> None:
    now, word = estate.clock.now(), delegation(issued_at=None)
    for leases, is_silent in (({word.issuer: timedelta(hours=1)}, True), ({}, False)):
        standing = Standing(leases)
        assert await estate.store.read(lambda reader, s=standing: s.unconfirmed(reader, word, now)) is is_silent
