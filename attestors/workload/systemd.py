"""Describes a process by the systemd unit that it runs in, as the control groups show it and systemd confirms it.

Selectors are SPIRE's: ``systemd:id systemd:fragment_path``. The unit is the first one below the slices of the process's
control group, in a top slice that only root fills, in directories that are root's; systemd must name the same unit for
the process's number. Units of a user's own manager belong to that user and give nothing; neither does a container.
systemd is asked by ``busctl``, in a process with an empty environment and no descriptor of ours.
"""

import asyncio
import re
import stat
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from broker.attestation.cgroups import Cgroup, Place, find_places, is_outside_namespace, parse_cgroups
from broker.attestation.containers import THIS_NODE, WRITABLE_BY_OTHERS, Container, Node, require_owned
from broker.attestation.contract import AttestorFailed, AttestorUnavailable, SelectorDoc, Strength
from broker.attestation.process import Process
from broker.attestation.reads import Abandoned, BlockingReads
from broker.clock import SystemClock
from broker.errors import Invalid
from broker.spiffe import Selector
from broker.spiffe.strictjson import loads

NAME = "systemd"
ATTEST_TIMEOUT = 4.0  # seconds for both questions; a hung systemd refuses its own units, and nobody else
MAX_ANSWER = 1 << 16  # bytes of one line: a path of 4,096 bytes, each escaped, fits

_SERVICE: Final = "org.freedesktop.systemd1"
_MANAGER: Final = "/org/freedesktop/systemd1"
_SLICE: Final = re.compile(r"[A-Za-z0-9:_.\\-]{1,249}\.slice")
_UNIT: Final = re.compile(r"[A-Za-z0-9:_.\\@-]{1,248}\.(?:service|scope|socket|mount|swap)")  # systemd.unit(5)
_MAX_UNIT: Final = 255  # characters of a unit's name, systemd.unit(5)
_OBJECT: Final = re.compile(r"/org/freedesktop/systemd1/unit/[A-Za-z0-9_]{1,1024}")  # other bytes are _xx, so 3 for 1
M = TypeVar("M", bound=BaseModel)


class SystemdSettings(BaseModel):
    """Where units are looked for, and who asks systemd."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    slices: tuple[str, ...] = Field(
        default=("system.slice",),
        min_length=1,
        description="Top slices whose units are given; only root may fill them. Never user.slice or machine.slice.",
    )
    busctl_path: str = Field(
        default="/usr/bin/busctl",
        pattern="^/[^\x00]+$",  # Rust's, where $ is the very end
        description="The busctl program, version 240 or later; it must be root's.",
    )

    @field_validator("slices")
    @classmethod
    def _top_slices(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for one in value:
            if _SLICE.fullmatch(one) is None or "-" in one.removesuffix(".slice"):
                raise ValueError("write the name of a top slice, such as system.slice")
            if one in {"user.slice", "machine.slice"}:
                raise ValueError("what is in user.slice is the users' own, and in machine.slice are containers")
        return value


class _Text(BaseModel):
    """A property as ``busctl --json=short`` writes it."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)

    type: Literal["s"]
    data: str


class _Reply(BaseModel):
    """A method's answer: always a list, here of one object path."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)

    type: Literal["o"]
    data: list[str] = Field(min_length=1, max_length=1)


@dataclass(frozen=True, slots=True)
class Unit:
    """The unit that a control group names: a claim until its directories are root's and systemd says the same."""

    id: str
    home: Cgroup


@dataclass(frozen=True, slots=True)
class Machine:
    """Where this machine is asked: its control groups, and the directory that only a running systemd makes."""

    node: Node = THIS_NODE
    booted: Path = Path("/run/systemd/system")  # sd_booted(3)


THIS_MACHINE: Final = Machine()


