"""What is disabled, asked at every place that judges: the same answer in every cell.

A row is what was disabled, a column where it is asked. A new row is one line of ``ROWS``; a new place one of ``COLUMNS``.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.attacks.tasks.userends_rig import RISC, Scene, Work, outcome, playing
from tests.fakes.oidc import OidcIssuer

Row = Callable[[Scene], Awaitable[Any]]
Column = Callable[[Scene, Work, str], Awaitable[bool]]


async def _exchange(scene: Scene, work: Work, token: str) -> bool:
    return await outcome(scene.estate.start(user_token=token)) == "done"


async def _again(scene: Scene, work: Work, token: str) -> bool:
    return await outcome(scene.estate.issue(work.task, user_token=token)) == "done"


async def _introspect(scene: Scene, work: Work, token: str) -> bool:
    return await work.introspected()


async def _verifier(scene: Scene, work: Work, token: str) -> bool:
    return await work.verifier() == "alive"


async def _renewal(scene: Scene, work: Work, token: str) -> bool:
    return await work.renewal() == "done"


async def _entry_deleted(scene: Scene) -> None:
    await scene.estate.remove_entry("entry-1")
    await scene.estate.sessions.report(scene.estate.actor().agent, [], ["ws_1"])  # type: ignore[arg-type]


ROWS: dict[str, Row] = {
    "user_disabled_by_an_operator": lambda scene: scene.estate.ends.users.disable("alice", by="operator:uid:0"),
    "user_disabled_by_the_issuer": lambda scene: scene.push(scene.event(RISC + "account-disabled")),
    "user_purged_by_the_issuer": lambda scene: scene.push(scene.event(RISC + "account-purged")),
    "user_signed_out": lambda scene: scene.logout(scene.logout_token(sub="alice", sid="s-1")),
    "entry_deleted": _entry_deleted,
}
"""An entry's end reaches verifiers with its session, which the node agent ends; the policy's row is the policy's test."""
COLUMNS: dict[str, Column] = {
    "exchange": _exchange,
    "re_exchange": _again,
    "introspect": _introspect,
    "verifier": _verifier,
    "renewal": _renewal,
}


@pytest.fixture(scope="module")
def oidc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OidcIssuer]:
    with OidcIssuer.start(tmp_path_factory.mktemp("oidc")) as issuer:
        yield issuer


@pytest.fixture
async def scene(tmp_path: Path, oidc: OidcIssuer) -> AsyncIterator[Scene]:
    async with playing(tmp_path, oidc) as open_scene:
        yield open_scene


@pytest.mark.bears("X05")
@pytest.mark.parametrize("column", sorted(COLUMNS))
@pytest.mark.parametrize("row", sorted(ROWS))
async def test_what_is_disabled_is_refused_everywhere(scene: Scene, row: str, column: str) -> None:
    work = await scene.work()
    token = scene.user_token()
    assert await COLUMNS[column](scene, work, token), "before it is disabled the cell answers yes"
    await ROWS[row](scene)
    assert not await COLUMNS[column](scene, work, token)
