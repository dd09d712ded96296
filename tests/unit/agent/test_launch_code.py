"""What a command line would run: which file is the code, what is refused, and that what was hashed is what runs."""

import hashlib
import os
import subprocess
import sys
import zipapp
from contextlib import ExitStack
from pathlib import Path

import pytest

from broker.agent import launch_code
from broker.agent.launch_code import Code, prepare
from broker.errors import BrokerError, Invalid, Refused
from tests.fakes.launching import private, run, script

PYTHON = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable
SEALED = "/proc/self/fd/3"


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


def prepared(stack: ExitStack, *command: str, hide: bool = False) -> Code:
    return prepare(command, "one", stack, hide=hide)


def refusal(*command: str) -> BrokerError:
    with ExitStack() as stack, pytest.raises(BrokerError) as refused:
        prepare(command, "one", stack, hide=False)
    return refused.value


@pytest.mark.parametrize(
    ("before", "options"),
    [
        ([], ["-I"]),
        (["-I"], ["-I", "-I"]),
        (["-u", "-OO"], ["-I", "-u", "-OO"]),
        (["-X", "dev", "-Wignore"], ["-I", "-X", "dev", "-Wignore"]),
        (["-W", "-m"], ["-I", "-W", "-m"]),
    ],
)
def test_python_with_a_script(stack: ExitStack, tmp_path: Path, before: list[str], options: list[str]) -> None:
    code = prepared(stack, PYTHON, *before, script(tmp_path, "pass"), "-m", "x")
    assert code.arguments == (PYTHON, *options, SEALED, "-m", "x")
    assert code.sha256 == hashlib.sha256(b"pass\n").hexdigest() and code.size == 5
    assert code.exe.inode != Path(PYTHON).stat().st_ino


@pytest.mark.parametrize(
    "words", [[], ["-"], ["-m", "http.server"], ["-c", "pass"], ["-i", "x"], ["-Ic", "pass"], ["-X"], ["--help"], ["-V"], ["--", "x"]]
)  # fmt: skip
def test_python_without_one_script(words: list[str]) -> None:
    error = refusal(PYTHON, *words)
    assert error.reason == "launch_no_script" and error.hint


def test_no_modules_of_a_directory(tmp_path: Path) -> None:
    assert refusal(PYTHON, str(tmp_path)).reason == "launch_not_a_file"


@pytest.mark.parametrize(
    "line", ["#!{python}", "#! {python} -u", "#!/usr/bin/env {python}", "#!/usr/bin/env -S {python} -u"]
)
def test_a_script_names_its_interpreter(stack: ExitStack, tmp_path: Path, line: str) -> None:
    path = Path(script(tmp_path, line.format(python=PYTHON) + "\npass"))
    path.chmod(0o755)
    code = prepared(stack, str(path), "a")
    flags = ("-u",) if "-u" in line else ()
    assert code.arguments == (PYTHON, "-I", *flags, SEALED, "a")
    assert code.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "line",
    ["#!", "#!/usr/bin/env", "#!/usr/bin/env -i x", "#!/bin/cat", "#!/nonexistent", "#!/usr/bin/env A=b python3"],
)
def test_an_interpreter_that_is_not_known(tmp_path: Path, line: str) -> None:
    path = Path(script(tmp_path, line + "\nx"))
    path.chmod(0o755)
    assert refusal(str(path)).reason in {"launch_interpreter", "launch_not_found", "launch_no_script"}


def test_a_python_that_is_a_script_itself(tmp_path: Path) -> None:
    shim = Path(script(tmp_path, '#!/bin/sh\nexec real-python "$@"', "python3"))
    shim.chmod(0o755)
    assert refusal(str(shim), script(tmp_path, "pass")).reason == "launch_interpreter"


