"""The order of the story, and how a step that does not hold is told."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import pytest

from broker.dev import demo
from broker.dev.demo_refusals import _rewritten
from broker.dev.stage import NotHeld
from broker.errors import Unavailable
from broker.spiffe.jose import b64url_decode, b64url_encode


async def one(act: Any) -> demo.Step:
    return await demo._one(object(), "name", "Title", act)  # type: ignore[arg-type]


async def test_a_step_that_holds() -> None:
    async def act(_: object) -> tuple[list[str], Mapping[str, Any]]:
        return ["line"], {"fact": 1}

    step = await one(act)
    assert (step.held, step.lines, step.facts, step.failure) == (True, ["line"], {"fact": 1}, None)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NotHeld("it was accepted", hint="why?"), "it was accepted (hint: why?)"),
        (Unavailable("nobody", code="gone"), "nobody (gone)"),
        (PermissionError("no exec"), "PermissionError: no exec"),
    ],
)
async def test_a_step_that_does_not(error: Exception, said: str) -> None:
    async def act(_: object) -> tuple[list[str], Mapping[str, Any]]:
        raise error

    step = await one(act)
    assert (step.held, step.failure) == (False, said)


async def test_a_step_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    async def act(_: object) -> tuple[list[str], Mapping[str, Any]]:
        await asyncio.Event().wait()
        return [], {}

    monkeypatch.setattr(demo, "STEP_SECONDS", 0.01)
    assert not (await one(act)).held


def test_every_step_has_a_name_of_its_own() -> None:
    names = [name for name, _, _ in demo.STEPS]
    assert len(set(names)) == len(names) == 11


@pytest.mark.parametrize("cnf", [None, {"x5t#S256": "thief"}])
def test_the_thief_changes_the_claims_and_keeps_the_signature(cnf: Mapping[str, str] | None) -> None:
    def part(value: object) -> str:
        return b64url_encode(json.dumps(value).encode())

    token = f"{part({'alg': 'ES256'})}.{part({'sub': 'a', 'cnf': {'x5t#S256': 'b'}})}.{b64url_encode(b'x' * 64)}"
    changed = _rewritten(token, cnf)
    was, now = token.split("."), changed.split(".")
    assert (now[0], now[2]) == (was[0], was[2])
    claims = json.loads(b64url_decode(now[1]))
    assert claims == ({"sub": "a"} if cnf is None else {"sub": "a", "cnf": cnf})
