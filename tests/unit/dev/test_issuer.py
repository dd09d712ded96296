"""A real issuer: its tokens verify under the keys that it shows over HTTPS, and come over the private socket alone."""

import asyncio
import http.client
import json
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from broker.clock import SystemClock
from broker.dev.issuer import ACR, AUDIENCE, TOKEN_SECONDS, Issuer, user_token
from broker.errors import Invalid, Unavailable
from broker.server.tasks.config import SubjectIssuer
from broker.server.tasks.subjects import Subjects
from broker.spiffe.jose import parse_compact, public_key_from_jwk, verify_signature

URL = "https://127.0.0.1:9443"


class Fixed:
    """A clock that stands."""

    def __init__(self) -> None:
        self.at = datetime(2026, 1, 1, tzinfo=UTC)

    def now(self) -> datetime:
        return self.at

    def monotonic(self) -> float:
        return 0.0


@pytest.fixture
def issuer() -> Issuer:
    return Issuer(URL, ec.generate_private_key(ec.SECP256R1()), Fixed())


def test_a_token_verifies_under_the_shown_keys(issuer: Issuer) -> None:
    jws = parse_compact(issuer.id_token("alice"))
    (jwk,) = issuer.keys()["keys"]  # type: ignore[misc]
    verify_signature(jws, public_key_from_jwk(jwk), "ES256")
    assert jws.kid == jwk["kid"]
    assert "d" not in jwk
    claims = dict(jws.payload)
    assert (claims["iss"], claims["sub"], claims["aud"], claims["acr"]) == (URL, "alice", AUDIENCE, ACR)
    assert int(str(claims["exp"])) - int(str(claims["iat"])) == TOKEN_SECONDS
    assert claims["auth_time"] == claims["iat"]


def test_a_name_keeps_its_session_and_another_has_another(issuer: Issuer) -> None:
    def sid(name: str) -> object:
        return parse_compact(issuer.id_token(name)).payload["sid"]

    assert sid("alice") == sid("alice")
    assert sid("alice") != sid("bob")


@pytest.mark.parametrize("name", ["", " ", "a b", "-a", "a" * 65, "a\n", "spiffe://a.test/b", "ä", "a/b"])
def test_no_name(issuer: Issuer, name: str) -> None:
    with pytest.raises(Invalid):
        issuer.id_token(name)


def test_discovery(issuer: Issuer) -> None:
    document = issuer.discovery()
    required = {"issuer", "jwks_uri", "authorization_endpoint", "response_types_supported", "subject_types_supported"}
    assert required <= document.keys()
    assert document["id_token_signing_alg_values_supported"] == ["ES256"]


def test_repr_shows_no_key(issuer: Issuer) -> None:
    assert "key" not in repr(issuer)


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[int, Path]]:
    """A process of its own: the port, and the directory."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name, socket.socket() as probe:
        directory = Path(name)
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        command = [sys.executable, "-m", "broker.dev.issuer", "--directory", str(directory / "i"), "--port", str(port)]
        child = subprocess.Popen([*command, "--token-socket", str(directory / "t" / "s")], stderr=subprocess.PIPE)
        deadline = time.monotonic() + 30
        while not reachable(port):
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield port, directory
        child.terminate()
        _, said = child.communicate(timeout=30)
        assert child.returncode == 0
        assert b"for this machine only" in said
        assert not (directory / "t" / "s").exists()


def reachable(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def get(running: tuple[int, Path], path: str) -> tuple[int, dict[str, object]]:
    context = ssl.create_default_context(cafile=running[1] / "i" / "ca.pem")
    connection = http.client.HTTPSConnection("127.0.0.1", running[0], context=context, timeout=30)
    connection.request("GET", path)
    answer = connection.getresponse()
    body = json.loads(answer.read())
    connection.close()
    return answer.status, body


def test_over_https(running: tuple[int, Path]) -> None:
    assert get(running, "/.well-known/openid-configuration")[1]["issuer"] == f"https://127.0.0.1:{running[0]}"
    assert get(running, "/keys")[0] == 200
    assert get(running, "/token")[0] == get(running, "/authorize")[0] == 404


def test_the_token_socket_is_private(running: tuple[int, Path]) -> None:
    path = running[1] / "t" / "s"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_uid == os.geteuid()


def test_the_server_takes_its_tokens(running: tuple[int, Path]) -> None:
    url = f"https://127.0.0.1:{running[0]}"
    trusted = SubjectIssuer(issuer=url, audiences=frozenset({AUDIENCE}), ca_path=running[1] / "i" / "ca.pem")

    async def judge() -> str:
        subjects = Subjects([trusted], SystemClock())
        try:
            return (await subjects.verify(user_token(running[1] / "t" / "s", "alice"))).user
        finally:
            await subjects.aclose()

    assert asyncio.run(judge()) == "alice"


def test_what_is_no_name_is_said(running: tuple[int, Path]) -> None:
    with pytest.raises(Invalid) as caught:
        user_token(running[1] / "t" / "s", "a b")
    assert caught.value.reason == "invalid_name"


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="does not answer"):
        user_token(tmp_path / "none", "alice")
