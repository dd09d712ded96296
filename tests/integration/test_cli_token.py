"""``broker token exchange`` and ``revoke``: processes of their own, against a real server and node agent."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from broker.spiffe.jose import parse_compact
from tests.attacks.tasks.outward_rig import NEIGHBOUR, TICKETS, TRIAGE, Rig, rig
from tests.integration.test_authlib import in_files

pytestmark = pytest.mark.timeout(180)


async def broker(house: Rig, *arguments: str, given: str = "", code: int = 0) -> Any:
    """Run the command line; give its JSON."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "broker.cli.main", *arguments, "-o", "json",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "SPIFFE_ENDPOINT_SOCKET": f"unix:{house.agent.socket}", "BROKER_ISSUER": house.issuer},
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(given.encode()), 60)
    assert process.returncode == code, err.decode()
    return json.loads(out or err)


async def test_exchange_and_revoke(tmp_path: Path) -> None:
    async with rig() as house:
        (certificate, key), roots = in_files(house, tmp_path)
        files = ("--svid", certificate, "--svid-key", key, "--bundle", roots)
        wanted = ("token", "exchange", "--resource", TICKETS, "--scope", "ticket.read", "--subject-token-file", "-")
        issued = await broker(house, *wanted, *files, "--purpose", "triage", given=house.user_token())
        assert (issued["kind"], issued["token_type"], issued["scope"]) == ("issued_token", "Bearer", "ticket.read")
        token = issued["access_token"]
        assert await house.active(token)

        shape = ("--requested-token-type", "txn_token", "--audience", "example.org", "--scope", "ticket.read")
        brought = ("--subject-token-type", "access_token", "--subject-token-file", "-")
        txn = await broker(house, "token", "exchange", *files, *shape, *brought, given=token)
        assert parse_compact(txn["access_token"]).payload["req_wl"] == str(TRIAGE)

        # By the socket: this command's own task, and its end with the command.
        own = await broker(house, *wanted, "--spiffe-id", str(NEIGHBOUR), given=house.user_token())
        claims = parse_compact(own["access_token"]).payload
        assert claims["client_id"] == str(NEIGHBOUR)

        refused = await broker(house, *wanted, *files, "--task", "tsk_unknown", given=house.user_token(), code=4)
        assert refused["error"]["code"] == "task_unknown"
        await broker(house, *wanted, *files, "--audience", "x", given=house.user_token(), code=4)
        await broker(house, *wanted, "--svid", certificate, given=house.user_token(), code=2)

        over = await broker(house, "token", "revoke", *files, "--end-task", "-", given=token)
        assert over["ended"] == "task"
        assert not await house.active(token)
        assert (await house.clients[TRIAGE].get(f"/tasks/{issued['task']}")).json()["cause"] == "cancelled"
        again = await broker(house, "token", "revoke", *files, "-", given="x")
        assert again["ended"] == "token"
        nothing = await broker(house, *wanted, *files, "--dry-run", given=house.user_token())
        assert "access_token" not in nothing
