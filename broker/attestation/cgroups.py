"""Reads what the kernel writes about control groups, and knows the shapes in which runtimes name containers there.

Text in, facts out: nothing is opened here, and no runtime is asked. That a path has a shape proves nothing yet: whoever
owns a control group may name it as he likes. ``containers`` finds out whose directories they are.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Final

from broker.attestation.contract import AttestorFailed

MAX_LINES: Final = 4096  # of /proc/<pid>/cgroup: one per hierarchy, and the kernel has some fifteen
MAX_PATH: Final = 4096  # bytes; the kernel's own buffer for a path (PATH_MAX), longer ones it does not write
MAX_MATCHER: Final = 512  # characters of an operator's own pattern


class Runtime(StrEnum):
    """Who made a container, as far as its control group's name says."""

    DOCKER = "docker"
    PODMAN = "podman"
    CONTAINERD = "containerd"
    CRIO = "crio"


@dataclass(frozen=True, slots=True)
class Cgroup:
    """One line of ``/proc/<pid>/cgroup``: a hierarchy (no controllers: version 2) and the process's path in it."""

    hierarchy: int
    controllers: frozenset[str]
    path: str


@dataclass(frozen=True, slots=True)
class CgroupMount:
    """A mounted control group hierarchy: ``root`` is the path within it that is seen at ``point``."""

    device: tuple[int, int]
    root: str
    point: str
    is_unified: bool
    options: frozenset[str]

    def holds(self, cgroup: Cgroup) -> bool:
        """Say whether this is the hierarchy of that line, seen from its top."""
        return self.root == "/" and self.is_unified == (not cgroup.controllers) and cgroup.controllers <= self.options


@dataclass(frozen=True, slots=True)
class Place:
    """Where one hierarchy puts a process: in the container ``id``, whose own control group is ``home``."""

    cgroup: Cgroup
    id: str
    home: str
    runtime: Runtime | None  # None: the shape is shared by several
    pod_uid: str | None  # of Kubernetes
    user: int | None  # whose service manager made it, where that is not the system's


@dataclass(frozen=True, slots=True)
class Matcher:
    """An operator's own shape, made by ``parse_matcher``."""

    pattern: re.Pattern[str]


_ID: Final = "(?P<id>[0-9a-f]{64})"
_SLICES: Final = r"(?:/(?![^/]*libpod_pod_)[^/]+\.slice)*"
_POD_OF_PODMAN: Final = r"(?:/[^/]*libpod_pod_(?P<group>[0-9a-f]{64})\.slice)?"
_UNIT: Final = r"/(?!user@)[^/]+\.(?:service|scope)"
_KUBEPODS: Final = r"(?:/kubelet|/kubepods)?/kubepods(?:/(?:besteffort|burstable|guaranteed))?/pod[^/]+"
_USER: Final = r"/user\.slice/user-(?P<user>[0-9]{1,10})\.slice/user@(?P=user)\.service"


def _shape(runtime: Runtime | None, home: str) -> tuple[Runtime | None, re.Pattern[str]]:
    return runtime, re.compile(rf"(?P<home>{home})(?:/.*)?", re.DOTALL)


