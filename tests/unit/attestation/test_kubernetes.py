"""The client of kubelets and API servers: whom it believes, what it sends, and when it stops."""

import time

import pytest

from broker.attestation import kubernetes
from broker.attestation.kubernetes import (
    Fault,
    NotFound,
    Server,
    Surroundings,
    bearer,
    is_host,
    present,
    read_file,
    reading_credentials,
    trusting,
    trusting_anybody,
    trusting_the_public,
)
from broker.attestation.pods import KubernetesObject
from broker.attestation.reads import Deadline
from broker.clock import SystemClock
from broker.errors import Invalid
from tests.fakes.kubelet import TOKEN, FakeAuthority, FakeKubernetes


class Thing(KubernetesObject):
    kind: str
    names: tuple[str, ...] | list[str] = ()


@pytest.fixture
def kube(tmp_path):
    with FakeKubernetes(tmp_path / "account") as fake:
        fake.things = {"/thing": {"kind": "Thing", "names": [f"name-{number}" for number in range(1000)]}}
        yield fake


def server(kube: FakeKubernetes, **changes: object) -> Server:
    given = {
        "host": "localhost",
        "port": kube.port,
        "context": trusting(kube.authority.path.read_bytes()),
        "token": TOKEN.encode(),
        "max_answer": 1 << 20,
    }
    return Server(**(given | changes))


def within(seconds: float, abandoned=lambda: False) -> Deadline:
    return Deadline(SystemClock().monotonic() + seconds, abandoned)


def fault(asked: Server, path: str = "/thing", seconds: float = 10) -> Fault:
    with pytest.raises(Fault) as raised:
        asked.ask(Thing, path, within(seconds))
    told = f"{raised.value} {raised.value.what} {raised.value.hint} {raised.value.__cause__!r}"
    assert TOKEN not in told and "name-" not in told
    return raised.value


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_thing_is_read_whole(kube, is_chunked) -> None:
    kube.is_chunked = is_chunked
    assert len(server(kube).ask(Thing, "/thing", within(10)).names) == 1000


def test_a_question_is_posted(kube) -> None:
    class Review(KubernetesObject):
        kind: str
        spec: dict[str, str]

    path = "/apis/authentication.k8s.io/v1/tokenreviews"
    kube.things = {}
    answer = server(kube).ask(Review, path, within(10), {"spec": {"token": "\u00e9\r\nX: y"}})
    assert answer.spec == {"token": "\u00e9\r\nX: y"} and kube.requests == [path]


def test_what_is_not_there(kube) -> None:
    with pytest.raises(NotFound):
        server(kube).ask(Thing, "/nothing", within(10))


@pytest.mark.bears("A16")
@pytest.mark.parametrize(
    "broken", ["status", "redirect", "cut", "cut-chunk", "garbage", "duplicate", "not-http", "huge"]
)
def test_an_answer_that_is_not_one(kube, broken) -> None:
    kube.fault, kube.is_chunked = broken, broken == "cut-chunk"
    assert fault(server(kube, max_answer=1 << 16)).kind == "answer"
    assert kube.requests == ["/thing"]  # no redirect is followed


def test_an_answer_of_another_kind(kube) -> None:
    kube.things["/thing"] = {"kind": 7}
    assert fault(server(kube)).kind == "answer"


def test_a_budget_holds_to_the_byte(kube) -> None:
    kube.things["/thing"] = {"kind": "x" * 5000}
    assert server(kube, max_answer=5013).ask(Thing, "/thing", within(10)).kind == "x" * 5000
    assert fault(server(kube, max_answer=5010)).kind == "answer"


@pytest.mark.parametrize("broken", ["hang", "slow"])
def test_it_stops_in_time(kube, broken) -> None:
    kube.fault = broken
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        server(kube).ask(Thing, "/thing", within(0.2))
    assert time.monotonic() - began < 20


def test_it_stops_when_nobody_waits(kube) -> None:
    kube.fault = "slow"
    with pytest.raises(TimeoutError):
        server(kube).ask(Thing, "/thing", within(30, lambda: bool(kube.requests)))


