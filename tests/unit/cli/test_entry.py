"""``--dry-run`` shows what would be sent, by SPIRE's names and with ours beside them."""

import json

import pytest

from broker.cli.main import main

CREATE = [
    "entry",
    "create",
    "-spiffeID",
    "spiffe://a.test/x",
    "-parentID",
    "spiffe://a.test/node",
    "--dry-run",
    "-o",
    "json",
]


def sent(capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, object]:
    assert main([*CREATE, *more]) == 0
    out, err = capsys.readouterr()
    assert "nothing was sent" in err
    return json.loads(out)


def test_all_fields(capsys: pytest.CaptureFixture[str]) -> None:
    entry = sent(
        capsys,
        "-selector", "unix:uid:0", "-selector", "unix:path:/x", "-x509SVIDTTL", "3600", "-jwtSVIDTTL", "5m", "-dns", "a",
        "-dns", "b", "-admin", "-downstream", "-hint", "h", "-entryID", "mine", "-federatesWith", "b.test",
        "-entryExpiry", "4102444800", "-storeSVID", "--allowed-audience", "aud", "--may-start-tasks", "--description", "d",
        "--owner", "o",
    )  # fmt: skip
    assert entry == {
        "kind": "entry",
        "id": "mine",
        "spiffe_id": "spiffe://a.test/x",
        "parent_id": "spiffe://a.test/node",
        "selectors": ["unix:uid:0", "unix:path:/x"],
        "x509_svid_ttl": 3600,
        "jwt_svid_ttl": 300,
        "federates_with": ["b.test"],
        "admin": True,
        "downstream": True,
        "expires_at": "2100-01-01T00:00:00Z",
        "dns_names": ["a", "b"],
        "revision_number": 0,
        "store_svid": True,
        "hint": "h",
        "created_at": None,
        "allowed_audiences": ["aud"],
        "may_start_tasks": True,
        "description": "d",
        "owner": "o",
    }


def test_spire_s_ttl_is_both(capsys: pytest.CaptureFixture[str]) -> None:
    entry = sent(capsys, "-selector", "unix:uid:0", "-ttl", "60", "-jwtSVIDTTL", "10")
    assert (entry["x509_svid_ttl"], entry["jwt_svid_ttl"]) == (60, 10)


def test_tasks_are_off_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    entry = sent(capsys, "-selector", "unix:uid:0")
    assert not entry["may_start_tasks"]
    assert not entry["admin"]


def test_no_selectors_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(CREATE) == 2
    assert "--selector" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["delete", "x"], ["delete", "-entryID", "x"]])
def test_delete_dry_run(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["entry", *verb, "--dry-run", "-o", "name"]) == 0
    assert capsys.readouterr().out == "entry/x\n"