class SystemdAttestor:
    """See the module; ``SystemdSettings`` are its settings."""

    name: ClassVar[str] = NAME
    settings: ClassVar[type[BaseModel]] = SystemdSettings
    selectors: ClassVar[tuple[SelectorDoc, ...]] = (
        SelectorDoc("systemd:id:<unit>", "the system unit that the process runs in", Strength.RUNTIME),
        SelectorDoc("systemd:fragment_path:<path>", "the file that the unit was loaded from", Strength.RUNTIME),
    )

    def __init__(self, settings: SystemdSettings, machine: Machine = THIS_MACHINE) -> None:
        self._settings = settings
        self._machine = machine
        self._reads = BlockingReads()

    async def attest(self, process: Process) -> frozenset[Selector]:
        """Give the selectors of the process's system unit; none where it is in none, or systemd does not run here.

        Raises ``AttestorFailed``, after four seconds at the latest.
        """
        if not self._machine.booted.is_dir():
            return frozenset()
        unit = find_unit(process.facts.cgroup, self._settings.slices)
        if unit is None:
            return frozenset()
        until = SystemClock().monotonic() + ATTEST_TIMEOUT
        try:
            async with asyncio.timeout(ATTEST_TIMEOUT):
                return await self._reads.run(process.uid, lambda stop: self._describe(process, unit, until, stop))
        except TimeoutError:
            raise _late() from None

    def _describe(self, process: Process, unit: Unit, until: float, abandoned: Abandoned) -> frozenset[Selector]:
        _require_root(unit, self._machine.node)
        bus = _Bus(self._settings.busctl_path, self._machine.node.root, until, abandoned)
        path = bus.unit_of(process.pid)
        said, fragment = bus.names_of(path)
        # NOTE(security): asked by number, which was this process's all the time if it is so now: it still lives.
        if process.is_gone():
            raise AttestorFailed("the process is gone", code="process_gone")
        if said != unit.id:
            raise AttestorFailed(
                "systemd names another unit than the process's control group",
                code="unit_mismatch",
                hint="the agent needs the host's pid and control group namespaces",
            )
        return frozenset(_selectors(said, fragment))


def find_unit(cgroup: bytes, slices: tuple[str, ...]) -> Unit | None:
    """Read the unit out of ``/proc/<pid>/cgroup``; ``None``: in no unit of these slices, or in a container.

    Raises ``AttestorFailed`` where hierarchies disagree, or lead out of the agent's own control group namespace.
    """
    cgroups = parse_cgroups(cgroup)
    # systemd keeps its tree in version 2, in the hierarchy of its own, or in both.
    own = [one for one in cgroups if one.controllers == {"name=systemd"} or not one.controllers]
    if any(is_outside_namespace(one.path) for one in own):
        raise AttestorFailed(
            "the agent is in a control group namespace of its own and cannot see whose units these are",
            code="cgroup_namespace",
            hint="run the agent in the host's: docker run --cgroupns=host",
        )
    used = [one for one in own if one.path != "/"]  # a hierarchy that systemd does not use has everybody at its top
    units = [_unit(one, slices) for one in used]
    if len({unit.id if unit else None for unit in units}) > 1:
        raise AttestorFailed("the process's control groups name more than one unit", code="unit_ambiguous")
    if not units or units[0] is None or _is_in_container(cgroups):
        return None
    return units[0]


def _unit(cgroup: Cgroup, slices: tuple[str, ...]) -> Unit | None:
    names = cgroup.path.split("/")[1:]
    if names[0] not in slices:
        return None
    for depth, escaped in enumerate(names[1:], start=2):
        # systemd puts one "_" before a name that the kernel could take for a file of its own, and before "_" itself.
        name = escaped.removeprefix("_")
        if _SLICE.fullmatch(name):
            continue
        # NOTE(security): below user@<uid>.service the user himself names the units.
        if name.startswith("user@") or _UNIT.fullmatch(name) is None or len(name) > _MAX_UNIT:
            return None
        return Unit(name, Cgroup(cgroup.hierarchy, cgroup.controllers, "/" + "/".join(names[:depth])))
    return None


