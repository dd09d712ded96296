"""The exec attestor with real programs: the protocol, the pin, the limits, and what a program inherits."""

import asyncio
import hashlib
import json
import os
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from pydantic import ValidationError

from attestors.workload.exec import MAX_ANSWER, MAX_SELECTORS, ExecAttestor, ExecSettings
from broker.attestation.catalogue import Catalogue, Offer
from broker.attestation.contract import AttestorFailed
from broker.attestation.testing import (
    WorkloadAttestorContract,
    check_cancelled,
    check_refuses,
    check_workload_attestor,
    ended_process,
    started_process,
)
from broker.errors import Misconfigured

OK = '{"version":1,"selectors":["team:blue"]}'


def pinned(path: Path, *args: str, name: str = "team", **more: object) -> dict[str, object]:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"name": name, "path": str(path), "args": list(args), "sha256": digest, **more}


def script(directory: Path, text: str, name: str = "team", **more: object) -> dict[str, object]:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    return pinned(path, name=name, **more)


def made(*programs: dict[str, object]) -> ExecAttestor:
    return ExecAttestor(ExecSettings.model_validate({"programs": list(programs)}))


async def says(*programs: dict[str, object]) -> set[str]:
    with started_process() as process:
        return set(map(str, await made(*programs).attest(process)))


async def refusal(*programs: dict[str, object]) -> AttestorFailed:
    with started_process() as process, pytest.raises(AttestorFailed) as refused:
        await made(*programs).attest(process)
    return refused.value


class TestContract(WorkloadAttestorContract):
    @pytest.fixture(autouse=True)
    def _program(self, tmp_path: Path) -> None:
        self.program = script(tmp_path, f"echo '{OK}'")

    def make_attestor(self) -> ExecAttestor:
        return made(self.program)


async def test_the_question_tells_the_process(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    program = script(tmp_path, f"cat >{seen}; echo '{OK}'")
    with started_process() as process:
        assert {str(one) for one in await made(program).attest(process)} == {"team:blue"}
        assert json.loads(seen.read_bytes()) == {
            "version": 1,
            "pid": process.pid,
            "uid": process.uid,
            "gid": process.gid,
            "groups": sorted(os.getgroups()),
            "start_time": process.facts.start_time,
            "exe": {"device": process.facts.exe.device, "inode": process.facts.exe.inode},
        }


async def test_a_shell_reads_the_question_as_a_line(tmp_path: Path) -> None:
    text = """read -r question || exit 1
pid=${question#*\\"pid\\":}; pid=${pid%%,*}
printf '{"version":1,"selectors":["team:%s"]}' "$pid" """
    with started_process() as process:
        assert {str(one) for one in await made(script(tmp_path, text)).attest(process)} == {f"team:{process.pid}"}


def test_an_attestor_documents_its_own_types(tmp_path: Path) -> None:
    attestor = made(script(tmp_path, "exit 3"), script(tmp_path, "exit 3", name="other", prefix="room"))
    assert [doc.form for doc in attestor.selectors] == ["team:<value>", "room:<value>"]
    assert [doc.form for doc in ExecAttestor.selectors] == ["<prefix>:<value>"]


async def test_not_mine_and_mine_with_nothing(tmp_path: Path) -> None:
    assert await says(script(tmp_path, "echo whatever; exit 3")) == set()
    assert await says(script(tmp_path, """echo '{"version":1,"selectors":[]}'""")) == set()


async def test_several_programs_are_asked_together(tmp_path: Path) -> None:
    one = script(tmp_path, f"echo '{OK}'")
    other = script(tmp_path, """echo '{"version":1,"selectors":["room:7"]}'""", name="other", prefix="room")
    none = script(tmp_path, "exit 3", name="none")
    assert await says(one, other, none) == {"team:blue", "room:7"}
    failing = script(tmp_path, "exit 1", name="failing")
    refused = await refusal(one, failing)
    assert (refused.reason, refused.message) == ("program_failed", "the program failing ended with 1")


@pytest.mark.parametrize("code", [1, 2, 4, 255])
async def test_any_other_exit_refuses(tmp_path: Path, code: int) -> None:
    assert (await refusal(script(tmp_path, f"echo '{OK}'; exit {code}"))).reason == "program_failed"


async def test_killed_by_a_signal(tmp_path: Path) -> None:
    assert (await refusal(script(tmp_path, f"echo '{OK}'; kill -9 $$"))).reason == "program_failed"


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "nonsense",
        "null",
        '{"version":2,"selectors":[]}',
        '{"version":true,"selectors":[]}',
        '{"selectors":["team:blue"]}',
        '{"version":1}',
        '{"version":1,"selectors":"team:blue"}',
        '{"version":1,"selectors":["team:blue"],"more":1}',
        '{"version":1,"selectors":["team:blue"],"selectors":[]}',
        '{"version":1,"selectors":["team:blue"]}{"version":1,"selectors":[]}',
        '{"version":1,"selectors":[1]}',
        '{"version":1,"selectors":["team:"]}',
        '{"version":1,"selectors":["team"]}',
        '{"version":1,"selectors":["team:a\\u0000b"]}',
        '{"version":1,"selectors":["team:\\ud800"]}',
        '{"version":1,"selectors":["unix:uid:0"]}',
        '{"version":1,"selectors":["team:blue","teams:blue"]}',
        '{"version":1,"selectors":["TEAM:blue"]}',
        '{"version":1,"selectors":[" team:blue"]}',
    ],
)
async def test_an_answer_that_is_not_the_protocols(tmp_path: Path, answer: str) -> None:
    (tmp_path / "answer").write_text(answer)
    refused = await refusal(script(tmp_path, f"cat {tmp_path}/answer"))
    assert refused.reason == "program_answer"
    assert "blue" not in refused.message


