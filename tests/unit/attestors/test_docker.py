"""What the docker attestor says of a container, against a runtime that answers well or badly."""

import asyncio
import json
import os
import socket
import time
from contextlib import suppress
from itertools import repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attestors.workload import docker as module
from attestors.workload.docker import DockerAttestor, DockerSettings
from broker.attestation.contract import AttestorFailed
from broker.attestation.process import Process
from broker.attestation.runtime_socket import MAX_ANSWER
from broker.attestation.strength import Strengths
from broker.spiffe import Selector
from tests.fakes.runtime import IMAGE, FakeMachine, FakeRuntime, answer, chunked, inspected

ID, OTHER = "0123456789abcdef" * 4, "fedcba9876543210" * 4
PLACE = f"/system.slice/docker-{ID}.scope"
DIGEST = f"docker:image_config_digest:sha256:{IMAGE}"
PLAIN = {"docker:image_id:probe:1", DIGEST}
SECRET = "API_KEY=hunter2-do-not-log"


@pytest.fixture
def runtime():
    with FakeRuntime() as fake:
        yield fake


@pytest.fixture
def machine(tmp_path) -> FakeMachine:
    made = FakeMachine(tmp_path / "cgroup")
    made.top.mkdir()
    return made


@pytest.fixture
def me():
    pidfd = os.pidfd_open(os.getpid())
    process = Process.open(pid=os.getpid(), uid=os.geteuid(), gid=os.getegid(), pidfd=pidfd)
    os.close(pidfd)
    yield process
    process.close()


class Case:
    """One attestor, one caller in one place, one runtime."""

    def __init__(self, runtime: FakeRuntime, machine: FakeMachine, me: Process) -> None:
        self.runtime, self.machine, self.me = runtime, machine, me
        self.runs()

    def runs(self, **config: object) -> None:
        self.runtime.containers[ID] = inspected(ID, pid=os.getpid(), **config)

    def attestor(self, **settings: object) -> DockerAttestor:
        return DockerAttestor(
            DockerSettings(**{"docker_socket_path": self.runtime.url, **settings}), self.machine.node()
        )

    async def selectors(self, place: str = PLACE, **settings: object) -> set[str]:
        found = await self.attestor(**settings).attest(self.machine.put(self.me, place))
        return {str(one) for one in found}

    async def refusal(self, place: str = PLACE, **settings: object) -> str:
        with pytest.raises(AttestorFailed) as refused:
            await self.selectors(place, **settings)
        told = f"{refused.value} {refused.value.hint} {refused.value!r} {refused.value.__cause__!r}"
        assert "hunter2" not in told
        return refused.value.reason


@pytest.fixture
def case(runtime, machine, me) -> Case:
    return Case(runtime, machine, me)


async def test_selectors_are_spires(case) -> None:
    case.runs(
        Image="registry.example/orders:1.2",
        Labels={"app": "orders", "tier": "", "a.b/c": "x:y=z"},
        Env=["A=b:c", "EMPTY=", "BARE"],
    )
    assert await case.selectors() == {
        "docker:label:app:orders",
        "docker:label:tier:",
        "docker:label:a.b/c:x:y=z",
        "docker:env:A=b:c",
        "docker:env:EMPTY=",
        "docker:env:BARE",
        "docker:image_id:registry.example/orders:1.2",
        DIGEST,
    }
    assert case.runtime.requests == [f"/containers/{ID}/json", f"/images/sha256:{IMAGE}/json"]


async def test_a_container_that_declares_nothing(case) -> None:
    case.runs(Labels=None, Env=None, Image="")
    assert await case.selectors() == {DIGEST}
    del case.runtime.containers[ID]["Config"]["Labels"], case.runtime.containers[ID]["Config"]["Env"]
    assert await case.selectors() == {DIGEST}


async def test_one_question_each_and_an_image_only_once(case) -> None:
    attestor = case.attestor()
    process = case.machine.put(case.me, PLACE)
    assert await attestor.attest(process) == await attestor.attest(process)
    assert case.runtime.requests == [f"/containers/{ID}/json", f"/images/sha256:{IMAGE}/json", f"/containers/{ID}/json"]


