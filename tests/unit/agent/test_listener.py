"""The security header, and what the public socket is."""

import asyncio
import os

import pytest

from broker.agent.listener import require_security_header
from broker.errors import Invalid
from tests.fakes.running_agent import estate, until

WORKLOAD = "/SpiffeWorkloadAPI/FetchX509SVID"


@pytest.mark.bears("WE-03", "W01")
@pytest.mark.parametrize(
    "metadata",
    [
        (),
        [("workload.spiffe.io", "TRUE")],
        [("workload.spiffe.io", " true")],
        [("workload.spiffe.io", b"true")],
        [("workload.spiffe.io", "true")] * 2,
        [("other", "true")],
    ],
)
def test_refused(metadata) -> None:
    for path in (
        WORKLOAD,
        "/broker.agent.v1.Tasks/StartTask",
        "/broker.agent.v1.Feed/Subscribe",
        "/grpc.health.v1.HealthX/Check",
    ):
        with pytest.raises(Invalid, match="security header missing from request"):
            require_security_header(path, metadata)


def test_accepted() -> None:
    require_security_header(WORKLOAD, [("user-agent", "x"), ("workload.spiffe.io", "true")])
    require_security_header("/grpc.health.v1.Health/Check", [])


@pytest.mark.bears("A19")
async def test_everybody_may_connect_and_nobody_may_replace_it() -> None:
    async with estate() as agent:
        assert agent.socket.stat().st_mode & 0o777 == 0o777
        assert agent.socket.parent.stat().st_mode & 0o777 == 0o755
        assert agent.settings.private_dir.stat().st_mode & 0o777 == 0o700


@pytest.mark.bears("A22")
async def test_operators_that_came_and_went_leave_no_descriptor_behind() -> None:
    async with estate() as agent:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            _, writer = await asyncio.open_unix_connection(agent.settings.admin_socket_path)
            writer.close()
            await writer.wait_closed()
        await until(lambda: len(os.listdir("/proc/self/fd")) <= before)
