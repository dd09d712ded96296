"""A copy of the interpreter is another file to the kernel, and the same Python to its program."""

import os
import subprocess
from pathlib import Path

from broker.dev.programs import install_program, program_environment


def test_a_program_of_its_own(tmp_path: Path) -> None:
    program = install_program(tmp_path, "mine")
    ended = subprocess.run(
        [program, "-c", "import os, broker, grpc; print(os.readlink('/proc/self/exe'))"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=program_environment({**os.environ, "BROKER_SERVER__TRUST_DOMAIN": "x", "PYTHONHOME": "/nonexistent"}),
    )
    assert ended.stderr == ""
    assert ended.stdout.strip() == str(program)
    assert program.stat().st_ino != Path("/proc/self/exe").stat().st_ino