@pytest.mark.parametrize(
    "name", ["node", "perl5.36", "ruby", "java", "env", "busybox", "pypy3.10", "ld-linux-x86-64.so.2", "ld.so"]
)
def test_interpreters_that_are_not_launched(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("/bin/cat")
    assert refusal(str(tmp_path / name), "x").reason == "launch_interpreter"


@pytest.mark.parametrize("words", [[], ["-c", "exit"], ["-e", "x"], ["+x", "x"]])
def test_a_shell_without_a_script(words: list[str]) -> None:
    assert refusal("/bin/sh", *words).reason == "launch_no_script"


def test_a_program_of_its_own(stack: ExitStack) -> None:
    code = prepared(stack, "cat", "x")
    assert code.arguments[1:] == ("x",) and code.script is None
    assert (code.exe.inode, code.sha256) == (
        Path(code.arguments[0]).stat().st_ino, hashlib.sha256(Path(code.arguments[0]).read_bytes()).hexdigest(),
    )  # fmt: skip


def test_a_virtual_environments_python_is_known_by_its_place(stack: ExitStack, tmp_path: Path) -> None:
    link = tmp_path / "bin" / "python"
    link.parent.mkdir()
    link.symlink_to(Path(sys.executable).resolve())
    assert prepared(stack, str(link), script(tmp_path, "pass")).arguments[0] == str(link)


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_code_that_others_may_write(tmp_path: Path, mode: int) -> None:
    path = script(tmp_path, "pass")
    os.chmod(path, mode)
    error = refusal(PYTHON, path)
    assert isinstance(error, Refused) and error.reason == "launch_code_unsafe"


def test_a_fifo_holds_up_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x", 0o600)
    assert refusal(PYTHON, str(tmp_path / "x")).reason == "launch_not_a_file"


@pytest.mark.parametrize("command", ["/nonexistent", "nonexistent-program", "/etc/passwd", ""])
def test_what_cannot_be_run(command: str) -> None:
    assert isinstance(refusal(command), Invalid)


def test_what_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_code, "MAX_SEALED", 8)
    assert refusal(PYTHON, script(tmp_path, "pass # longer")).reason == "launch_too_large"
    monkeypatch.setattr(launch_code, "MAX_EXECUTABLE", 8)
    assert refusal("/bin/cat").reason == "launch_too_large"


def test_a_sealed_script_cannot_be_changed(stack: ExitStack, tmp_path: Path) -> None:
    path = Path(script(tmp_path, "print('as hashed')"))
    code = prepared(stack, PYTHON, str(path))
    path.write_text("print('changed')\n")
    assert code.script is not None
    for fd in (code.script, code.image):
        with pytest.raises(OSError):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(OSError):
            os.truncate(fd, 0)
    os.lseek(code.script, 0, os.SEEK_SET)
    told = subprocess.run(
        [PYTHON, "-I", f"/proc/self/fd/{code.script}"],
        pass_fds=(code.script,),
        capture_output=True,
        check=True,
        text=True,
    )
    assert told.stdout == "as hashed\n"


def test_a_program_that_was_written_meanwhile_is_seen(stack: ExitStack, tmp_path: Path) -> None:
    path = tmp_path / "tool"
    path.write_bytes(Path("/bin/cat").read_bytes())
    path.chmod(0o755)
    code = prepared(stack, str(path))
    assert code.is_unchanged()
    with path.open("r+b") as file:
        file.write(b"\x7fELF")
    os.utime(path)
    assert not code.is_unchanged()


def test_an_image_that_its_user_may_not_read(stack: ExitStack, tmp_path: Path) -> None:
    code = prepared(stack, PYTHON, script(tmp_path, "pass"), hide=True)
    assert os.fstat(code.image).st_mode & 0o777 == 0o111
    assert code.script is not None and os.fstat(code.script).st_mode & 0o777 == 0o555


def test_one_file_with_all_its_modules_runs_sealed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "__main__.py").write_text("import part\nprint(part.__file__)\n")
    (source / "part.py").write_text("")
    bundle = tmp_path / "agent.pyz"
    zipapp.create_archive(source, bundle)
    bundle.chmod(0o644)
    ended = run("--as", "one", "--directory", str(private(tmp_path)), "--", sys.executable, str(bundle))
    assert (ended.returncode, ended.stdout) == (0, f"{SEALED}/part.py\n"), ended.stderr
