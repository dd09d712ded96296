"""``broker svid watch``, ``mint`` and the credential helpers: a real server, a real node agent, real readers of the files."""

import base64
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import pytest
from cryptography import x509

from tests.fakes.programs import Programs, programs, wait_for

pytestmark = pytest.mark.timeout(240)
ME = "spiffe://example.org/reader"
AUDIENCE = "https://vault.example.org"


@pytest.fixture(scope="module")
def estate() -> Iterator[Programs]:
    with programs() as made:
        made.start_server()
        made.start_agent("a", first_identity_wait="300ms")
        made.environment["SPIFFE_ENDPOINT_SOCKET"] = f"unix://{made.agent_socket('a')}"
        yield made


@pytest.fixture(scope="module")
def node(estate: Programs) -> str:
    return str(estate.json("agent", "list")["items"][0]["spiffe_id"])


def register(estate: Programs, node: str, spiffe_id: str, *more: str) -> str:
    made = estate.json(
        "entry", "create", "--spiffe-id", spiffe_id, "--parent-id", node, "--selector", f"unix:uid:{os.geteuid()}", *more
    )  # fmt: skip
    return str(made["id"])


@pytest.fixture(scope="module", autouse=True)
def identity(estate: Programs, node: str) -> str:
    return register(estate, node, ME, "--hint", "main")


@contextmanager
def watching(estate: Programs, directory: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    log = directory.parent / f"{directory.name}.log"
    with log.open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "broker.cli.main", "svid", "watch", "--dir", str(directory), *options],
            stdout=said, stderr=said, text=True, env=estate.environment,
        )  # fmt: skip
    try:
        yield process
    except BaseException:
        print(log.read_text())
        raise
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(30)


def mode(path: Path) -> int:
    assert not path.is_symlink()
    return path.stat().st_mode & 0o777