async def test_limits_of_the_answer(tmp_path: Path) -> None:
    full = {"version": 1, "selectors": [f"team:{number}" for number in range(MAX_SELECTORS)]}
    (tmp_path / "answer").write_text(json.dumps(full))
    program = script(tmp_path, f"cat {tmp_path}/answer")
    assert len(await says(program)) == MAX_SELECTORS
    full["selectors"].append("team:more")
    (tmp_path / "answer").write_text(json.dumps(full))
    assert (await refusal(program)).reason == "program_answer"
    (tmp_path / "answer").write_text(OK + " " * (MAX_ANSWER - len(OK)))
    assert await says(program) == {"team:blue"}
    (tmp_path / "answer").write_text(OK + " " * (MAX_ANSWER - len(OK) + 1))
    assert (await refusal(program)).reason == "program_answer"
    endless = script(tmp_path, f"head -c {MAX_ANSWER + 1} /dev/zero; exec sleep 60", name="endless")
    assert (await refusal(endless)).reason == "program_answer"


async def test_too_slow_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    program = script(tmp_path, f"sleep 300 & echo $$ $! >{pids}; wait", timeout=0.5)
    assert (await refusal(program)).reason == "attestor_timeout"
    await gone(*map(int, pids.read_text().split()))


async def test_what_outlives_an_answer_is_ended_and_not_waited_for(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    program = script(tmp_path, f"sleep 300 & echo $! >{pids}; echo '{OK}'", timeout=5.0)
    began = time.monotonic()
    assert await says(program) == {"team:blue"}
    assert time.monotonic() - began < 4.9
    await gone(int(pids.read_text()))


async def gone(*pids: int) -> None:
    until = time.monotonic() + 5
    for pid in pids:
        with suppress(ProcessLookupError, FileNotFoundError):
            # An orphan may stay a zombie where nothing reaps; it runs no more.
            while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                assert time.monotonic() < until, "it still runs"
                await asyncio.sleep(0.01)


@pytest.mark.bears("A21")
async def test_a_program_inherits_nothing(tmp_path: Path) -> None:
    probe = (
        "import os,sys;"
        f"d={str(tmp_path)!r};"
        "l=[(n,os.readlink(f'/proc/self/fd/{n}')) for n in os.listdir('/proc/self/fd') if os.path.lexists(f'/proc/self/fd/{n}')];"
        "open(d+'/fds','w').write(repr(l));"
        "open(d+'/env','w').write(repr(sorted(open('/proc/self/environ').read().split(chr(0)))));"
        "open(d+'/cwd','w').write(os.getcwd());"
        f"print({OK!r})"
    )
    extra = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
    for fd in extra:
        os.set_inheritable(fd, True)
    try:
        program = pinned(Path(sys.executable).resolve(), "-I", "-S", "-c", probe)
        assert await says(program) == {"team:blue"}
    finally:
        for fd in extra:
            os.close(fd)
    found = dict(eval((tmp_path / "fds").read_text()))
    kinds = sorted(target.split(":")[0] for number, target in found.items())
    # Question, answer, /dev/null for messages, and the program's own image.
    assert kinds == ["/dev/null", "/memfd", "/memfd", "pipe"], found
    assert (tmp_path / "env").read_text() == "['']"
    assert (tmp_path / "cwd").read_text() == "/"


async def test_a_swap_or_a_write_after_the_start_has_no_effect(tmp_path: Path) -> None:
    program = script(tmp_path, f"echo '{OK}'")
    attestor = made(program)
    path = Path(str(program["path"]))
    evil = '#!/bin/sh\necho \'{"version":1,"selectors":["team:red"]}\'\n'
    with started_process() as process:
        path.write_text(evil)  # in place: the same inode
        assert {str(one) for one in await attestor.attest(process)} == {"team:blue"}
        (tmp_path / "new").write_text(evil)
        (tmp_path / "new").replace(path)
        assert {str(one) for one in await attestor.attest(process)} == {"team:blue"}
        path.unlink()
        assert {str(one) for one in await attestor.attest(process)} == {"team:blue"}


async def test_a_program_cannot_change_its_own_image(tmp_path: Path) -> None:
    program = script(tmp_path, f"(echo 'exit 3' >>$0) 2>/dev/null; echo '{OK}'")
    with started_process() as process:
        attestor = made(program)
        for _ in range(2):
            assert {str(one) for one in await attestor.attest(process)} == {"team:blue"}


async def test_a_native_program(tmp_path: Path) -> None:
    assert await says(pinned(Path(shutil.which("echo")).resolve(), OK)) == {"team:blue"}


def test_a_program_that_is_not_its_pin_stops_the_start(tmp_path: Path) -> None:
    program = script(tmp_path, "exit 3")
    Path(str(program["path"])).write_text("#!/bin/sh\nexit 0\n")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Misconfigured) as refused:
        made(program)
    assert refused.value.reason == "program_not_pinned"
    with pytest.raises(Misconfigured, match="cannot be read"):
        made({**program, "path": str(tmp_path / "absent")})
    with pytest.raises(Misconfigured, match="regular file"):
        made({**program, "path": str(tmp_path)})
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(Misconfigured, match="regular file"):
        made({**program, "path": str(tmp_path / "fifo")})
    with pytest.raises(Misconfigured, match="larger than"):
        made({**program, "path": str(_large(tmp_path))})
    assert len(os.listdir("/proc/self/fd")) == before


