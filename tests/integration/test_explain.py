"""Why not? Asked and answered in a whole estate of real processes, by the command as an operator types it."""

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from broker.dev import demo_identity
from broker.dev.stage import Stage

pytestmark = pytest.mark.timeout(120)


async def broker(stage: Stage, *arguments: str, code: int = 0) -> Mapping[str, Any]:
    """Run one command line in the estate; give its JSON, which is the error's when it must fail."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "broker.cli.main", *arguments, "-o", "json", "-q",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env={**os.environ, **stage.estate.environment()},
    )  # fmt: skip
    out, err = await process.communicate()
    assert process.returncode == code, (arguments, out, err)
    answer: Mapping[str, Any] = json.loads(out) if code == 0 else json.loads(err)["error"]
    return answer


async def test_a_pod_and_a_stranger(estate: Stage) -> None:
    lines, facts = await demo_identity.entries(estate)
    assert lines
    entry_ids = [one["id"] for one in facts["entries"]]
    await demo_identity.attestation(estate)
    pod = estate.kept["pod"]

    # The pod holds what it asked for, and the explanation says the same of it.
    held = (await broker(estate, "whois", str(pod.pid)))["items"]
    assert [one["spiffe_id"] for one in held] == [demo_identity.POD_ID]
    assert held[0]["entry_id"] == entry_ids[0]
    told = await broker(estate, "explain", "identity", "--pid", str(pod.pid))
    assert (told["code"], told["status"]) == ("issued", "OK")
    # The third entry is the node's own extra identity, which lacks more.
    assert [(one["id"], one["issued"]) for one in told["entries"]][:1] == [(entry_ids[0], True)]
    assert {one["id"]: one["issued"] for one in told["entries"]}[entry_ids[1]] is False
    path = f"unix:path:{estate.programs[demo_identity.POD]}"
    assert {"selector": path, "strength": "kernel"} in told["attestors"][0]["selectors"]

    # The command itself is a stranger: it learns nothing, but how its operator may ask.
    refused = await broker(estate, "whoami", code=4)
    assert (refused["code"], refused["message"]) == ("no_identity_issued", "no identity issued")
    assert "unix:" not in json.dumps(refused)
    denial_id = refused["hint"].rsplit(" ", 1)[1]
    why = await broker(estate, "explain", "denial", denial_id)
    assert why["method"] == "/SpiffeWorkloadAPI/FetchX509SVID"
    lacks = {one["id"]: [lack["selector"] for lack in one["lacks"]] for one in why["entries"]}
    assert [lacks[one] for one in entry_ids] == [
        [f"unix:path:{estate.programs[name]}"] for name in (demo_identity.POD, demo_identity.SERVICE)
    ]
    # The agent's log holds the same id and reason.
    logged = [json.loads(line) for line in estate.estate.layout.log("agent").read_text().splitlines()]
    (line,) = [one for one in logged if one.get("denial") == denial_id]
    assert line["code"] == "no_identity_issued"
    assert any("unix:path:" in one for one in line["nearest"])

    # What the operator would change, tried before it is done.
    asked = ",".join([path, f"unix:uid:{os.geteuid()}"])
    tried = await broker(estate, "explain", "identity", "--selectors", asked, "--entry", entry_ids[0])
    assert tried["code"] == "issued"
    tried = await broker(estate, "explain", "identity", "--selectors", path, "--entry", entry_ids[0])
    assert [one["selector"] for one in tried["entries"][0]["lacks"]] == [f"unix:uid:{os.geteuid()}"]