def leaf(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificates(path.read_bytes())[0]


def is_pair(directory: Path) -> bool:
    """Whether TLS takes certificate and key as one: what a reader of the files does."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(directory / "svid.pem", directory / "svid_key.pem")
    except (ssl.SSLError, FileNotFoundError):
        return False
    return True


def claims(token: str) -> dict[str, object]:
    part = token.split(".")[1]
    found: dict[str, object] = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return found


# ---- once


def test_once_writes_every_kind_and_ends(estate: Programs, tmp_path: Path) -> None:
    here = tmp_path / "certs"
    answer = estate.json(
        "svid", "watch", "--dir", str(here), "--once", "--hint", "main",
        "--jwt-svid", "token", AUDIENCE, "--jwt-svid", "token", "second", "--jwt-bundle-file", "jwt_bundle.json",
        "--key-mode", "0640",
    )  # fmt: skip
    files = {Path(name).name: Path(name) for name in answer["files"]}
    assert (
        set(files)
        == {"svid.pem", "svid_key.pem", "svid_bundle.pem", "token", "jwt_bundle.json"}
        == set(os.listdir(here))
    )
    assert {name: mode(path) for name, path in files.items()} == {
        "svid.pem": 0o644, "svid_key.pem": 0o640, "svid_bundle.pem": 0o644, "token": 0o600, "jwt_bundle.json": 0o600,
    }  # fmt: skip
    assert is_pair(here)
    assert mode(here) == 0o700
    token = files["token"].read_text()
    assert (claims(token)["sub"], claims(token)["aud"]) == (ME, [AUDIENCE, "second"])
    bundles = json.loads(files["jwt_bundle.json"].read_text())
    assert list(bundles) == ["example.org"]
    keys = json.loads(base64.b64decode(bundles["example.org"]))["keys"]
    assert json.loads(base64.urlsafe_b64decode(token.split(".")[0] + "=="))["kid"] in [key["kid"] for key in keys]
    openssl = ["openssl", "verify", "-x509_strict", "-CAfile", str(files["svid_bundle.pem"]), str(files["svid.pem"])]
    assert subprocess.run(openssl, capture_output=True, check=False).returncode == 0


def test_once_says_why_not(estate: Programs, tmp_path: Path) -> None:
    here = str(tmp_path / "certs")
    error = estate.error("svid", "watch", "--dir", here, "--once", "--hint", "none such", code=4)
    assert error["code"] == "no_identity_issued"
    assert (
        estate.error("svid", "watch", "--dir", here, "--once", "--socket", "/nonexistent", code=75)["code"]
        == "no_socket"
    )
    assert os.listdir(here) == []
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "link").symlink_to(elsewhere)
    link = str(tmp_path / "link")
    assert estate.error("svid", "watch", "--dir", link, "--once", code=78)["code"] == "files_not_written"


def test_links_are_replaced_and_never_followed(estate: Programs, tmp_path: Path) -> None:
    here, victim = tmp_path / "certs", tmp_path / "victim"
    here.mkdir()
    victim.write_text("mine")
    for name in ("svid.pem", "svid_key.pem", "svid_bundle.pem"):
        (here / name).symlink_to(victim)
    (here / f".svid_key.pem.{'0' * 16}.new").write_text("left by one that was killed")
    estate.run("svid", "watch", "--dir", str(here), "--once")
    assert victim.read_text() == "mine"
    assert is_pair(here)
    assert sorted(os.listdir(here)) == ["svid.pem", "svid_bundle.pem", "svid_key.pem"]


# ---- kept


def test_a_renewal_reaches_files_program_pid_file_and_command(estate: Programs, node: str, tmp_path: Path) -> None:
    """The SVID lives some seconds: it is renewed at half of that, under a program that reads it."""
    short = register(estate, node, f"{ME}/short", "--x509-svid-ttl", "8s", "--jwt-svid-ttl", "8s", "--hint", "short")
    here, told = tmp_path / "certs", tmp_path / "told"
    program = tmp_path / "program.sh"
    program.write_text(f"#!/bin/sh\ntrap 'echo usr1 >> {told}' USR1\necho up >> {told}\nwhile :; do sleep 0.05; done\n")
    program.chmod(0o755)
    other = subprocess.Popen(["/bin/sh", "-c", f"trap 'echo hup >> {told}' HUP USR1; while :; do sleep 0.05; done"])
    (tmp_path / "pid").write_text(f"{other.pid}\n")
    each = tmp_path / "each.sh"
    each.write_text(f'#!/bin/sh\ntest -f "$1/svid_key.pem" && echo "each $2" >> {told}\n')
    each.chmod(0o755)
    probe = socket.socket()
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
    probe.close()
    try:
        with watching(
            estate, here, "--hint", "short", "--renew-signal", "SIGUSR1", "--pid-file", str(tmp_path / "pid"),
            "--exec", f"{each} {here} 'one word'", "--jwt-svid", "token", AUDIENCE, "--health", str(port),
            "--", str(program),
        ) as process:  # fmt: skip
            wait_for(lambda: told.exists() and "up" in told.read_text(), "the start of the program")
            assert is_pair(here)
            first, token = leaf(here / "svid.pem").serial_number, (here / "token").read_text()
            wait_for(lambda: leaf(here / "svid.pem").serial_number != first and is_pair(here), "the renewal")
            wait_for(lambda: "usr1" in told.read_text(), "the signal to the program")
            wait_for(lambda: "hup" in told.read_text(), "the signal by the pid file")
            wait_for(lambda: told.read_text().count("each one word") >= 2, "the command after the change")
            wait_for(lambda: (here / "token").read_text() != token, "the renewal of the token")
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=30) as ready:
                assert json.load(ready) == {"status": "ok"}
            assert told.read_text().splitlines().count("up") == 1
            process.terminate()
            assert process.wait(30) == 0
        wait_for(lambda: "program.sh" not in running_commands(), "the end of the program")
    finally:
        other.kill()
        other.wait()
        estate.run("entry", "delete", short, "--yes")


def running_commands() -> str:
    found = ""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += path.read_text()
        except OSError:
            continue
    return found


def test_the_program_s_end_is_the_end(estate: Programs, tmp_path: Path) -> None:
    for script, code in (("exit 7", 7), ("kill -9 $$", 137)):
        with watching(estate, tmp_path / "certs", "--", "/bin/sh", "-c", script) as process:
            assert process.wait(60) == code
    with watching(estate, tmp_path / "certs", "--", "/nonexistent/program") as process:
        assert process.wait(60) == 2


def test_interrupted(estate: Programs, tmp_path: Path) -> None:
    with watching(estate, tmp_path / "certs") as process:
        wait_for(lambda: is_pair(tmp_path / "certs"))
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130


def test_what_is_withdrawn_stays_or_goes_and_comes_back(estate: Programs, node: str, tmp_path: Path) -> None:
    keep, drop = tmp_path / "keep", tmp_path / "drop"
    entry = register(estate, node, f"{ME}/brief", "--hint", "brief")
    drop_log = tmp_path / "drop.log"
    with (
        watching(estate, keep, "--hint", "brief") as keeps,
        watching(estate, drop, "--hint", "brief", "--remove-withdrawn", "--jwt-svid", "t", AUDIENCE) as drops,
    ):
        wait_for(lambda: is_pair(keep) and is_pair(drop))
        estate.run("entry", "delete", entry, "--yes")
        wait_for(lambda: not (drop / "svid_key.pem").exists() and not (drop / "svid.pem").exists(), "the removal")
        assert (drop / "svid_bundle.pem").exists()
        assert "removed what was secret" in drop_log.read_text()
        wait_for(lambda: "trying again" in (tmp_path / "keep.log").read_text())
        assert is_pair(keep)
        entry = register(estate, node, f"{ME}/brief", "--hint", "brief")
        wait_for(lambda: is_pair(drop), "the return")
        assert keeps.poll() is None
        assert drops.poll() is None
    estate.run("entry", "delete", entry, "--yes")


def test_it_may_be_there_before_the_agent(estate: Programs, tmp_path: Path) -> None:
    """And what probes see meanwhile."""
    later = tmp_path / "later.sock"
    here = tmp_path / "certs"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with watching(estate, here, "--socket", str(later), "--health", str(port)) as process:
        wait_for(lambda: "trying again" in (tmp_path / "certs.log").read_text())
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=30)
        assert refused.value.code == 503
        assert "x509" in json.load(refused.value)["lacking"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/live", timeout=30) as live:
            assert live.status == 200
        later.symlink_to(estate.agent_socket("a"))
        wait_for(lambda: is_pair(here))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=30) as ready:
            assert ready.status == 200
        assert process.poll() is None


# ---- minted


def test_mint_x509(estate: Programs, tmp_path: Path) -> None:
    minted = f"{ME}/minted"
    answer = estate.json(
        "svid", "mint", "x509", "-spiffeID", minted, "-dns", "db.example.org", "-ttl", "5m", "-write", str(tmp_path / "m")
    )  # fmt: skip
    assert (answer["kind"], answer["spiffe_id"], answer["dns_names"]) == ("x509_svid", minted, ["db.example.org"])
    assert "PRIVATE KEY" not in json.dumps(answer)
    assert {path.name: mode(path) for path in (tmp_path / "m").iterdir()} == {
        "svid.pem": 0o644, "key.pem": 0o600, "bundle.pem": 0o644,
    }  # fmt: skip
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tmp_path / "m/svid.pem", tmp_path / "m/key.pem")
    life = leaf(tmp_path / "m/svid.pem")
    assert 240 < (life.not_valid_after_utc - life.not_valid_before_utc).total_seconds() < 420
    ended = estate.run("svid", "mint", "x509", "--spiffe-id", minted, "--ttl", "300d", "--write", str(tmp_path / "m"))
    assert "shorter than asked" in ended.stderr
    assert "next: " in ended.stderr
    dry = estate.run("svid", "mint", "x509", "--spiffe-id", minted, "--write", str(tmp_path / "no"), "--dry-run")
    assert "nothing was sent" in dry.stderr
    assert not (tmp_path / "no").exists()
    estate.error("svid", "mint", "x509", "--spiffe-id", "spiffe://else.test/x", "--write", str(tmp_path / "n"), code=2)


def test_mint_jwt(estate: Programs, tmp_path: Path) -> None:
    minted = f"{ME}/minted"
    token = estate.run("svid", "mint", "jwt", "-spiffeID", minted, "-audience", "a", "-ttl", "60s", "-q").stdout.strip()
    assert (claims(token)["sub"], claims(token)["aud"]) == (minted, ["a"])
    assert 60 <= int(str(claims(token)["exp"])) - int(str(claims(token)["iat"])) < 90  # back-dated
    assert estate.run("svid", "validate", "--audience", "a", token).returncode == 0
    written = tmp_path / "token"
    answer = estate.json("svid", "mint", "jwt", "--spiffe-id", minted, "--audience", "a", "--write", str(written))
    assert answer["files"] == [str(written)]
    assert "svid" not in answer
    assert mode(written) == 0o600
    assert claims(written.read_text())["sub"] == minted


# ---- as other programs' helpers


def helper(estate: Programs, form: str, *more: str, code: int = 0, **environment: str) -> dict[str, object]:
    """Run it as google-auth does: standard error goes into the same text, which must be one JSON object."""
    ended = subprocess.run(
        [sys.executable, "-m", "broker.cli.main", "svid", "jwt", "--audience", AUDIENCE, "--hint", "main",
         "--format", form, *more],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=60,
        env={**estate.environment, **environment},
    )  # fmt: skip
    assert ended.returncode == code, ended.stdout
    found: dict[str, object] = json.loads(ended.stdout)
    return found


def test_google_executable(estate: Programs) -> None:
    answer = helper(estate, "google-executable")
    token = str(answer.pop("id_token"))
    assert claims(token)["sub"] == ME
    assert answer == {
        "version": 1, "success": True, "token_type": "urn:ietf:params:oauth:token-type:id_token",
        "expiration_time": claims(token)["exp"],
    }  # fmt: skip
    kind = "urn:ietf:params:oauth:token-type:jwt"
    assert helper(estate, "google-executable", GOOGLE_EXTERNAL_ACCOUNT_TOKEN_TYPE=kind)["token_type"] == kind
    refused = helper(estate, "google-executable", "--spiffe-id", "spiffe://example.org/else", code=4)
    assert refused.pop("message")
    assert refused == {"version": 1, "success": False, "code": "no_identity_issued"}


def test_k8s_exec(estate: Programs) -> None:
    for version in ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1"):
        info = json.dumps({"apiVersion": version, "kind": "ExecCredential", "spec": {"interactive": False}})
        answer = helper(estate, "k8s-exec", KUBERNETES_EXEC_INFO=info)
        assert (answer["apiVersion"], answer["kind"]) == (version, "ExecCredential")
        status = answer["status"]
        assert isinstance(status, dict)
        assert set(status) == {"token", "expirationTimestamp"}
        assert status["expirationTimestamp"].endswith("Z")
        assert claims(status["token"])["sub"] == ME
    assert helper(estate, "k8s-exec")["apiVersion"] == "client.authentication.k8s.io/v1"
    ended = estate.broker(
        "svid", "jwt", "--audience", AUDIENCE, "--format", "k8s-exec", KUBERNETES_EXEC_INFO='{"apiVersion":"v1alpha1"}'
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "kubeconfig" in ended.stderr


class Sts(BaseHTTPRequestHandler):
    """AWS's token service, as far as the one call goes."""

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers["content-length"])).decode())
        good = claims(form["WebIdentityToken"][0])["sub"] == ME and form["RoleArn"][0].endswith("/reader")
        self.server.seen.append({name: value[0] for name, value in form.items()})
        body = (
            '<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">'
            "<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>ASIA1</AccessKeyId><SecretAccessKey>s+/</SecretAccessKey>"
            "<SessionToken>t==</SessionToken><Expiration>2030-01-01T00:00:00Z</Expiration></Credentials>"
            "</AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
            if good
            else "<ErrorResponse><Error><Code>AccessDenied</Code><Message>Not authorized</Message></Error></ErrorResponse>"
        )
        self.send_response(200 if good else 403)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def test_aws_credential_process(estate: Programs) -> None:
    with HTTPServer(("127.0.0.1", 0), Sts) as sts:
        sts.seen = []
        serving = threading.Thread(target=sts.serve_forever)
        serving.start()
        where = {"AWS_ENDPOINT_URL_STS": f"http://127.0.0.1:{sts.server_port}"}
        try:
            answer = helper(
                estate, "aws-credential-process", AWS_ROLE_ARN="arn:aws:iam::111122223333:role/reader", **where
            )
            assert answer == {
                "Version": 1, "AccessKeyId": "ASIA1", "SecretAccessKey": "s+/", "SessionToken": "t==",
                "Expiration": "2030-01-01T00:00:00Z",
            }  # fmt: skip
            assert sts.seen[0]["Action"] == "AssumeRoleWithWebIdentity"
            assert sts.seen[0]["RoleSessionName"] == "example.org-reader"
            assert claims(sts.seen[0]["WebIdentityToken"])["aud"] == [AUDIENCE]
            given = ("svid", "jwt", "--audience", AUDIENCE, "--hint", "main", "--format", "aws-credential-process")
            refused = estate.broker(*given, AWS_ROLE_ARN="arn:aws:iam::111122223333:role/other", **where)
            assert (refused.returncode, refused.stdout) == (4, "")
            assert "AccessDenied" in refused.stderr
            assert estate.broker(*given, **where).returncode == 2
        finally:
            sts.shutdown()
            serving.join()