def _is_in_container(cgroups: tuple[Cgroup, ...]) -> bool:
    try:
        return bool(find_places(cgroups))
    except AttestorFailed:
        return True  # it looks like one; which one, and whether to refuse it, is another attestor's business


def _require_root(unit: Unit, node: Node) -> None:
    """The question is the same as for containers: does every directory down to this one belong to root alone?"""
    place = Place(unit.home, id=unit.id, home=unit.home.path, runtime=None, pod_uid=None, user=None)
    try:
        require_owned(Container(unit.id, None, None, None, (place,)), node)
    except AttestorFailed as error:
        if error.reason != "container_not_anchored":
            raise
        raise AttestorFailed(
            "the unit's control group belongs to somebody who is not root",
            code="unit_not_anchored",
            hint="a unit with both User= and Delegate= hands its control group to that user",
        ) from None


@dataclass(frozen=True, slots=True)
class _Bus:
    """Asks systemd over the system's bus. Blocks; every method raises ``AttestorFailed``."""

    program: str
    root: int
    until: float
    abandoned: Abandoned

    def unit_of(self, pid: int) -> str:
        """Give the object path of the unit that holds the process."""
        (line,) = self._ask(1, "call", _SERVICE, _MANAGER, f"{_SERVICE}.Manager", "GetUnitByPID", "u", str(pid))
        (path,) = _read(_Reply, line).data
        if _OBJECT.fullmatch(path) is None:
            raise _nonsense()
        return path

    def names_of(self, path: str) -> tuple[str, str]:
        """Give the unit's name and the file that it was loaded from (empty: none)."""
        name, fragment = self._ask(2, "get-property", _SERVICE, path, f"{_SERVICE}.Unit", "Id", "FragmentPath")
        return _read(_Text, name).data, _read(_Text, fragment).data

    def _ask(self, answers: int, *question: str) -> list[bytes]:
        self._require_trusted()
        left = self.until - SystemClock().monotonic()
        if left <= 0 or self.abandoned():
            raise _late()
        try:
            done = subprocess.run(  # noqa: S603 - root's own program at an absolute path; no argument is the caller's
                [
                    self.program,
                    "--system",
                    "--json=short",
                    "--auto-start=no",
                    f"--timeout={ATTEST_TIMEOUT:.0f}",
                    *question,
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=left,
                env={},
                cwd="/",
                close_fds=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise _late() from None
        except OSError:
            raise _unreachable() from None
        if done.returncode != 0:
            raise _unreachable()
        lines = done.stdout.removesuffix(b"\n").split(b"\n")
        if len(lines) != answers:
            raise _nonsense()
        return lines

    def _require_trusted(self) -> None:
        try:
            facts = Path(self.program).stat()
        except OSError:
            raise _unreachable() from None
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != self.root or facts.st_mode & WRITABLE_BY_OTHERS:
            raise AttestorFailed("busctl is not root's own program", code="systemd_not_trusted")


def _selectors(name: str, fragment: str) -> Iterator[Selector]:
    yield Selector.of(NAME, f"id:{name}")
    # A unit without a file has none; a path with control characters can be no selector.
    if fragment.startswith("/"):
        with suppress(Invalid):
            yield Selector.of(NAME, f"fragment_path:{fragment}")


def _read(model: type[M], line: bytes) -> M:
    try:
        return model.model_validate(loads(line, max_bytes=MAX_ANSWER))
    except (ValidationError, Invalid):
        raise _nonsense() from None


def _late() -> AttestorFailed:
    return AttestorUnavailable("systemd did not answer in time", code="attestor_timeout")


def _nonsense() -> AttestorFailed:
    return AttestorFailed("systemd's answer is not what it should be", code="systemd_answer")


def _unreachable() -> AttestorFailed:
    return AttestorUnavailable(
        "systemd cannot be asked about the process",
        code="systemd_unreachable",
        hint="busctl and the system bus must work where the agent runs: try busctl status",
    )