# NOTE(security): only these. "64 hexadecimal digits somewhere" would let anybody with a control group of his own choose.
_SHAPES: Final = (
    _shape(Runtime.DOCKER, f"/docker/{_ID}"),
    _shape(Runtime.DOCKER, rf"{_SLICES}/docker-{_ID}\.scope"),
    _shape(Runtime.DOCKER, f"/ecs/[^/]+(?:/[^/]+)?/{_ID}"),
    _shape(Runtime.PODMAN, rf"{_SLICES}{_POD_OF_PODMAN}/libpod-{_ID}\.scope"),
    _shape(Runtime.PODMAN, f"/libpod_parent(?:/(?P<group>[0-9a-f]{{64}}))?/libpod-{_ID}"),
    _shape(Runtime.PODMAN, f"{_SLICES}{_UNIT}/libpod-payload-{_ID}"),
    _shape(Runtime.CONTAINERD, rf"{_SLICES}/(?:cri-containerd|nerdctl)-{_ID}\.scope"),
    _shape(Runtime.CONTAINERD, rf"{_SLICES}(?:{_UNIT})?/[^/:]+\.slice:cri-containerd:{_ID}"),
    _shape(Runtime.CONTAINERD, rf"/(?:default|k8s\.io)/{_ID}"),
    _shape(Runtime.CRIO, rf"{_SLICES}/crio-{_ID}\.scope"),
    _shape(Runtime.CRIO, f"{_KUBEPODS}/crio-{_ID}"),
    _shape(None, f"{_KUBEPODS}/{_ID}"),
    # Made by a user's own service manager: recognised so that it is not taken for the system's.
    _shape(Runtime.DOCKER, rf"{_USER}{_SLICES}/docker-{_ID}\.scope"),
    _shape(Runtime.PODMAN, rf"{_USER}{_SLICES}{_POD_OF_PODMAN}/libpod-{_ID}\.scope"),
    _shape(Runtime.PODMAN, f"{_USER}{_SLICES}(?:{_UNIT})?/libpod-payload-{_ID}"),
)
_BARE: Final = _shape(None, f"/{_ID}")  # a sibling, seen from inside a control group namespace
_MONITOR: Final = re.compile(r"(?:/[^/]+)*/(?:libpod|crio)-conmon-[0-9a-f]{64}(?:\.scope)?(?:/[^/]+)*")
_WORD: Final = re.compile("(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
_POD: Final = re.compile(
    r"/[^/]*kubepods[^/]*-pod([0-9A-Za-z_]{1,64})\.slice[/:]|/kubepods/(?:[^/]+/)?pod([^/]{1,64})/"
)
_UPWARD: Final = re.compile(r"(?:/\.\.)+(?=/|\Z)")
_DEVICE: Final = re.compile("([0-9]{1,4}):([0-9]{1,7})")  # 12 and 20 bits (linux/kdev_t.h)
_ESCAPE: Final = re.compile(r"\\([0-7]{3})")


@lru_cache(maxsize=32)
def parse_cgroups(text: bytes) -> tuple[Cgroup, ...]:
    """Read ``/proc/<pid>/cgroup`` (cgroups(7)); raises ``AttestorFailed``."""
    lines = _decoded(text).split("\n")
    if lines.pop() or len(lines) > MAX_LINES:
        raise _unreadable()
    found = tuple(_cgroup(line) for line in lines)
    if len({(one.hierarchy, one.controllers) for one in found}) != len(found):
        raise _unreadable()
    return found


@lru_cache(maxsize=1)  # they hardly change, and some hundred lines are read for each container
def parse_cgroup_mounts(mountinfo: bytes) -> tuple[CgroupMount, ...]:
    """Read the control group hierarchies out of ``/proc/self/mountinfo`` (proc(5)); raises ``AttestorFailed``.

    Only the agent's own: another process's mounts are that process's to arrange.
    """
    rows = (line.split(" ") for line in _decoded(mountinfo).split("\n") if " - cgroup" in line)
    return tuple(mount for row in rows if (mount := _mount(row)) is not None)


def parse_matcher(text: str) -> Matcher:
    """Read an operator's pattern such as ``/my.slice/*/<id>``: ``*`` is one component. Raises ``ValueError``."""
    parts = text.split("/")
    if len(text) > MAX_MATCHER or parts[0] or len(parts) < 3 or parts.count("<id>") != 1:
        raise ValueError("write it as /parent/<id>: an absolute path with one component <id> below another one")
    if any(part in {"", ".", ".."} or (part not in {"*", "<id>"} and set(part) & set("*<>")) for part in parts[1:]):
        raise ValueError("each component is a name, * or <id>")
    last = parts.index("<id>") + 1
    shape = "".join(f"/{_component(part)}" for part in parts[1:last])
    below = "".join(f"/{_component(part)}" for part in parts[last:])
    return Matcher(re.compile(f"(?P<home>{shape}){below}"))


def find_places(cgroups: Iterable[Cgroup], matchers: Sequence[Matcher] = ()) -> tuple[Place, ...]:
    """Tell the container that the lines agree on; empty: none. Raises ``AttestorFailed`` where they leave a doubt."""
    places = tuple(place for one in cgroups if (place := _place(one, matchers)) is not None)
    if len({(place.id, place.runtime, place.user, place.pod_uid) for place in places}) > 1:
        raise _ambiguous()
    return places


def is_within(path: str, home: str) -> bool:
    """Say whether ``path`` is ``home`` or below it, component by component."""
    return path == home or path.startswith(f"{home}/")


def is_outside_namespace(path: str) -> bool:
    """Say whether the path leads out of the reader's own control group namespace (cgroup_namespaces(7))."""
    return path == "/.." or path.startswith("/../")


def outside_namespace() -> AttestorFailed:
    """Make the refusal for a container that the reader cannot look at."""
    return AttestorFailed(
        "the agent is in a control group namespace of its own and cannot see whose containers these are",
        code="cgroup_namespace",
        hint="run the agent in the host's: docker run --cgroupns=host, or a privileged pod",
    )


def _cgroup(line: str) -> Cgroup:
    number, _, rest = line.partition(":")
    names, _, path = rest.partition(":")
    if not path.startswith("/") or re.fullmatch("[0-9]{1,10}", number) is None:
        raise _unreadable()
    if len(path) > MAX_PATH:
        raise _unreadable()
    return Cgroup(int(number), frozenset(names.split(",")) if names else frozenset(), path)


def _mount(row: list[str]) -> CgroupMount | None:
    try:
        separator = row.index("-", 6)
        kind, _, options = row[separator + 1 : separator + 4]
    except ValueError:
        raise _unreadable() from None
    numbers = _DEVICE.fullmatch(row[2])
    if numbers is None:
        raise _unreadable()
    if kind not in {"cgroup", "cgroup2"}:
        return None
    root, point = (_ESCAPE.sub(lambda match: chr(int(match[1], 8)), field) for field in row[3:5])
    return CgroupMount(
        (int(numbers[1]), int(numbers[2])), root, point, kind == "cgroup2", frozenset(options.split(","))
    )


def _place(cgroup: Cgroup, matchers: Sequence[Matcher]) -> Place | None:
    words = _WORD.findall(cgroup.path)
    if not words:
        return None
    upward = _UPWARD.match(cgroup.path)
    start = upward.end() if upward else 0
    path = cgroup.path[start:]
    found = tuple(_matches(path, matchers, with_bare=upward is not None))
    if not found:
        if len(words) == 1 and _MONITOR.fullmatch(path):
            return None  # the runtime's supervisor: a process of the host
        if upward is not None:
            raise outside_namespace()  # what stands above is not seen, so no shape of a runtime is whole
        raise AttestorFailed(
            "the process is in a control group that looks like a container's, but is no place of a known runtime",
            code="container_not_anchored",
            hint="name the place in container_id_cgroup_matchers if a runtime does put containers there",
        )
    runtime, match = found[0]
    named = match.groupdict()
    # NOTE(security): a second id above or below means nesting or forgery; which of them was meant cannot be told.
    if words != [word for word in (named.get("group"), named["id"]) if word] or any(
        m["id"] != named["id"] for _, m in found
    ):
        raise _ambiguous()
    pod = _POD.search(match["home"])
    return Place(
        cgroup,
        id=named["id"],
        home=cgroup.path[: start + match.end("home")],
        runtime=runtime,
        pod_uid=(pod[1].replace("_", "-") if pod[1] else pod[2]) if pod else None,
        user=int(named["user"]) if named.get("user") else None,
    )


def _matches(
    path: str, matchers: Sequence[Matcher], *, with_bare: bool
) -> Iterable[tuple[Runtime | None, re.Match[str]]]:
    for runtime, pattern in (*_SHAPES, *((_BARE,) if with_bare else ())):
        if (match := pattern.fullmatch(path)) is not None:
            yield runtime, match
    for matcher in matchers:
        if (match := matcher.pattern.fullmatch(path)) is not None:
            yield Runtime.DOCKER, match


def _component(part: str) -> str:
    return {"*": "[^/]+", "<id>": _ID}.get(part) or re.escape(part)


def _decoded(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")  # a name may be any bytes


def _unreadable() -> AttestorFailed:
    return AttestorFailed("the kernel's description of control groups cannot be read", code="cgroup_unreadable")


def _ambiguous() -> AttestorFailed:
    return AttestorFailed(
        "the process's control groups name more than one container",
        code="container_ambiguous",
        hint="containers inside containers are attested by an agent inside the outer one",
    )
