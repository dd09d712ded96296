"""Who watches over a task, with real processes: what is killed, stopped or let go of is refused by a verifier, measured."""

import asyncio
import base64
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from broker._proto.broker.server.v1 import entries_pb2, tasks_pb2
from broker._proto.service import Stub
from broker._proto.spire.api.server.agent.v1 import agent_pb2
from broker._proto.spire.api.types import entry_pb2, selector_pb2
from broker.agent.upstream import AGENT
from broker.client import Entries, Tasks, dial_socket
from broker.client.calls import spiffe_id_message
from broker.dev import demo_identity
from broker.dev.stage import Process, Stage
from broker.errors import BrokerError
from broker.sdk import Workload
from broker.sdk.verify import TokenVerifier
from broker.spiffe import SpiffeId

pytestmark = pytest.mark.timeout(180)

POD, POD_ID, VERIFIER_ID = "worker", "spiffe://dev.test/agent/worker", "spiffe://dev.test/service/verifier"
SHORT = {"lease_ttl": "3s", "agent_lease_ttl": "3s"}
SECONDS = 30.0


@dataclass
class Scene:
    """A real estate, a verifier in this process, and pods."""

    stage: Stage
    verifier: TokenVerifier
    entry_id: str
    pods: int = 0

    async def pod(self) -> Process:
        self.pods += 1
        pod = await self.stage.play(f"pod {self.pods}", POD, "tests.fakes.supervised_pod")
        await pod.do("identity")
        return pod

    async def started(self, pod: Process, **request: Any) -> "Working":
        details = [{"type": "api", "locations": [self.stage.service_url], "actions": ["ticket.read"]}]
        task = (
            await pod.do(
                "start",
                user_token=self.stage.estate.user_token("alice"),
                purpose="triage ticket 4711",
                authorization_details=details,
                ttl=600,
                **request,
            )
        )["task"]
        token = (await pod.do("token", task=task, resource=self.stage.service_url))["token"]
        chain = [base64.b64decode(one) for one in (await pod.do("identity"))["chain"]]
        working = Working(self, pod, task, token, chain)
        working.accepted()
        return working

    @asynccontextmanager
    async def operator(self) -> AsyncIterator[Any]:
        channel = dial_socket(self.stage.estate.layout.server_socket)
        try:
            yield channel
        finally:
            await channel.close()

    async def task(self, task_id: str) -> tasks_pb2.Task:
        async with self.operator() as channel:
            return await Tasks(channel).get(task_id)

    def pid(self, part: str) -> int:
        return self.stage.estate.require_record().parts[part].pid


@dataclass
class Working:
    """A pod with a task and a token, and what the verifier says of it."""

    scene: Scene
    pod: Process
    task: str
    token: str
    chain: list[bytes]

    def accepted(self) -> None:
        assert self.scene.verifier.verify_now(self.token, self.chain).task == self.task

    def refusal(self) -> str:
        try:
            self.scene.verifier.verify_now(self.token, self.chain)
        except BrokerError as error:
            return error.reason
        return ""

    async def refused(self, *codes: str) -> tuple[str, float]:
        """Wait until the verifier refuses, with one of these codes; give the code, and the seconds that it took."""
        began = time.monotonic()
        while not (code := self.refusal()) or (codes and code not in codes):
            assert time.monotonic() - began < SECONDS, f"the verifier says {code or 'yes'}"
            await asyncio.sleep(0.002)
        return code, time.monotonic() - began

    async def reaches(self, state: str) -> tasks_pb2.Task:
        deadline = time.monotonic() + SECONDS
        while (task := await self.scene.task(self.task)).state != state:
            assert time.monotonic() < deadline, f"the task is {task.state}, not {state}"
            await asyncio.sleep(0.02)
        return task


