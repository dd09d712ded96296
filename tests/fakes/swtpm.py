"""A real TPM 2.0 in software, swtpm, with certificates by swtpm's own authority; on a Unix socket of a directory of ours."""

import importlib.util
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REQUIRED = "BROKER_TEST_TPM"
"""Set, as in CI: what is missing fails the tests, and does not skip them."""


def why_not() -> str:
    """Say what is missing for a TPM here; empty: nothing."""
    if os.environ.get(REQUIRED):
        return ""
    missing = [name for name in ("swtpm", "swtpm_setup") if shutil.which(name) is None]
    if missing:
        return f"needs {', '.join(missing)}: apt-get install swtpm swtpm-tools"
    if importlib.util.find_spec("tpm2_pytss") is None:
        return "needs tpm2-pytss: pip install 'identity-broker[tpm]'"
    return ""


class Swtpm:
    """One TPM in a directory. It is made by its maker, and runs while it is asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = directory / "s"
        self.tcti = f"swtpm:path={self.socket}"
        self.authority = directory / "ca" / "issuercert.pem"

    def manufacture(self, *more: str) -> None:
        """Make it, with endorsement keys RSA-2048 and P-384 at their handles and their certificates in its memory."""
        for name in ("ca", "state"):
            (self.directory / name).mkdir()
        ca = self.directory / "ca"
        (self.directory / "ca.conf").write_text(
            f"statedir = {ca}\nsigningkey = {ca}/key.pem\nissuercert = {self.authority}\ncertserial = {ca}/serial\n"
        )
        (self.directory / "ca.options").touch()
        (self.directory / "setup.conf").write_text(
            f"create_certs_tool=swtpm_localca\ncreate_certs_tool_config={self.directory}/ca.conf\n"
            f"create_certs_tool_options={self.directory}/ca.options\n"
        )
        done = subprocess.run(
            [
                "swtpm_setup", "--tpm2", "--tpmstate", str(self.directory / "state"),
                "--config", str(self.directory / "setup.conf"), "--create-ek-cert", *more,
            ],
            capture_output=True, check=False, timeout=50,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Switch it on, and off again."""
        for old in (self.socket, Path(f"{self.socket}.ctrl")):
            old.unlink(missing_ok=True)
        with (self.directory / "log").open("wb") as log:
            process = subprocess.Popen(
                [
                    "swtpm", "socket", "--tpm2", "--tpmstate", f"dir={self.directory}/state",
                    "--server", f"type=unixio,path={self.socket}",
                    "--ctrl", f"type=unixio,path={self.socket}.ctrl", "--flags", "not-need-init,startup-clear",
                ],
                stdout=log, stderr=log,
            )  # fmt: skip
        try:
            self._wait(process)
            yield
        finally:
            process.terminate()
            process.wait(30)

    def _wait(self, process: subprocess.Popen) -> None:
        sockets = (self.socket, Path(f"{self.socket}.ctrl"))
        deadline = time.monotonic() + 30
        while not all(one.exists() for one in sockets):
            assert process.poll() is None and time.monotonic() < deadline, (self.directory / "log").read_text()
            time.sleep(0.02)
