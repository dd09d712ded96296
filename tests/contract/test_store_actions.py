"""Actions: one claim of a step, whoever asks at once; a token for one use is used once; both go with their tree."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from broker.errors import Conflict, NotFound, Refused
from broker.server.store.ports import Store
from broker.spiffe import SpiffeId
from broker.tasks import Resource
from broker.tasks.action import ActionRecord, ActionState, Intent
from tests.contract.acts import BoomError, Opener, failing
from tests.unit.server.store.samples import HASH, HOUR, NOW, SECOND, ended, task, token

SERVICE = SpiffeId("spiffe://example.org/tickets")
TICKETS, WIKI = Resource("https://tickets.example.org"), Resource("https://wiki.example.org/a")


def record(action_id: str = "act_1", step: str = "s1", **fields: Any) -> ActionRecord:
    good = {
        "id": action_id,
        "task": "tsk_1",
        "root": "tsk_1",
        "service": SERVICE,
        "intent": Intent(audience=fields.pop("audience", TICKETS), action="ticket.close", step=step),
        "jti": "jti_1",
        "claimed_at": NOW,
        "settle_by": NOW + HOUR,
    }
    return ActionRecord(**good | fields)


async def test_what_was_written_comes_back(store: Store) -> None:
    full = Intent(audience=WIKI, action="a.b", step="step two", identifier="47 11", parameter_digest=HASH)
    done = record("act_2", intent=full, state=ActionState.COMPLETED, settled_at=NOW + SECOND, outcome='{"n":"ü"}')
    await store.write(lambda w: (w.add_task(task()), w.add_action(record()), w.add_action(done)))
    assert await store.read(lambda r: (r.action("act_1"), r.action("act_2"))) == (record(), done)
    assert await store.read(lambda r: r.action_at("tsk_1", WIKI, "step two")) == done
    assert await store.read(lambda r: (r.action("act_3"), r.action_at("tsk_1", WIKI, "s1"))) == (None, None)
    assert await store.read(lambda r: (r.actions_of("tsk_1"), r.actions_of("tsk_2"))) == (2, 0)
    # The writer sees the same.
    assert await store.write(lambda w: w.action_at("tsk_1", TICKETS, "s1")) == record()


@pytest.mark.bears("RV15")
async def test_a_step_is_claimed_by_one(opener: Opener) -> None:
    async with opener() as store:
        await store.write(lambda w: (w.add_task(task()), w.add_task(task("tsk_2"))))
        claims = (record(f"act_{number}") for number in range(20))
        claimed = await asyncio.gather(
            *(store.write(lambda w, one=one: w.add_action(one)) for one in claims), return_exceptions=True
        )
        assert sorted(type(each).__name__ for each in claimed) == [*["Conflict"] * 19, "NoneType"]
    async with opener() as again:
        with pytest.raises(Conflict) as caught:
            await again.write(lambda w: w.add_action(record("act_99")))
        assert caught.value.reason == "action_exists"
        # Of another task, at another audience, or under another name it is another step.
        for other in (record("act_a", step="s2"), record("act_b", audience=WIKI), record("act_c", task="tsk_2")):
            await again.write(lambda w, one=other: w.add_action(one))


async def test_an_action_is_of_a_task(store: Store) -> None:
    for act in (lambda w: w.add_action(record()), lambda w: w.use_token("jti_1", "tsk_1", NOW)):
        with pytest.raises(NotFound):
            await store.write(act)


async def test_it_is_replaced_as_it_was_read(store: Store) -> None:
    await store.write(lambda w: (w.add_task(task()), w.add_action(record())))
    undone = replace(record(), state=ActionState.RELEASED, settled_at=NOW + SECOND)
    await store.write(lambda w: w.replace_action(undone, record()))
    with pytest.raises(Conflict) as caught:
        await store.write(lambda w: w.replace_action(replace(undone, state=ActionState.COMPLETED), record()))
    assert caught.value.reason == "stale_action"
    anew = record("act_2", service=SpiffeId("spiffe://example.org/other"), jti="jti_2", claimed_at=NOW + HOUR)
    await store.write(lambda w: w.replace_action(anew, undone))
    assert await store.read(lambda r: (r.action("act_1"), r.action("act_2"))) == (None, anew)
    with pytest.raises(Conflict):
        await store.write(lambda w: w.replace_action(record("act_3"), undone))
    with pytest.raises(ValueError, match="something else"):
        await store.write(lambda w: w.replace_action(record("act_2", step="s2"), anew))


@pytest.mark.bears("RV15")
async def test_a_token_for_one_use_is_used_once(opener: Opener) -> None:
    async with opener() as store:
        await store.write(lambda w: w.add_task(task()))
        used = await asyncio.gather(
            *(store.write(lambda w: w.use_token("jti_1", "tsk_1", NOW)) for _ in range(20)), return_exceptions=True
        )
        assert sorted(type(each).__name__ for each in used) == ["NoneType"] + ["Refused"] * 19
        # What is undone was not used.
        with pytest.raises(BoomError):
            await store.write(failing(lambda w: w.use_token("jti_2", "tsk_1", NOW)))
        await store.write(lambda w: w.use_token("jti_2", "tsk_1", NOW))
    async with opener() as again:
        with pytest.raises(Refused) as caught:
            await again.write(lambda w: w.use_token("jti_1", "tsk_1", NOW))
        assert caught.value.reason == "token_used"


async def test_they_go_with_their_tree(store: Store) -> None:
    root = task()
    await store.write(
        lambda w: (
            w.add_task(root),
            w.add_task(task("tsk_c", parent=root)),
            w.add_token(token(of="tsk_1")),
            w.add_action(record()),
            w.add_action(record("act_2", task="tsk_c")),
            w.use_token("jti_1", "tsk_c", NOW),
        )
    )
    assert await store.write(lambda w: w.sweep(NOW + 25 * HOUR, 100)) == 0
    await store.write(lambda w: (w.replace_task(ended(root), 1), w.cascade("tsk_1", ended(root).cause, NOW)))
    assert await store.write(lambda w: w.sweep(NOW + 25 * HOUR, 100)) == 6
    assert await store.read(lambda r: (r.action("act_1"), r.action("act_2"))) == (None, None)
