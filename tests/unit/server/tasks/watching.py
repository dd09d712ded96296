"""What tests of ends and suspensions share: time that passes look by look, and a verifier's knowledge made of the store's frames."""

from datetime import datetime

from broker._proto.broker.server.v1 import feed_pb2
from broker.errors import Refused
from broker.sdk.feed import FeedState
from broker.server.api.grpc.feed import _frame
from broker.server.store.ports import Store
from broker.server.store.rows import FrameRow
from broker.server.tasks.requests import IssuedToken
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


async def verifiers_view(store: Store, now: datetime) -> FeedState:
    """What a verifier holds that has just connected: the real state machine, fed with the store's snapshot."""
    rows = await store.read(lambda reader: reader.live_frames(now))
    state = FeedState()
    told = feed_pb2.FeedSnapshot(issuer="i", keys="k", frames=[_frame(each) for each in rows if each.kind != "keys"])
    state.apply(feed_pb2.FeedMessage(seq=1, store=store.id, snapshot=told), monotonic=0.0, now=0)
    return state


async def refusal(estate: Estate, token: VerifiedToken | IssuedToken | str) -> str:
    """Give the code with which a verifier refuses a token by the feed; empty where it accepts."""
    verified = token if isinstance(token, VerifiedToken) else estate.verify(token)
    state = await verifiers_view(estate.store, estate.clock.now())
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
