"""Describes a process that ``broker run`` launched: its name, and the digest of the code that it was started with.

The launcher, which is the operator's, registers the process by its number and start time before its program runs. A
child of the launched process has another number, and what it becomes by ``exec`` has another executable: neither has a
selector here, though both have the same user.
"""

import os
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from broker.attestation.contract import AttestorFailed, SelectorDoc, Strength
from broker.attestation.launches import (
    DEFAULT_DIRECTORY,
    Launch,
    boot_id,
    file_name,
    open_directory,
    pid_namespace,
    read_launch,
)
from broker.attestation.process import Process
from broker.errors import Invalid, Misconfigured
from broker.spiffe import Selector

NAME = "launch"


class LaunchSettings(BaseModel):
    """Where the launcher registers what it launches."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    directory: Path = Field(
        default=DEFAULT_DIRECTORY,
        description="The directory launches in the agent's private directory: runtime_dir/private/launches.",
    )

    @field_validator("directory")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        if not value.is_absolute() or "\x00" in str(value):
            raise ValueError("write an absolute path")
        return value


class LaunchAttestor:
    """See the module; ``LaunchSettings`` are its settings."""

    name: ClassVar[str] = NAME
    settings: ClassVar[type[BaseModel]] = LaunchSettings
    selectors: ClassVar[tuple[SelectorDoc, ...]] = (
        SelectorDoc("launch:name:<name>", "the name that the operator launched it under", Strength.RUNTIME),
        SelectorDoc(
            "launch:code:<hex>", "the SHA-256 of the script, or program, it was launched with", Strength.RUNTIME
        ),
    )

    def __init__(self, settings: LaunchSettings) -> None:
        self._directory = settings.directory
        self._owners = frozenset({0, os.geteuid()})

    async def attest(self, process: Process) -> frozenset[Selector]:
        """Give name and code of a launched process; none for any other, and for what a launched one has become.

        Raises ``AttestorFailed`` where its registration is not one that only the launcher can have written.
        """
        # Read here and now: two small files of the agent's own, in memory; no caller can make them slow.
        try:
            launch = self._registration(process)
        except (Misconfigured, Invalid) as error:
            raise AttestorFailed(error.message, code=error.reason, hint=error.hint) from None
        if launch is None or not _is_still(launch, process):
            return frozenset()
        return frozenset({Selector.of(NAME, f"name:{launch.name}"), Selector.of(NAME, f"code:{launch.sha256}")})

    def _registration(self, process: Process) -> Launch | None:
        try:
            directory = open_directory(self._directory, self._owners)
        except FileNotFoundError:
            return None  # nothing has been launched here
        try:
            launch = read_launch(directory, file_name(process.pid, process.facts.start_time), self._owners)
        finally:
            os.close(directory)
        if launch is None or launch.boot_id != boot_id():
            return None
        if launch.pid_namespace != pid_namespace():
            raise Misconfigured(
                "the launcher numbers processes otherwise than the agent",
                code="launch_namespace",
                hint="run broker run and the agent in one pid namespace",
            )
        return launch


def _is_still(launch: Launch, process: Process) -> bool:
    """Whether the process is the program, and the user, that was launched: not what that one became since."""
    facts = process.facts
    return facts.exe == launch.file_id and set(facts.uids) == {launch.uid} and set(facts.gids) == {launch.gid}