async def test_remembered_images_are_bounded(case, monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_IMAGES", 2)
    attestor = case.attestor()
    for letter in "abca":
        case.runtime.images[letter * 64] = {"Id": letter * 64}  # as older Podman writes it
        case.runtime.containers[ID]["Image"] = letter * 64
        found = await attestor.attest(case.machine.put(case.me, PLACE))
        assert f"docker:image_config_digest:sha256:{letter * 64}" in {str(one) for one in found}
    assert [path[15] for path in case.runtime.requests if "images" in path] == list("abca")


async def test_one_runtime_does_not_speak_of_anothers_images(case) -> None:
    with FakeRuntime() as podman:
        case.runs(Labels={"app": "orders"})
        podman.containers[ID] = case.runtime.containers[ID]
        podman.images[IMAGE] = {"Id": f"sha256:{IMAGE}", "Config": {"Labels": {"app": "orders"}}}
        attestor = case.attestor(podman_socket_path=podman.url)
        theirs = await attestor.attest(case.machine.put(case.me, f"/machine.slice/libpod-{ID}.scope"))
        ours = await attestor.attest(case.machine.put(case.me, PLACE))
    assert {str(one) for one in theirs} == PLAIN
    assert {str(one) for one in ours} == {"docker:label:app:orders"} | PLAIN


async def test_the_version_that_is_asked_for(case) -> None:
    assert await case.selectors(docker_version="1.43") == PLAIN
    assert case.runtime.requests[0] == f"/v1.43/containers/{ID}/json"


async def test_a_process_in_no_container_costs_no_question(case) -> None:
    for place in ("/", "/user.slice/user-1000.slice/session-1.scope", f"/machine.slice/libpod-conmon-{ID}.scope"):
        assert await case.selectors(place) == set()
    assert case.runtime.requests == []


@pytest.mark.parametrize(
    "place",
    [
        f"/kubepods.slice/kubepods-podx.slice/cri-containerd-{ID}.scope",
        f"/system.slice/crio-{ID}.scope",
        f"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope",
        f"/user.slice/user-1000.slice/user@1000.service/user.slice/docker-{ID}.scope",
    ],
)
async def test_other_runtimes_containers_are_not_mine(case, place: str) -> None:
    assert await case.selectors(place) == set()
    assert case.runtime.requests == []


async def test_a_runtime_without_a_path_is_not_served(case) -> None:
    assert await case.selectors(f"/machine.slice/libpod-{ID}.scope", podman_socket_path="") == set()
    assert await case.selectors(docker_socket_path="") == set()


async def test_podman_is_asked_for_podmans(case) -> None:
    place = f"/machine.slice/libpod-{ID}.scope/container"
    assert (
        await case.selectors(place, docker_socket_path="unix:///nowhere", podman_socket_path=case.runtime.url) == PLAIN
    )


async def test_a_place_shared_with_other_runtimes(case) -> None:
    place = f"/kubepods/burstable/pod00000000-1111-2222-3333-444444444444/{ID}"
    assert await case.selectors(place) == PLAIN
    case.runtime.containers.clear()
    assert await case.selectors(place) == set()
    assert await case.refusal() == "container_unknown"


async def test_an_operators_own_place(case) -> None:
    place = f"/build.farm/7/{ID}"
    assert await case.refusal(place) == "container_not_anchored"
    assert await case.selectors(place, container_id_cgroup_matchers=["/build.farm/*/<id>"]) == PLAIN


async def test_rootless_podman_only_where_it_is_switched_on(case, tmp_path) -> None:
    uid = os.geteuid()
    place = f"/user.slice/user-{uid}.slice/user@{uid}.service/user.slice/libpod-{ID}.scope"
    directory = case.runtime.path.parent / str(uid)
    directory.mkdir()
    case.runtime.path.rename(directory / "s")
    template = f"unix://{case.runtime.path.parent}/%d/s"
    assert await case.selectors(place, podman_socket_path_template=template) == set()
    assert await case.selectors(place, podman_socket_path_template=template, use_rootless_podman=True) == PLAIN
    # A user's own Docker is asked by nobody.
    place = place.replace("libpod-", "docker-")
    assert await case.selectors(place, podman_socket_path_template=template, use_rootless_podman=True) == set()


# --- whose labels count


@pytest.mark.bears("A18")
async def test_what_the_image_carries_does_not_count(case) -> None:
    case.runtime.images[IMAGE]["Config"] = {
        "Labels": {"app": "payments", "tier": "dev"},
        "Env": ["ROLE=payments", "PATH=/bin"],
    }
    case.runs(Labels={"app": "payments", "tier": "prod", "run": "1"}, Env=["ROLE=payments", "PATH=/bin", "MINE=1"])
    assert await case.selectors() == {"docker:label:tier:prod", "docker:label:run:1", "docker:env:MINE=1"} | PLAIN
    assert await case.selectors(require_runtime_label=False) == {
        "docker:label:app:payments", "docker:label:tier:prod", "docker:label:run:1", "docker:env:MINE=1",
    } | PLAIN  # fmt: skip
    assert {"docker:env:ROLE=payments", "docker:env:PATH=/bin"} <= await case.selectors(require_runtime_env=False)


@pytest.mark.bears("A18")
async def test_only_labels_with_a_reserved_prefix(case) -> None:
    case.runs(Labels={"app": "payments", "com.example.id": "orders", "com.examples": "x", "id": "y"}, Env=["A=1"])
    found = await case.selectors(trusted_label_prefixes=["com.example.", "id"])
    assert found == {"docker:label:com.example.id:orders", "docker:label:id:y", "docker:env:A=1"} | PLAIN
    assert await case.selectors(trusted_label_prefixes=[]) == {"docker:env:A=1"} | PLAIN


@pytest.mark.bears("A18")
async def test_only_the_image_by_its_content(case) -> None:
    case.runs(Labels={"app": "payments"}, Env=["A=1"])
    assert await case.selectors(trusted_kinds=["image_config_digest"]) == {DIGEST}
    assert await case.selectors(trusted_kinds=["label", "image_config_digest"]) == {"docker:label:app:payments", DIGEST}


@pytest.mark.bears("A18")
@pytest.mark.parametrize(
    ("settings", "weak"),
    [
        ({}, set()),
        ({"require_runtime_label": False}, {"label"}),
        ({"require_runtime_env": False}, {"env"}),
        ({"use_rootless_podman": True}, {"label", "env", "image_id", "image_config_digest"}),
    ],
)
def test_who_stands_behind_a_selector_follows_from_the_settings(case, settings: dict, weak: set) -> None:
    strengths = Strengths.of_attestors([case.attestor(**settings)])
    examples = ("label:app:x", "env:A=1", "image_id:x", f"image_config_digest:sha256:{IMAGE}")
    vouched = {one.partition(":")[0]: strengths.is_vouched(Selector(f"docker:{one}")) for one in examples}
    assert {kind for kind, is_vouched in vouched.items() if not is_vouched} == weak


def test_a_kind_that_is_not_given_is_not_documented(case) -> None:
    (doc,) = case.attestor(trusted_kinds=["image_config_digest"]).selectors
    assert doc.form == "docker:image_config_digest:<sha256:hex>"


@pytest.mark.bears("A17")
async def test_no_two_labels_are_one_selector(case) -> None:
    case.runs(
        Labels={"a": "b:c", "a:b": "c", "a:": "c", "app:tier": "x", "": "x", "unix": "uid:0", "A": "b", "а": "cyrillic"}
    )
    found = await case.selectors() - PLAIN
    assert found == {"docker:label:a:b:c", "docker:label:unix:uid:0", "docker:label:A:b", "docker:label:а:cyrillic"}


@pytest.mark.bears("A17")
async def test_values_that_are_no_selectors_give_none(case) -> None:
    case.runs(
        Labels={"long": "x" * 65536, "line": "a\nb", "k\ney": "v", "ok": "é", "esc": "\x1b[2J"},
        Env=["BAD=\x00", "", "OK=ü"],
    )
    assert await case.selectors() - PLAIN == {"docker:label:ok:é", "docker:env:OK=ü"}


async def test_the_environment_stands_in_no_message(case, caplog) -> None:
    caplog.set_level(1)
    case.runs(Env=[SECRET])
    assert f"docker:env:{SECRET}" in await case.selectors()
    case.runtime.containers[ID]["Config"]["Env"] = [SECRET, 5]
    assert await case.refusal() == "runtime_answer"
    case.runtime.fault(answer(b'{"Config":{"Env":["' + SECRET.encode()))
    assert await case.refusal() == "runtime_answer"
    case.runtime.fault(SECRET.encode() + b"\r\n\r\n")
    assert await case.refusal() == "runtime_unreachable"
    assert "hunter2" not in caplog.text
    assert "hunter2" not in repr(module._Declared(Env=[SECRET], Labels={"a": SECRET}))


# --- a runtime that answers badly


def _json(**changes: object) -> bytes:
    return json.dumps({**inspected(ID, pid=os.getpid()), **changes}).encode()


GOOD = _json()
BAD_ANSWERS = {
    "500": (answer(b'{"message":"oops"}', "500 Internal Server Error"), "runtime_answer"),
    "404": (answer(b'{"message":"No such container"}', "404 Not Found"), "container_unknown"),
    "301": (b"HTTP/1.1 301 Moved\r\nLocation: http://127.0.0.1/\r\nContent-Length: 0\r\n\r\n", "runtime_answer"),
    "204": (b"HTTP/1.1 204 No Content\r\n\r\n", "runtime_answer"),
    "nothing": (b"", "runtime_unreachable"),
    "not HTTP": (b"SSH-2.0-x\r\n\r\n", "runtime_unreachable"),
    "cut short": (answer(GOOD)[:-40], "runtime_unreachable"),
    "cut short between chunks": (chunked(GOOD)[:-80], "runtime_unreachable"),
    "half JSON": (answer(GOOD[: len(GOOD) // 2]), "runtime_answer"),
    "half JSON without a length": (b"HTTP/1.0 200 OK\r\n\r\n" + GOOD[:-1], "runtime_answer"),
    "too long": (answer(GOOD + b" " * MAX_ANSWER), "runtime_answer"),
    "length that lies": (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n" + GOOD, "runtime_unreachable"),
    "chunk that lies": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffff\r\n" + GOOD, "runtime_unreachable"),
    "bad chunk": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" + GOOD, "runtime_unreachable"),
    "headers for ever": (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n" + GOOD, "runtime_unreachable"),
    "name twice": (answer(GOOD[:-1] + b',"Id":"' + ID.encode() + b'"}'), "runtime_answer"),
    "NaN": (answer(GOOD[:-1] + b',"x":NaN}'), "runtime_answer"),
    "not UTF-8": (answer(GOOD[:-1] + b',"x":"\xff"}'), "runtime_answer"),
    "deep": (answer(GOOD[:-1] + b',"x":' + b"[" * 100 + b"]" * 100 + b"}"), "runtime_answer"),
    "list": (answer(b"[" + GOOD + b"]"), "runtime_answer"),
    "another container": (answer(_json(Id=OTHER)), "runtime_answer"),
    "a short id": (answer(_json(Id=ID[:12])), "runtime_answer"),
    "no id": (answer(_json(Id=None)), "runtime_answer"),
    "no state": (answer(_json(State=None)), "runtime_answer"),
    "running as text": (answer(_json(State={"Running": "true", "Pid": os.getpid()})), "runtime_answer"),
    "pid as text": (answer(_json(State={"Running": True, "Pid": str(os.getpid())})), "runtime_answer"),
    "pid true": (answer(_json(State={"Running": True, "Pid": True})), "runtime_answer"),
    "not running": (answer(_json(State={"Running": False, "Pid": os.getpid()})), "container_not_running"),
    "pid 0": (answer(_json(State={"Running": True, "Pid": 0})), "container_not_running"),
    "pid below 0": (answer(_json(State={"Running": True, "Pid": -1})), "container_not_running"),
    "pid that is gone": (answer(_json(State={"Running": True, "Pid": 2**22 + 1})), "container_mismatch"),
    "pid of another control group": (answer(_json(State={"Running": True, "Pid": 1})), "container_mismatch"),
    "image by name": (answer(_json(Image="probe:1")), "runtime_answer"),
    "image with a path": (answer(_json(Image="sha256:../../containers/x")), "runtime_answer"),
    "labels as list": (answer(_json(Config={"Labels": ["a=b"]})), "runtime_answer"),
    "label that is a number": (answer(_json(Config={"Labels": {"a": 5}})), "runtime_answer"),
}  # fmt: skip


@pytest.mark.bears("A16")
@pytest.mark.parametrize("fault", BAD_ANSWERS)
async def test_a_bad_answer_refuses_the_caller(case, fault: str) -> None:
    case.machine.members[1] = f"/system.slice/docker-{OTHER}.scope"
    raw, reason = BAD_ANSWERS[fault]
    case.runtime.fault(raw)
    assert await case.refusal() == reason
    # Nobody else is hurt, and nothing of it stays.
    assert await case.selectors("/user.slice") == set()
    case.runtime.faults.clear()
    assert await case.selectors() == PLAIN


@pytest.mark.bears("A16")
@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (answer(b"{}", "404 Not Found"), "image_unknown"),
        (answer(b"{}"), "runtime_answer"),
        (answer(json.dumps({"Id": f"sha256:{OTHER}"}).encode()), "runtime_answer"),
        (answer(json.dumps({"Id": f"sha256:{IMAGE}", "Config": {"Labels": 1}}).encode()), "runtime_answer"),
    ],
)
async def test_a_bad_answer_about_the_image_refuses_the_caller(case, raw: bytes, reason: str) -> None:
    case.runtime.fault(raw, "/images/")
    assert await case.refusal() == reason


@pytest.mark.parametrize(
    "raw",
    [
        chunked(GOOD, 1),
        b"HTTP/1.0 200 OK\r\n\r\n" + GOOD,
        b"HTTP/1.1 100 Continue\r\n\r\n" + answer(GOOD),
        answer(GOOD) + b"more",
        answer(GOOD[:-1] + b',"x":"' + b"y" * (MAX_ANSWER - len(GOOD) - 7) + b'"}'),
    ],
    ids=["chunks", "until the end", "continue", "more behind it", "at the limit"],
)
async def test_forms_of_a_good_answer(case, raw: bytes) -> None:
    case.runtime.fault(raw)
    assert await case.selectors() == PLAIN


@pytest.mark.bears("A16")
@pytest.mark.parametrize("path", ["/containers/", "/images/"])
async def test_a_silent_runtime_refuses_only_its_own(case, monkeypatch, path: str) -> None:
    monkeypatch.setattr(module, "ATTEST_TIMEOUT", 0.2)
    case.runtime.hang(path)
    attestor = case.attestor()
    process, bystander = case.machine.put(case.me, PLACE), case.machine.put(case.me, "/user.slice")
    case.machine.put(case.me, PLACE)
    waiting = asyncio.gather(*(attestor.attest(process) for _ in range(6)), return_exceptions=True)
    await asyncio.sleep(0)
    assert await asyncio.wait_for(attestor.attest(bystander), 3.0) == frozenset()
    assert {error.reason for error in await waiting} == {"attestor_timeout"}
    case.runtime.faults.clear()
    # Who waited has let go: there is room at once.
    monkeypatch.setattr(module, "ATTEST_TIMEOUT", 4.0)
    assert {str(one) for one in await attestor.attest(process)} == PLAIN


@pytest.mark.bears("A16")
async def test_a_runtime_that_drips_is_late(case, monkeypatch) -> None:
    monkeypatch.setattr(module, "ATTEST_TIMEOUT", 0.3)
    case.runtime.drip(iter([b"HTTP/1.1 200 OK\r\n\r\n", *repeat(b" ", 1000)]), 0.02)
    started = time.monotonic()
    assert await case.refusal() == "attestor_timeout"
    assert time.monotonic() - started < 15


def test_the_time_limit_is_short_enough() -> None:
    assert module.ATTEST_TIMEOUT <= 5


@pytest.mark.bears("A16")
@pytest.mark.parametrize("kind", ["missing", "symlink", "file", "directory", "nobody listens"])
async def test_a_socket_that_is_not_the_runtimes(case, kind: str) -> None:
    path = case.runtime.path.parent / "other"
    if kind == "symlink":
        path.symlink_to(case.runtime.path)
    elif kind == "file":
        path.touch()
    elif kind == "directory":
        path.mkdir()
    elif kind == "nobody listens":
        with socket.socket(socket.AF_UNIX) as left_over:
            left_over.bind(str(path))
    wanted = "runtime_unreachable" if kind in {"missing", "nobody listens"} else "runtime_not_trusted"
    assert await case.refusal(docker_socket_path=f"unix://{path}") == wanted
    assert case.runtime.requests == []


@pytest.mark.root("another user's socket")
@pytest.mark.bears("A16")
async def test_a_socket_of_another_user(case) -> None:
    os.chown(case.runtime.path, 4002, 4002)
    assert await case.refusal() == "runtime_not_trusted"
    assert case.runtime.requests == []


@pytest.mark.root("another user's server")
@pytest.mark.bears("A16")
async def test_a_socket_that_another_user_serves(case) -> None:
    path = case.runtime.path.parent / "other"
    case.runtime.path.parent.chmod(0o777)
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.setuid(4002)
        served = socket.socket(socket.AF_UNIX)
        served.bind(str(path))
        served.listen()
        os.write(told, b".")
        os.read(os.pipe()[0], 1)
        os._exit(0)
    try:
        os.read(ready, 1)
        os.chown(path, 0, 0)
        assert await case.refusal(docker_socket_path=f"unix://{path}") == "runtime_not_trusted"
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(told)


@pytest.mark.bears("A15")
async def test_a_container_on_a_users_path_costs_no_question(case) -> None:
    case.machine.make(PLACE).chmod(0o777)
    process = case.machine.put(case.me, PLACE)
    (case.machine.top / PLACE[1:]).chmod(0o777)
    with pytest.raises(AttestorFailed) as refused:
        await case.attestor().attest(process)
    assert refused.value.reason == "container_not_anchored"
    assert case.runtime.requests == []


# --- any answer


@given(
    st.one_of(
        st.binary(max_size=300),
        st.tuples(st.integers(0, len(GOOD)), st.binary(max_size=4)).map(
            lambda at: GOOD[: at[0]] + at[1] + GOOD[at[0] :]
        ),
    )
)
def test_any_body_is_read_or_refused(body: bytes) -> None:
    with suppress(AttestorFailed):
        module._read(module._Inspected, body)