def test_whom_it_believes(kube, tmp_path) -> None:
    other = trusting(FakeAuthority(tmp_path / "other").path.read_bytes())
    assert fault(server(kube, context=other)).kind == "untrusted"
    assert fault(server(kube, context=trusting_the_public())).kind == "untrusted"
    assert fault(server(kube, host="127.0.0.1")).kind == "untrusted"
    assert kube.requests == []  # nobody of them got the token
    authorities = kube.authority.path.read_bytes()
    for believed in (
        {"host": "127.0.0.1", "context": trusting(authorities, by_name=False)},
        {"host": "127.0.0.1", "name": "localhost"},
        {"context": trusting_anybody()},
        {"context": trusting("# Beh\u00f6rde\n".encode() + authorities)},
    ):
        assert server(kube, **believed).ask(Thing, "/thing", within(10)).kind == "Thing"


def test_as_whom_it_asks(kube) -> None:
    assert fault(server(kube, token=b"another")).kind == "denied"
    assert fault(server(kube, token=None)).kind == "denied"
    certificate, key = (path.read_bytes() for path in kube.authority.leaf("us", "us"))
    kube.want_certificate()
    context = trusting(kube.authority.path.read_bytes())
    present(context, certificate, key)
    assert server(kube, context=context, token=None).ask(Thing, "/thing", within(10)).kind == "Thing"
    assert fault(server(kube, token=None)).kind in {"unreachable", "answer"}


def test_nobody_is_there(kube) -> None:
    assert fault(server(kube, port=1)).kind == "unreachable"


def test_our_own_pod(kube) -> None:
    account = kube.authority.directory
    here = Surroundings({"KUBERNETES_SERVICE_HOST": "localhost", "KUBERNETES_SERVICE_PORT": str(kube.port)}, account)
    assert here.api_server(1 << 20).ask(Thing, "/thing", within(10)).kind == "Thing"
    for spoil in (
        lambda: (account / "token").write_text("two\nlines"),
        (account / "token").unlink,
        lambda: ((account / "token").write_text(TOKEN), (account / "ca.crt").write_text("none"))[0],
    ):
        spoil()
        with pytest.raises(Fault) as raised:
            here.api_server(1 << 20)
        assert raised.value.kind == "credentials"
    for environ in (
        {},
        {"KUBERNETES_SERVICE_HOST": "a b", "KUBERNETES_SERVICE_PORT": "1"},
        {"KUBERNETES_SERVICE_HOST": "a"},
    ):
        with pytest.raises(Fault):
            Surroundings(environ, account).api_server(1 << 20)


def test_files_are_bounded(tmp_path, monkeypatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_file(path, 5) == b"12345"
    with pytest.raises(ValueError, match="too long"):
        read_file(path, 4)
    monkeypatch.setattr(kubernetes, "MAX_FILE", 4)
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "none")


@pytest.mark.parametrize("text", [b"", b" ", b"a b", b"a\r\nb", b"a\x00", b"\xe9"])
def test_what_is_no_bearer_token(text) -> None:
    with pytest.raises(ValueError, match="token"):
        bearer(text)
    assert bearer(b" a.b.c\n") == b"a.b.c"


def test_hosts() -> None:
    assert is_host("a-b.c") and is_host("10.0.0.1") and is_host("fd00::1")
    assert not any(is_host(text) for text in ("", "a b", "a/b", "a\r\nb", "a@b", "x" * 254))


@pytest.mark.parametrize("error", [OSError("hunter2"), ValueError("hunter2"), KeyError("hunter2"), Invalid("hunter2")])
def test_faults_quote_nothing(error) -> None:
    with pytest.raises(Fault) as raised, reading_credentials("do this"):
        raise error
    assert "hunter2" not in f"{raised.value} {raised.value.what}"
    assert (raised.value.kind, raised.value.hint, raised.value.__suppress_context__) == ("credentials", "do this", True)
