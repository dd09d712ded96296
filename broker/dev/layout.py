"""Where the parts of an estate are: files in one directory, sockets in a short one. Writes nothing."""

import hashlib
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from broker.errors import Misconfigured

MAX_RUNTIME = 60
"""Bytes of the runtime directory's path: a Unix socket's path ends at 107, and the programs put their own below it."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths of one estate."""

    directory: Path
    runtime: Path

    @property
    def state(self) -> Path:
        """What is running, and on which ports."""
        return self.directory / "estate.json"

    @property
    def lock(self) -> Path:
        """Held while the estate is started or ended."""
        return self.directory / ".lock"

    @property
    def server_config(self) -> Path:
        """The server's settings."""
        return self.directory / "server.toml"

    @property
    def agent_config(self) -> Path:
        """The agent's settings."""
        return self.directory / "agent.toml"

    @property
    def bundle(self) -> Path:
        """The authorities that the agent trusts the first time (PEM)."""
        return self.directory / "bundle.pem"

    @property
    def join_token(self) -> Path:
        """The agent's one-time token, 0600."""
        return self.directory / "join-token"

    @property
    def issuer(self) -> Path:
        """The development issuer's keys."""
        return self.directory / "issuer"

    @property
    def token_socket(self) -> Path:
        """Where user tokens are asked for."""
        return self.runtime / "issuer" / "tokens.sock"

    @property
    def server_socket(self) -> Path:
        """The server's admin socket."""
        return self.runtime / "server" / "private" / "api.sock"

    @property
    def agent_socket(self) -> Path:
        """The workload socket."""
        return self.runtime / "agent" / "public" / "api.sock"

    def data(self, part: str) -> Path:
        """What a part keeps."""
        return self.directory / part

    def log(self, part: str) -> Path:
        """What a part says."""
        return self.directory / f"{part}.log"


def default_directory(environ: Mapping[str, str]) -> Path:
    """Give ``$XDG_STATE_HOME/broker-dev``, or the same below ``~/.local/state``."""
    configured = environ.get("XDG_STATE_HOME", "")
    home = Path(configured) if configured.startswith("/") else Path.home() / ".local" / "state"
    return home / "broker-dev"


def layout_of(directory: Path, environ: Mapping[str, str]) -> Layout:
    """Choose the paths of an estate; sockets go elsewhere when its own path is too long for them."""
    absolute = directory.absolute()
    inside = absolute / "run"
    if len(os.fsencode(inside)) <= MAX_RUNTIME:
        return Layout(absolute, inside)
    # The same directory has the same place each time, and another one has another.
    name = "broker-dev-" + hashlib.sha256(os.fsencode(absolute)).hexdigest()[:12]
    session = environ.get("XDG_RUNTIME_DIR", "")
    for parent in (session, tempfile.gettempdir(), "/tmp"):  # noqa: S108 - private_directory refuses what others made there
        chosen = Path(parent) / (name if parent == session else f"{name}-{os.geteuid()}")
        if parent.startswith("/") and Path(parent).is_dir() and len(os.fsencode(chosen)) <= MAX_RUNTIME:
            return Layout(absolute, chosen)
    raise Misconfigured(
        "no place is short enough for sockets", hint="set XDG_RUNTIME_DIR, or name a shorter --directory"
    )


def private_directory(path: Path) -> None:
    """Make a directory that only we may enter; raises Misconfigured when it is somebody else's, or open to others."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = path.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
        raise Misconfigured(
            f"{path} is not a directory of ours alone",
            code="directory_unsafe",
            hint=f"chmod 700 {path}, or name another",
        )
