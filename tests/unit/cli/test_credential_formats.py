"""What credential helpers print, beyond what the programs themselves are asked in the integration tests."""

import json

import pytest

from broker.cli.aws_keys import _elements, keys_for, session_name
from broker.cli.credential_formats import FORMATS, Fetched, google_failure, k8s_exec
from broker.cli.main import main
from broker.errors import Invalid, NoIdentity, Unavailable

SVID = Fetched("spiffe://example.org/a/b", "a.b.c", 1_900_000_000)
ROLE = "arn:aws:iam::111122223333:role/path/name"


def test_times_and_versions() -> None:
    answer = k8s_exec(SVID, {})
    assert answer["status"] == {"token": "a.b.c", "expirationTimestamp": "2030-03-17T17:46:40Z"}
    for info in ("{", "[]", "{}", '{"apiVersion": 1}', '{"apiVersion": "client.authentication.k8s.io/v1alpha1"}'):
        with pytest.raises(Invalid) as refused:
            k8s_exec(SVID, {"KUBERNETES_EXEC_INFO": info})
        assert refused.value.reason == "exec_info"


def test_google_asks_for_something_else() -> None:
    saml = {"GOOGLE_EXTERNAL_ACCOUNT_TOKEN_TYPE": "urn:ietf:params:oauth:token-type:saml2"}
    with pytest.raises(Invalid, match="saml2"):
        FORMATS["google-executable"](SVID, saml)
    failure = json.loads(google_failure(NoIdentity("no identity issued")))
    assert failure == {"version": 1, "success": False, "code": "no_identity_issued", "message": "no identity issued"}


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"AWS_ROLE_ARN": "reader"},
        {"AWS_ROLE_ARN": ROLE + "\n"},
        {"AWS_ROLE_ARN": ROLE, "AWS_ENDPOINT_URL_STS": "http://sts.example.org"},
        {"AWS_ROLE_ARN": ROLE, "AWS_ENDPOINT_URL_STS": "file:///etc/passwd"},
        {"AWS_ROLE_ARN": ROLE, "AWS_REGION": "eu.evil.example/"},
    ],
)
def test_no_token_is_sent_where_it_is_not_said_well_to_whom(environ: dict[str, str]) -> None:
    with pytest.raises(Invalid) as refused:
        keys_for("a.b.c", SVID.spiffe_id, environ)
    assert refused.value.reason.startswith("aws_")
    assert refused.value.hint


def test_nobody_answers_there() -> None:
    with pytest.raises(Unavailable, match="cannot be asked"):
        keys_for("a.b.c", SVID.spiffe_id, {"AWS_ROLE_ARN": ROLE, "AWS_ENDPOINT_URL_STS": "http://127.0.0.1:1"})


def test_answers_that_are_none() -> None:
    bomb = b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'
    assert _elements(bomb) == _elements(b"<a") == _elements(b"<a/>" * 40_000) == _elements(b"\xff") == {}
    assert _elements(b'<a xmlns="urn:x"><B> c </B></a>') == {"B": "c"}


@pytest.mark.parametrize(
    ("spiffe_id", "name"),
    [
        ("spiffe://example.org/a/b", "example.org-a-b"),
        ("spiffe://example.org/" + "x" * 100, "x" * 64),
        ("spiffe://a.test/-", "a.test"),
    ],
)
def test_session_names(spiffe_id: str, name: str) -> None:
    assert session_name(spiffe_id) == name
    assert 2 <= len(name) <= 64


def test_no_token_is_shown() -> None:
    assert "a.b.c" not in repr(SVID)


def test_a_failure_is_what_each_program_can_read(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["svid", "jwt", "--audience", "a", "--socket", "/nonexistent", "--format"]
    assert main([*given, "google-executable"]) == 75
    out, err = capsys.readouterr()
    assert (json.loads(out)["success"], err) == (False, "")
    for name in ("k8s-exec", "aws-credential-process"):
        assert main([*given, name]) == 75
        out, err = capsys.readouterr()
        assert out == ""
        assert "no node agent" in err
