"""What is disabled, asked at every place that judges: the same answer in every cell.

A row is what was disabled, a column where it is asked. A new row is one line of ``ROWS``; a new place one of ``COLUMNS``.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from broker._proto.broker.server.v1 import tasks_pb2
from broker._proto.service import Stub
from broker.server.api.grpc import tasks
from tests.attacks.tasks.binding_rig import LOOSE, Desk, desk, desk_settings, short_directory
from tests.attacks.tasks.listening import listening
from tests.attacks.tasks.userends_rig import RISC, Scene, Work, outcome, playing
from tests.fakes.oidc import OidcIssuer
from tests.integration.identity_rig import DEADLINE, Estate, own_bundle, running
from tests.integration.test_token_endpoint import TICKETS

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
"""An entry's end reaches verifiers with its session, which the node agent ends. The rows of a policy, a trust domain and an audience
are at the real port: ``test_policy``, ``test_binding_foreign``, and below.
"""
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


@pytest.mark.bears("X05")
async def test_an_audience_that_is_registered_no_longer_has_no_tokens(oidc: OidcIssuer) -> None:
    """Settings change at a restart: exchange, re-exchange, renewal, introspection, and a verifier that comes back."""
    with short_directory() as directory:
        async with desk(directory, oidc) as at:
            holder = await at.process("ws_1")
            answers = [await holder.http.post("/token", data=at.form(one)) for one in (TICKETS, LOOSE)]
            tokens = [answer.json()["access_token"] for answer in answers]
            task = answers[0].json()["task"]
            async with listening(at.channel) as ear:
                assert [ear.says(token) for token in tokens] == ["alive", "alive"]
        settings = desk_settings(oidc)
        settings["audiences"] = tuple(one for one in settings["audiences"] if one.resource != TICKETS)
        async with running(Estate(directory), **settings) as one:
            at.node.trusted = await own_bundle(one)
            async with at.node.dial(one.port) as channel, AsyncExitStack() as stack:
                again = Desk(one, oidc, directory, stack, at.node, at.agent_id, channel, at.entry)
                async with listening(channel) as ear:
                    # Its task, which nothing permits any more, ends a moment later.
                    assert ear.says(tokens[0]) in {"token_revoked", "task_ended"}
                    assert ear.says(tokens[1]) == "alive"
                holder = await again.process("ws_1")
                seen = [(await holder.http.post("/introspect", data={"token": token})).json() for token in tokens]
                assert [answer["active"] for answer in seen] == [False, True]
                renewal, re_exchange = again.form(task=task), again.form(subject_token=tokens[0])
                del renewal["purpose"], re_exchange["purpose"]
                for asked in (again.form(), renewal, re_exchange):
                    answer = await holder.http.post("/token", data=asked)
                    assert answer.status_code == 400, answer.text
                    assert answer.json()["error"] in {"invalid_target", "invalid_grant"}
                with pytest.raises(grpc.aio.AioRpcError):
                    await Stub(channel, tasks.BINDING).IssueToken(
                        tasks_pb2.IssueTokenRequest(workload=holder.session, task_id=task, resource=TICKETS),
                        timeout=DEADLINE,
                    )
                (revoked,) = again.records("token_revoked")
                assert (revoked.actor, revoked.subject, revoked.fields["reasons"]) == (
                    "server",
                    task,
                    ("audience_gone",),
                )
                assert len(again.records("token_refused")) == 4
