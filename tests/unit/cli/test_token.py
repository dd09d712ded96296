"""``inspect`` never claims truth and never asks a server; ``verify`` needs audience, issuer and keys, and says 5."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from broker.cli.main import main
from broker.clock import SystemClock
from broker.keys.local import generated
from broker.spiffe import SpiffeId
from broker.spiffe.jose import sign_compact
from broker.tasks import Authority, Confirmation, Delegation, Resource, issue_claims, start_task
from broker.tasks.keyset import write_keys

ISSUER = "https://broker.example.org"
AUDIENCE = "https://tickets.example.org"
DETAILS = [{"type": "api", "locations": [AUDIENCE], "actions": ["ticket.read"]}]


@pytest.fixture
def signed(tmp_path: Path) -> tuple[str, str]:
    """A token that holds, as ``@FILE``, and the file of the keys."""
    now = SystemClock().now().replace(microsecond=0)
    signer = generated("k1")
    agent = SpiffeId("spiffe://example.org/agent")
    authority = Authority.parse(DETAILS)
    delegation = Delegation(
        issuer="https://idp.example.org", user="alice", client=None, session=None, acr=None, auth_time=None,
        expires_at=now + timedelta(hours=1), token_hash="sha-256:" + "A" * 43,
    )  # fmt: skip
    task = start_task(
        id="tsk_1", agent=agent, session=None, purpose="p", authority=authority, delegation=delegation, now=now,
        ttl=timedelta(minutes=10),
    )  # fmt: skip
    claims = issue_claims(
        task, issuer=ISSUER, resource=Resource(AUDIENCE), authority=authority, cnf=Confirmation(x5t="A" * 43),
        jti="jti-1", txn="txn-1", now=now, ttl=timedelta(seconds=180),
    )  # fmt: skip
    token = sign_compact({"alg": "ES256", "kid": "k1", "typ": "at+jwt"}, claims.to_payload(), signer.sign)
    (tmp_path / "token").write_text(token)
    (tmp_path / "keys.json").write_text(write_keys({"k1": signer.public_key}))
    return f"@{tmp_path}/token", str(tmp_path / "keys.json")


def test_inspect_says_that_nothing_is_verified(signed: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["token", "inspect", signed[0], "-o", "json"]) == 0
    out, err = capsys.readouterr()
    shown = json.loads(out)
    assert shown["verified"] is False
    assert shown["claims"]["aud"] == AUDIENCE
    assert "NOT VERIFIED" in err


def test_inspect_takes_any_jwt(capsys: pytest.CaptureFixture[str]) -> None:
    # {"alg":"none"} and {"sub":"x"}: a verifier refuses it; somebody must be able to look at it.
    assert main(["token", "inspect", "eyJhbGciOiJub25lIn0.eyJzdWIiOiJ4In0."]) == 0
    assert '"alg": "none"' in capsys.readouterr().out


@pytest.mark.parametrize("text", ["x", "a.b", "a.b.c", "W10.W10.", "e30.e30.e30.e30"])
def test_no_jwt_is_2(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["token", "inspect", text, "-o", "json", "-q"]) == 2
    assert json.loads(capsys.readouterr().err)["error"]["code"] == "token_malformed"


def verify(signed: tuple[str, str], **other: str) -> list[str]:
    given = {"--audience": AUDIENCE, "--issuer": ISSUER, "--keys": signed[1]} | {f"--{k}": v for k, v in other.items()}
    return ["token", "verify", signed[0], *(part for pair in given.items() for part in pair), "-o", "json", "-q"]


def test_a_good_token_verifies(signed: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(verify(signed)) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["user"], shown["agent"], shown["task"]) == ("alice", "spiffe://example.org/agent", "tsk_1")
    assert datetime.fromisoformat(shown["expires_at"]) > datetime(2020, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize("other", [{"audience": "https://other.example.org"}, {"issuer": "https://other.example.org"}])
def test_another_audience_or_issuer_is_5(
    signed: tuple[str, str], other: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(verify(signed, **other)) == 5
    assert json.loads(capsys.readouterr().err)["error"]["hint"]


def test_another_key_is_5(signed: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.json"
    other.write_text(write_keys({"k1": ec.generate_private_key(ec.SECP256R1()).public_key()}))
    assert main(verify(signed, keys=str(other))) == 5
    assert json.loads(capsys.readouterr().err)["error"]["code"] == "token_signature"


def test_keys_that_are_none_are_2(signed: tuple[str, str], tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    assert main(verify(signed, keys=str(other))) == 2


def test_keys_that_cannot_be_had_are_75(signed: tuple[str, str]) -> None:
    assert main(verify(signed, keys="https://127.0.0.1:1/keys")) == 75