@asynccontextmanager
async def scene(**settings: Mapping[str, str]) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        stage = await stack.enter_async_context(Stage(**settings))
        await demo_identity.estate(stage)
        channel = dial_socket(stage.estate.layout.server_socket)
        try:
            pod = await Entries(channel).create(_entry(stage.install(POD), POD_ID, stage, may_start_tasks=True))
            await Entries(channel).create(_entry(Path("/proc/self/exe").resolve(), VERIFIER_ID, stage))
        finally:
            await channel.close()
        me = await stack.enter_async_context(Workload.connect(f"unix:{stage.estate.layout.agent_socket}"))
        issuer = stage.estate.require_record().ports.server_url
        verifier = await TokenVerifier.discover(issuer, audience=stage.service_url, workload=me)
        stack.push_async_callback(verifier.aclose)
        yield Scene(stage, verifier, pod.entry.id)


def _entry(program: Path, identity: str, stage: Stage, **more: Any) -> entries_pb2.RegisteredEntry:
    selectors = (("unix", f"uid:{os.geteuid()}"), ("unix", f"path:{program}"))
    return entries_pb2.RegisteredEntry(
        entry=entry_pb2.Entry(
            spiffe_id=spiffe_id_message(SpiffeId(identity)),
            parent_id=spiffe_id_message(SpiffeId(stage.kept["node"])),
            selectors=[selector_pb2.Selector(type=kind, value=value) for kind, value in selectors],
        ),
        **more,
    )


def told(seconds: float, what: str) -> None:
    sys.stderr.write(f"\n{what}: refused after {seconds * 1000:.1f} ms\n")


@pytest.mark.bears("V07", "SP09")
async def test_a_killed_pod_takes_its_attached_task_with_it_and_no_replica_takes_it_over() -> None:
    async with scene() as here:
        one, two = await here.started(await here.pod()), await here.started(await here.pod())
        # Another process of the same SPIFFE ID: its certificate fits neither the token nor the task.
        one_by_two = Working(here, two.pod, one.task, one.token, two.chain)
        assert one_by_two.refusal() == "binding_mismatch"
        stolen = await two.pod.try_("steal", task=one.task, resource=here.stage.service_url)
        assert stolen["error"]["code"] == "session_mismatch"
        os.kill(one.pod.pid, signal.SIGKILL)
        code, took = await one.refused()
        told(took, "kill -9 of the pod")
        assert code in {"task_ended", "session_ended"}
        over = await one.reaches("revoked")
        assert over.cause == "process_exited"
        two.accepted()
        assert (await here.task(two.task)).state == "active"


@pytest.mark.bears("RV21")
async def test_a_process_that_is_stopped_or_hangs_or_lets_go_is_suspended_by_its_lease() -> None:
    async with scene(tasks=SHORT) as here:
        stopped, closed, hung, kept = [
            await here.started(await here.pod(), supervision=kind)
            for kind in ("attached", "attached", "lease", "lease")
        ]
        shown = await here.task(hung.task)
        assert (shown.lease_ttl, 0 < shown.lease_left <= 3) == (3.0, True)
        os.kill(stopped.pod.pid, signal.SIGSTOP)
        try:
            await closed.pod.do("let_go", task=closed.task)
            hanging = asyncio.create_task(hung.pod.do("hang", seconds=8))
            for working, what in ((stopped, "SIGSTOP"), (closed, "a closed stream"), (hung, "a hanging event loop")):
                code, took = await working.refused()
                told(took, what)
                assert code == "task_suspended"
                suspended = await working.reaches("suspended")
                assert suspended.cause == "lease_lapsed"
            await hanging
        finally:
            os.kill(stopped.pod.pid, signal.SIGCONT)
        # It lives again, and so does the other: neither gets anything, the heartbeat of neither starts the task again.
        for working in (stopped, hung):
            answer = await working.pod.try_("token", task=working.task, resource=here.stage.service_url)
            deadline = time.monotonic() + SECONDS
            while "error" not in answer and time.monotonic() < deadline:
                answer = await working.pod.try_("token", task=working.task, resource=here.stage.service_url)
            assert answer["error"]["code"] == "task_suspended"
            assert (await here.task(working.task)).state == "suspended"
        # Whoever went on answering was left alone, three leases long.
        kept.accepted()
        assert (await here.task(kept.task)).state == "active"


