"""``broker entry`` against a real server: what the verbs change there, and that the same file twice changes nothing."""

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.cli.main import main
from broker.server.app import server
from tests.integration.identity_rig import Estate, estate  # noqa: F401 - a fixture

NODE = "spiffe://example.org/node"


@pytest.fixture
def here(estate: Estate, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:  # noqa: F811 - the fixture
    """A server in a thread of its own, since each command line has its own event loop."""
    ready, stop = threading.Event(), []

    async def run() -> None:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        async with server(estate.settings(), environ={}) as one:
            monkeypatch.setenv("BROKER_SERVER_SOCKET", str(one.socket_path))
            stop.append(lambda: loop.call_soon_threadsafe(ended.set))
            ready.set()
            await ended.wait()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        assert ready.wait(30)
        yield estate.directory
    finally:
        for one in stop:
            one()
        thread.join(30)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    def do(*arguments: str, code: int = 0) -> str:
        capsys.readouterr()
        assert main(["entry", *arguments, "--yes"]) == code, capsys.readouterr()
        return capsys.readouterr().out

    return do


def written(here: Path, *entries: str, head: str = "owner: me\nitems:\n") -> str:
    path = here / "entries.yaml"
    path.write_text(head + "".join(entries))
    return str(path)


def entry(path: str, **members: object) -> str:
    more = "".join(f"    {name}: {json.dumps(value)}\n" for name, value in members.items())
    return f"  - spiffe_id: spiffe://example.org{path}\n    parent_id: {NODE}\n    selectors: [unix:uid:7]\n{more}"


def test_apply_is_idempotent_and_deletes_only_what_is_its_own(here, run) -> None:
    run(
        "create",
        "-spiffeID",
        "spiffe://example.org/theirs",
        "-parentID",
        NODE,
        "-selector",
        "unix:uid:1",
        "--owner",
        "you",
    )
    file = written(here, entry("/a", hint="one"), entry("/b", jwt_svid_include_jti=True))
    planned = json.loads(run("apply", "-f", file, "--dry-run", "-o", "json"))
    assert [one["action"] for one in planned["items"]] == ["create", "create"]
    assert run("count").strip() == "1"

    assert json.loads(run("diff", "-f", file, "-o", "json", code=1)) == planned
    assert len(json.loads(run("apply", "-f", file, "-o", "json"))["items"]) == 2
    assert json.loads(run("apply", "-f", file, "-o", "json")) == {"kind": "entry_changes", "items": []}
    run("diff", "-f", file)

    file = written(here, entry("/a", hint="two"))
    changed = json.loads(run("apply", "-f", file, "--prune", "-o", "json"))["items"]
    assert [(one["action"], one["changes"]) for one in changed] == [
        ("delete", {}),
        ("update", {"hint": {"from": "one", "to": "two"}}),
    ]
    listed = json.loads(run("list", "-o", "json"))["items"]
    assert {(one["spiffe_id"], one["owner"], one["revision_number"]) for one in listed} == {
        ("spiffe://example.org/theirs", "you", 0),
        ("spiffe://example.org/a", "me", 1),
    }


def test_one_that_fails_does_not_hide_the_others(here, run) -> None:
    file = written(here, entry("/good"), entry("/bad", dns_names=["not a name"]))
    rows = json.loads(run("apply", "-f", file, "-o", "json", code=1))["items"]
    assert [(one["spiffe_id"][-4:], "DNS name" in one["error"]) for one in rows] == [("good", False), ("/bad", True)]
    assert run("count", "-spiffeID", "spiffe://example.org/good").strip() == "1"


def test_an_export_is_a_file_that_changes_nothing(here, run, tmp_path) -> None:
    run("apply", "-f", written(here, entry("/a", hint="h", description="d: e"), entry("/b", admin=True)))
    exported = tmp_path / "exported"
    exported.write_text(run("export"))
    run("diff", "-f", str(exported), "--owner", "me", "--prune")
    # Onto an empty server it makes the same entries, ids and all.
    ids = {one["id"] for one in json.loads(run("list", "-o", "json"))["items"]}
    for entry_id in ids:
        run("delete", entry_id)
    run("apply", "-f", str(exported))
    assert {one["id"] for one in json.loads(run("list", "-o", "json"))["items"]} == ids


def test_spire_s_data_file_is_created(here, run) -> None:
    data = here / "data.json"
    data.write_text(
        '{"entries": [{"selectors": [{"type": "unix", "value": "uid:1"}], "spiffe_id": "spiffe://example.org/x",'
        f' "parent_id": "{NODE}", "jwt_svid_ttl": 30, "store_svid": false}}]}}'
    )
    run("create", "-data", str(data))
    run("create", "-data", str(data), code=1)
    assert run("count", "-parentID", NODE).strip() == "1"


def test_update_changes_what_it_names_and_nothing_else(here, run) -> None:
    options = [
        "-node",
        "-hint",
        "h",
        "-dns",
        "a.test",
        "--owner",
        "me",
        "-jwtSVIDIncludeJTI",
        "-selector",
        "unix:uid:1",
        "-selector",
        "unix:gid:1",
    ]
    made = json.loads(run("create", "-spiffeID", "spiffe://example.org/u", *options, "-o", "json"))
    assert made["parent_id"] == "spiffe://example.org/spire/server"
    assert made["additional_attributes"] == {"disable_x509_svid_prefetch": False, "jwt_svid_include_jti": True}
    changed = json.loads(
        run("update", "-entryID", made["id"], "-x509SVIDTTL", "1h", "--clear", "hint", "--admin", "-o", "json")
    )
    assert changed == {**made, "x509_svid_ttl": 3600, "hint": "", "admin": True, "revision_number": 1}
    changed = json.loads(run("update", made["id"], "--no-jwt-svid-include-jti", "--no-admin", "-o", "json"))
    assert "additional_attributes" not in changed
    assert not changed["admin"]
    run("update", made["id"], code=2)
    run("update", "none", "--hint", "x", code=3)


def test_lists_are_narrowed_by_the_server(here, run) -> None:
    run("apply", "-f", written(here, entry("/a", hint="h"), entry("/b", downstream=True)))
    for narrow, found in (
        (("-spiffeID", "spiffe://example.org/a"), {"/a"}),
        (("-selector", "unix:uid:7"), {"/a", "/b"}),
        (("-selector", "unix:uid:8"), set()),
        (("-selector", "unix:uid:7", "-selector", "unix:uid:8", "-matchSelectorsOn", "any"), {"/a", "/b"}),
        (("-hint", "h"), {"/a"}),
        (("-downstream",), {"/b"}),
        (("--owner", "me"), {"/a", "/b"}),
        (("--owner", ""), set()),
    ):
        rows = json.loads(run("list", *narrow, "-o", "json"))["items"]
        assert {one["spiffe_id"].removeprefix("spiffe://example.org") for one in rows} == found, narrow
        assert run("count", *narrow).strip() == str(len(found))
