"""What tests of supervision share: time that passes look by look, and a verifier's knowledge made of the store's frames."""

from dataclasses import fields

from broker._proto.broker.server.v1 import feed_pb2
from broker.errors import Refused
from broker.sdk.feed import FeedState
from broker.server.store.rows import FrameRow
from broker.tasks import Task, VerifiedToken
from tests.unit.server.tasks.estate import Estate


async def pass_time(estate: Estate, seconds: float, *, heartbeat: float = 1.0) -> None:
    """Let time pass as it does: the supervisor looks now and then, and both clocks go on."""
    left = seconds
    while left > 0:
        estate.clock.advance(min(heartbeat, left))
        left -= heartbeat
        await estate.supervisor.check()


async def task_of(estate: Estate, task_id: str) -> Task:
    task = await estate.store.read(lambda reader: reader.task(task_id))
    assert task is not None
    return task


async def frames(estate: Estate) -> list[FrameRow]:
    now = estate.clock.now()
    return list(await estate.store.read(lambda reader: reader.live_frames(now)))


async def refusal(estate: Estate, verified: VerifiedToken) -> str:
    """Give the code by which a verifier that has applied every frame refuses a token; empty where it accepts."""
    state = FeedState()
    names = [field.name for field in fields(FrameRow)]
    for row in await frames(estate):
        frame = feed_pb2.Frame(**{name: getattr(row, name) for name in names})
        state.apply(feed_pb2.FeedMessage(seq=row.seq, frame=frame), monotonic=0.0, now=0)
    try:
        state.require_alive(
            root=verified.root,
            epoch=verified.epoch,
            task=verified.task_id,
            session=verified.claims.cnf.session,
            jti=verified.jti,
        )
    except Refused as error:
        return error.reason
    return ""
