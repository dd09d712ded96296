"""A process with several identities uses the one that it chose, or none."""

import pytest

from broker.errors import Invalid, NoIdentity
from broker.sdk import Workload
from tests.fakes.fake_server import entry_message
from tests.fakes.running_agent import ME, estate

ONE, TWO = "spiffe://example.org/wl/one", "spiffe://example.org/wl/two"


async def test_the_chosen_identity_is_the_default() -> None:
    entries = (entry_message("e1", "/wl/one", [ME]), entry_message("e2", "/wl/two", [ME]))
    async with estate(entries=entries) as agent:
        for wanted in (ONE, TWO):
            async with Workload.connect(f"unix:{agent.socket}", spiffe_id=wanted) as me:
                assert str((await me.identity()).id) == wanted
                assert me.current is not None and str(me.current.id) == wanted
        async with Workload.connect(f"unix:{agent.socket}") as me:
            assert str((await me.identity()).id) in {ONE, TWO}


async def test_an_identity_that_it_does_not_have() -> None:
    async with estate() as agent, Workload.connect(f"unix:{agent.socket}", spiffe_id=TWO) as me:
        with pytest.raises(NoIdentity, match="wl/two"):
            await me.identity()


def test_what_is_no_spiffe_id() -> None:
    with pytest.raises(Invalid):
        Workload.connect("unix:/nowhere", spiffe_id="two")