def _large(directory: Path) -> Path:
    path = directory / "large"
    with path.open("wb") as file:
        file.truncate((64 << 20) + 1)
    return path


async def test_a_program_that_cannot_be_started(tmp_path: Path) -> None:
    path = tmp_path / "broken"
    path.write_text("#!/nowhere/interpreter\n")
    assert (await refusal(pinned(path))).reason == "program_failed"


async def test_a_process_that_is_gone_is_refused(tmp_path: Path) -> None:
    attestor = made(script(tmp_path, f"echo '{OK}'"))
    with ended_process() as process:
        assert (await check_refuses(attestor, process)).reason == "process_gone"


async def test_one_users_slow_programs_are_bounded(tmp_path: Path) -> None:
    running = tmp_path / "running"
    running.mkdir()
    program = script(
        tmp_path, f"touch {running}/$$; ls {running} | wc -l >>{tmp_path}/counts; sleep 0.1; rm {running}/$$; echo '{OK}'",
        timeout=5.0,
    )  # fmt: skip
    attestor = made(program)
    with started_process() as process:
        answers = await asyncio.gather(*(attestor.attest(process) for _ in range(12)))
    assert len(answers) == 12
    counts = [int(line) for line in (tmp_path / "counts").read_text().split()]
    assert len(counts) == 12 and max(counts) <= 4


async def test_a_caller_that_leaves_ends_its_program(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    attestor = made(script(tmp_path, f"echo $$ >{pid}; exec sleep 300", timeout=5.0))
    with started_process() as process:
        task = asyncio.ensure_future(attestor.attest(process))
        until = time.monotonic() + 5
        while not pid.exists() or not pid.read_text().endswith("\n"):
            assert time.monotonic() < until
            await asyncio.sleep(0.01)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await gone(int(pid.read_text()))


async def test_leaves_nothing_when_cancelled(tmp_path: Path) -> None:
    with started_process() as process:
        await check_cancelled(made(script(tmp_path, f"echo '{OK}'")), process)
        found = await check_workload_attestor(made(script(tmp_path, "exit 3")), process)
    assert found == frozenset()


@pytest.mark.parametrize(
    "changed",
    [
        {"sha256": None},
        {"sha256": "A" * 64},
        {"sha256": "a" * 63},
        {"path": "relative"},
        {"path": "/a\0b"},
        {"args": ["a\0b"]},
        {"timeout": 0},
        {"timeout": 5.1},
        {"timeout": float("nan")},
        {"prefix": "unix"},
        {"prefix": "a:b"},
        {"name": "docker"},
        {"name": "Team"},
        {"shell": True},
    ],
)
def test_settings_that_are_refused(changed: dict) -> None:
    table = {"name": "team", "path": "/bin/true", "sha256": "a" * 64, **changed}
    table = {key: value for key, value in table.items() if value is not None}
    with pytest.raises(ValidationError):
        ExecSettings.model_validate({"programs": [table]})


def test_programs_are_distinct_and_few() -> None:
    one = {"name": "team", "path": "/bin/true", "sha256": "a" * 64}
    ExecSettings.model_validate({"programs": [one, {**one, "name": "other"}]})
    for programs in ([], [one, one], [one, {**one, "name": "other", "prefix": "team"}]):
        with pytest.raises(ValidationError):
            ExecSettings.model_validate({"programs": programs})
    with pytest.raises(ValidationError):
        ExecSettings.model_validate({"programs": [{**one, "name": f"p{number}"} for number in range(5)]})


def test_is_made_from_a_table_of_the_settings(tmp_path: Path) -> None:
    offers = lambda _: [Offer("exec", "identity-broker", lambda: ExecAttestor)]  # noqa: E731
    ready, broken = Catalogue(offers=offers).workload({"exec": {"programs": [script(tmp_path, "exit 3")]}})
    assert isinstance(ready[0], ExecAttestor) and not broken
