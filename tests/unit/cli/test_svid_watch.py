"""What may be asked of ``broker svid watch``, whom it signals, and what probes are told."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from broker.cli import svid_reload
from broker.cli.main import main
from broker.cli.svid_health import MAX_REQUEST, health_address, health_port
from broker.cli.svid_reload import Reload, ReloadPlan, signal_named
from broker.errors import Invalid, Misconfigured

WATCH = ["svid", "watch", "--dir", "d", "--dry-run"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--pid-file", "p"], "--pid-file needs --renew-signal"),
        (["--renew-signal", "HUP"], "needs a CMD or a --pid-file"),
        (["--renew-signal", "KILL", "--", "x"], "not a signal"),
        (["--renew-signal", "NOPE", "--", "x"], "not a signal"),
        (["--once", "--", "x"], "--once ends"),
        (["--no-x509"], "leaves nothing to keep"),
        (["--jwt-svid", "t", ""], "not empty"),
        (["--jwt-svid", "../t", "a"], "not a plain file name"),
        (["--jwt-svid", "svid.pem", "a"], "the same name"),
        (["--svid-file", "svid_key.pem"], "the same name"),
        (["--key-file", "/etc/key"], "not a plain file name"),
        (["--key-mode", "0644"], "every user of this machine"),
        (["--jwt-svid-mode", "604"], "every user of this machine"),
        (["--key-mode", "0620"], "nobody else write it"),
        (["--cert-mode", "0200"], "its owner must read it"),
        (["--cert-mode", "rw"], "in octal"),
        (["--exec", "'"], "--exec cannot be read"),
        (["--exec", " "], "--exec names no command"),
        (["--health", "host:port"], "not an address"),
        (["--health", "127.0.0.1:70000"], "not an address"),
        (["--spiffe-id", "nonsense"], "Invalid value"),
    ],
)
def test_what_may_not_be_said(wrong: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WATCH, *wrong]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "hint: " in err


def test_a_dry_run_names_the_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    here = tmp_path / "d"
    given = ["--dir", str(here), "--jwt-svid", "t", "a", "--jwt-bundle-file", "b", "-o", "yaml", "--dry-run"]
    assert main(["svid", "watch", *given]) == 0
    out = capsys.readouterr().out
    for name in ("svid.pem", "svid_key.pem", "svid_bundle.pem", "t", "b"):
        assert str(here / name) in out
    assert not here.exists()


def test_signals_have_both_names() -> None:
    assert signal_named("hup") is signal_named("SIGHUP") is signal.SIGHUP


@pytest.mark.parametrize("text", ["", "0", "1", "-1", "x", "12 13", "-0", "9" * 40, "٣"])
async def test_a_pid_file_names_one_process_or_nobody(text: str, tmp_path: Path) -> None:
    """0 and -1 would be every process of a group, or of the user."""
    file = tmp_path / "pid"
    file.write_text(text)
    said: list[str] = []
    await Reload(ReloadPlan(pid_file=file, renew_signal=signal.SIGUSR1), said.append).changed()
    assert said
    assert "nobody was signalled" in said[0]


async def test_a_pid_file_that_is_not_there_or_old(tmp_path: Path) -> None:
    said: list[str] = []
    plan = ReloadPlan(pid_file=tmp_path / "none", renew_signal=signal.SIGUSR1)
    await Reload(plan, said.append).changed()
    ended = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
    await ended.wait()
    (tmp_path / "none").write_text(str(ended.pid))
    await Reload(plan, said.append).changed()
    (tmp_path / "none").write_text(str(os.getpid()))
    await Reload(plan, said.append).changed()
    assert len(said) == 3


async def test_a_command_that_fails_or_hangs_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    await Reload(ReloadPlan(each_time=["/bin/sh", "-c", "exit 3"]), said.append).changed()
    await Reload(ReloadPlan(each_time=["/nonexistent/command"]), said.append).changed()
    monkeypatch.setattr(svid_reload, "EXEC_SECONDS", 0.2)
    await Reload(ReloadPlan(each_time=["/bin/sleep", "60"]), said.append).changed()
    assert "ended with 3" in said[0]
    assert "cannot be run" in said[1]
    assert "takes longer" in said[2]


async def test_who_is_cancelled_when_the_command_ends_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    async def over(command: object) -> Ended:
        return Ended(asyncio.current_task())

    monkeypatch.setattr(svid_reload, "_started", over)
    plan = ReloadPlan(each_time=["a command"])
    changing = asyncio.create_task(Reload(plan, print).changed())
    await asyncio.wait((changing,), timeout=10)
    assert changing.cancelled()


class Ended:
    """A command that ends in the moment in which who waits for it is cancelled."""

    returncode: int | None = 0

    def __init__(self, waiting: asyncio.Task[None]) -> None:
        self.waiting = waiting

    async def wait(self) -> int:
        ended = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(lambda: (ended.set_result(0), self.waiting.cancel()))
        return await ended


async def test_the_program_is_started_once_then_signalled_and_ended(tmp_path: Path) -> None:
    file = tmp_path / "said"
    script = f"trap 'echo usr1 >> {file}' USR1; echo up >> {file}; while :; do sleep 0.02; done"
    reload = Reload(ReloadPlan(program=["/bin/sh", "-c", script], renew_signal=signal.SIGUSR1), print)
    await reload.changed()
    async with asyncio.timeout(30):
        while not file.exists() or not file.read_text():
            await asyncio.sleep(0.02)
        await reload.changed()
        while "usr1" not in file.read_text():
            await asyncio.sleep(0.02)
        await reload.stop()
        await asyncio.shield(reload.ended)
    assert file.read_text() == "up\nusr1\n"
    assert reload.ended.result() == 128 + signal.SIGTERM


async def test_a_program_that_cannot_be_run_is_an_error() -> None:
    with pytest.raises(Invalid, match="cannot be run"):
        await Reload(ReloadPlan(program=["/nonexistent/program"]), print).changed()


def test_health_addresses() -> None:
    assert health_address("8081") == ("127.0.0.1", 8081)
    assert health_address("0.0.0.0:0") == ("0.0.0.0", 0)
    assert health_address("[::1]:1") == ("::1", 1)


async def ask(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), 30)
    writer.close()
    return answer


async def test_probes() -> None:
    lacking = {"x509": "it has expired"}
    async with health_port(("127.0.0.1", 0), lambda: lacking) as port:
        answer = await ask(port, b"GET /ready HTTP/1.1\r\nhost: x\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"it has expired" in answer
        assert (await ask(port, b"GET /live HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        lacking.clear()
        assert (await ask(port, b"GET /ready?x=1 HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        head = await ask(port, b"HEAD /ready HTTP/1.1\r\n\r\n")
        assert head.endswith(b"\r\n\r\n")
        assert (await ask(port, b"GET /else HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 404 ")
        assert (await ask(port, b"POST /ready HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 405 ")
        # What is no request is closed, and the port goes on.
        assert await ask(port, b"GET /ready") == b""
        assert await ask(port, b"x" * (MAX_REQUEST * 2) + b"\r\n\r\n") == b""
        assert (await ask(port, b"GET /ready HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        with pytest.raises(Misconfigured, match="cannot be listened on"):
            async with health_port(("127.0.0.1", port), dict):
                pass
    async with health_port(None, dict) as port:
        assert port == 0
