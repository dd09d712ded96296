"""A real PostgreSQL for tests: its own directory, a Unix socket only, a process that is ended by its pid.

PostgreSQL refuses to run as root: there it runs as ``nobody``. Use the fixture ``postgresql`` for a database of one's own.
"""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import psycopg

_PACKAGE = find_spec("pgserver")
assert _PACKAGE is not None and _PACKAGE.origin is not None
# The programs alone: the package itself looks for directories of the user when it is imported.
PROGRAMS = Path(_PACKAGE.origin).parent / "pginstall" / "bin"
DEADLINE = 30.0
"""Seconds to start or stop: far more than a busy machine needs."""
SERVANT = "nobody"
LOCKED = "locked"
"""The database that asks for the password."""
PASSWORD = "s3cret-p%40ss"
"""As it stands in a URL."""


class Cluster:
    """One PostgreSQL server."""

    def __init__(self) -> None:
        # Short: a Unix socket's path has at most 107 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix="brokerpg", dir="/tmp"))
        self._as: Mapping[str, Any] = {}
        if os.geteuid() == 0:
            servant = pwd.getpwnam(SERVANT)
            self._as = {"user": servant.pw_uid, "group": servant.pw_gid, "extra_groups": ()}
            os.chown(self.directory, servant.pw_uid, servant.pw_gid)
        self._process: subprocess.Popen[bytes] | None = None
        self._names = count(1)

    def unusable(self) -> str | None:
        """Say why it cannot run here, if so."""
        try:
            done = self._run("postgres", "--version")
        except OSError as error:
            return f"PostgreSQL cannot be run as {SERVANT}: {error.strerror}"
        return None if done.returncode == 0 else f"PostgreSQL cannot be run: {done.stderr.decode(errors='replace')}"

    def make(self) -> None:
        """Make its files."""
        secret = self.directory / "password"
        secret.write_text(PASSWORD.replace("%40", "@"))
        secret.chmod(0o644)
        done = self._run(
            "initdb", "--pgdata", str(self.data), "--username", "broker", "--pwfile", str(secret),
            "--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C.UTF-8", "--no-sync",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        # One database asks for the password; the others save the time.
        rules = f"local {LOCKED} all scram-sha-256\nlocal all all trust\n"
        (self.data / "pg_hba.conf").write_text(rules)

    def start(self) -> None:
        """Run, and wait until it answers."""
        log = (self.directory / "log").open("ab")
        with log:
            self._process = subprocess.Popen(
                [PROGRAMS / "postgres", "-D", self.data, "-k", self.directory, "-c", "listen_addresses="],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.directory, **self._as,
            )  # fmt: skip
        deadline = time.monotonic() + DEADLINE
        while True:
            try:
                psycopg.connect(self.url("postgres")).close()
            except psycopg.OperationalError:
                assert self._process.poll() is None, (self.directory / "log").read_text(errors="replace")
                assert time.monotonic() < deadline, "PostgreSQL does not answer"
                time.sleep(0.02)
            else:
                return

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End it: SIGINT is a fast shutdown, SIGQUIT an immediate one (as a crash), SIGKILL a kill."""
        process, self._process = self._process, None
        if process is None:
            return
        children = [int(pid) for pid in _children(process.pid)]
        process.send_signal(how)
        process.wait(DEADLINE)
        # After a kill its children end by themselves; it cannot start anew before they have.
        deadline = time.monotonic() + DEADLINE
        while any(Path(f"/proc/{pid}").exists() for pid in children):
            assert time.monotonic() < deadline, "a backend does not end"
            time.sleep(0.01)

    def signal_all(self, number: signal.Signals) -> None:
        """Send a signal to the server and everything that it started."""
        assert self._process is not None
        for pid in (self._process.pid, *_children(self._process.pid)):
            os.kill(int(pid), number)

    def remove(self) -> None:
        """End it, and remove its files."""
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.directory)

    def database(self, name: str = "") -> str:
        """Make an empty database and give its URL."""
        name = name or f"test_{next(self._names)}"
        self.execute(self.url("postgres"), f"CREATE DATABASE {name} TEMPLATE template0")
        return self.url(name)

    def schema(self) -> str:
        """Make an empty schema in a database of the cluster and give the URL that leads to it: much cheaper than a database."""
        name = f"test_{next(self._names)}"
        self.execute(self.url("postgres"), f"CREATE SCHEMA {name}")
        return f"{self.url('postgres')}&options=-csearch_path%3D{name}"

    def drop_schema(self, url: str) -> None:
        """Remove a schema and all in it."""
        self.execute(self.url("postgres"), f"DROP SCHEMA {url.rpartition('%3D')[2]} CASCADE")

    def url(self, name: str, *, password: str = PASSWORD) -> str:
        """Give the URL of a database."""
        return f"postgresql://broker:{password}@/{name}?host={self.directory}"

    def execute(self, url: str, text: str) -> Sequence[tuple[Any, ...]]:
        """Run a statement, beside any server of ours."""
        with psycopg.connect(url, autocommit=True) as connection:
            cursor = connection.execute(text)
            return cursor.fetchall() if cursor.description else ()

    @property
    def data(self) -> Path:
        """Where its files are."""
        return self.directory / "data"

    def _run(self, program: str, *arguments: str) -> "subprocess.CompletedProcess[bytes]":
        command = [str(PROGRAMS / program), *arguments]
        return subprocess.run(
            command, capture_output=True, check=False, cwd=self.directory, timeout=2 * DEADLINE, **self._as
        )


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
