"""How much a task may be: what an operator did not permit, and the ends that nobody outlives."""

from datetime import timedelta

import pytest

from broker.errors import PolicyDenied
from broker.tasks import Supervision
from tests.unit.server.tasks.estate import Estate, entry


async def test_a_task_goes_unsupervised_only_where_the_server_permits_it(estate: Estate) -> None:
    with pytest.raises(PolicyDenied) as caught:
        await estate.start(supervision=Supervision.NONE)
    assert caught.value.reason == "unsupervised_not_allowed"


async def test_a_task_ends_with_the_entry_that_let_it_start(estate: Estate) -> None:
    end = (estate.clock.now() + timedelta(seconds=60)).replace(microsecond=0)
    await estate.put_entry(entry(expires_at=end, revision=1))
    await estate.directory.load(estate.store)
    assert (await estate.start(ttl=300)).expires_at == end