@pytest.mark.bears("V07")
async def test_a_silent_node_agent_stops_tasks_and_another_run_of_it_ends_them() -> None:
    async with scene(tasks=SHORT) as here:
        first = await here.started(await here.pod())
        agent = here.pid("agent")
        os.kill(agent, signal.SIGSTOP)
        try:
            stopped = await first.reaches("suspended")
            assert stopped.cause == "lease_lapsed"
        finally:
            os.kill(agent, signal.SIGCONT)
        # It comes back, its workloads live: what was stopped stays so, and a new task can be started.
        # (The verifier on that node was cut off, and refused for that; now it hears.)
        await first.refused("task_suspended")
        second = await here.started(first.pod)
        assert (await here.task(first.task)).state == "suspended"
        # The agent dies and starts again; the pod lives. What the first run attested is known to nobody.
        os.kill(agent, signal.SIGKILL)
        here.stage.estate._children.pop("agent").wait()
        await here.stage.estate.up(lambda _: None)
        over = await second.reaches("revoked")
        assert over.cause == "session_ended"
        assert (await first.reaches("revoked")).cause == "session_ended"
        _, took = await second.refused("task_ended", "session_ended")
        told(took, "a new run of the node agent")
        again = await here.started(second.pod)
        assert (await here.task(again.task)).state == "active"


@pytest.mark.bears("V11", "RV11")
async def test_a_deleted_entry_and_a_banned_agent_end_tasks_at_the_verifier() -> None:
    async with scene() as here:
        pod = await here.pod()
        one = await here.started(pod)
        async with here.operator() as channel:
            await Entries(channel).delete(here.entry_id)
        code, took = await one.refused()
        told(took, "the entry was deleted")
        assert code in {"task_ended", "session_ended"}
        assert (await one.reaches("revoked")).cause == "entry_deleted"
        async with here.operator() as channel:
            await Entries(channel).create(_entry(here.stage.programs[POD], POD_ID, here.stage, may_start_tasks=True))
        two = await here.started(await here.pod())
        async with here.operator() as channel:
            node = spiffe_id_message(SpiffeId(here.stage.kept["node"]))
            await Stub(channel, AGENT).BanAgent(agent_pb2.BanAgentRequest(id=node), timeout=SECONDS)
        over = await two.reaches("revoked")
        assert over.cause == "agent_banned"
        # Its node is cut off: the verifier there hears of the end, or falls silent, or has no bundle left to judge by.
        code, took = await two.refused()
        told(took, "the node agent was banned")
        assert code in {"task_ended", "session_ended", "feed_stale", "feed_partitioned", "svid_no_bundle"}


@pytest.mark.bears("X03")
async def test_a_rotation_in_the_middle_of_a_task_strands_nothing() -> None:
    async with scene(server={"default_x509_svid_ttl": "20s"}) as here:
        one = await here.started(await here.pod())
        url = here.stage.estate.require_record().ports.server_url
        before = await one.pod.do("identity")
        kept = (await one.pod.do("keep_context"))["number"]
        after = await one.pod.do("rotated", x5t=before["x5t"])
        assert after["x5t"] != before["x5t"]
        # The task goes on: with the new certificate, and, while it is valid, with the old one.
        for context in (None, kept):
            deadline = time.monotonic() + SECONDS
            while True:
                answer = await one.pod.do("ask", url=url, method="GET", path=f"/tasks/{one.task}", context=context)
                if answer["status"] == 200 or time.monotonic() > deadline:
                    break
            assert answer["status"] == 200, answer
            assert answer["body"]["state"] == "active"
        token = (await one.pod.do("token", task=one.task, resource=here.stage.service_url))["token"]
        chain = [base64.b64decode(each) for each in (await one.pod.do("identity"))["chain"]]
        Working(here, one.pod, one.task, token, chain).accepted()
        # What was issued before is as good as before on a connection with the certificate of then.
        one.accepted()
        assert (await here.task(one.task)).state == "active"
