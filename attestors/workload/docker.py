"""Describes a process by the Docker or Podman container that it is in, as the runtime itself tells it.

Selectors are SPIRE's: ``docker:label docker:env docker:image_id docker:image_config_digest``. Which container it is comes
from ``broker.attestation.containers``, which trusts neither names nor the caller; the runtime is asked over its Unix
socket, which must be root's. One question for the container, and one for an image that is not known yet. Environment
values are often secrets: they become selectors and stand in no message.
"""

import asyncio
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from enum import StrEnum
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from broker.attestation.cgroups import Runtime, parse_matcher
from broker.attestation.containers import THIS_NODE, Container, Node, locate, require_member, require_owned
from broker.attestation.contract import AttestorFailed, SelectorDoc, Strength
from broker.attestation.process import Process
from broker.attestation.reads import BlockingReads
from broker.attestation.runtime_socket import MAX_ANSWER, NotThere, RuntimeSocket, late
from broker.errors import Invalid
from broker.spiffe import Selector
from broker.spiffe.strictjson import loads

NAME = "docker"
ATTEST_TIMEOUT = 4.0  # seconds for both questions; a hung runtime refuses its own containers, and nobody else
MAX_DEPTH = 32  # of the JSON: extensions put documents of their own into HostConfig
LARGE_ANSWER = 32 * 1024  # bytes: the reading of a larger one, some milliseconds, would hold up other callers
MAX_IMAGES = 64  # remembered images, of at most MAX_ANSWER each and usually of 1 KiB
_DIGEST = re.compile(r"(?:sha256:)?([0-9a-f]{64})")
_SOCKET = re.compile(r"unix://(/[^\x00]+)")
M = TypeVar("M", bound=BaseModel)


class Kind(StrEnum):
    """What a selector tells of a container; the first part of its value."""

    LABEL = "label"
    ENV = "env"
    IMAGE_ID = "image_id"
    IMAGE_CONFIG_DIGEST = "image_config_digest"


_Prefix = Annotated[str, Field(min_length=1)]  # the empty one would be every label's


class DockerSettings(BaseModel):
    """Which runtimes are asked, and what of their answers counts. An empty socket path: that runtime is not asked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    docker_socket_path: str = Field(
        default="unix:///var/run/docker.sock", description="Docker's socket; it must belong to root."
    )
    podman_socket_path: str = Field(
        default="unix:///run/podman/podman.sock", description="The system Podman's socket; it must belong to root."
    )
    podman_socket_path_template: str = Field(
        default="unix:///run/user/%d/podman/podman.sock",
        description="A user's own Podman's socket, with one %d for the user id; used with use_rootless_podman.",
    )
    use_rootless_podman: bool = Field(
        default=False, description="Believe each user's own Podman: that user then writes the selectors himself."
    )
    docker_version: str = Field(
        default="",
        pattern="^(?:[0-9]{1,2}[.][0-9]{1,3})?$",  # Rust's, where $ is the very end
        description="API version to ask for; empty: the runtime's.",
    )
    container_id_cgroup_matchers: tuple[str, ...] = Field(
        default=(), description="Further places of Docker's containers, such as /my.slice/*/<id>."
    )
    use_new_container_locator: Literal[True] = Field(
        default=True, description="For SPIRE's configurations; there is no other locator."
    )
    require_runtime_label: bool = Field(
        default=True, description="A label counts only as given at run time: the image's own with that value does not."
    )
    require_runtime_env: bool = Field(
        default=True,
        description="A variable counts only as given at run time: the image's own with that value does not.",
    )
    trusted_label_prefixes: tuple[_Prefix, ...] | None = Field(
        default=None, description="Only labels whose key begins with one of these count; unset: every label."
    )
    trusted_kinds: frozenset[Kind] = Field(
        default=frozenset(Kind),
        min_length=1,
        description="Kinds of selectors that are given: label, env, image_id, image_config_digest.",
    )

    @field_validator("docker_socket_path", "podman_socket_path")
    @classmethod
    def _socket_path(cls, value: str) -> str:
        if value and _SOCKET.fullmatch(value) is None:
            raise ValueError("write it as unix:///absolute/path, or leave it empty")
        return value

    @field_validator("podman_socket_path_template")
    @classmethod
    def _template(cls, value: str) -> str:
        if value.count("%") != 1 or "%d" not in value:
            raise ValueError("it needs one %d, for the user id, and no other %")
        return cls._socket_path(value)

    @field_validator("container_id_cgroup_matchers")
    @classmethod
    def _matchers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for one in value:
            parse_matcher(one)
        return value


class _Declared(BaseModel):
    """What a container or image says of itself. Never in a message: its environment may hold secrets."""

    model_config = ConfigDict(strict=True, hide_input_in_errors=True)

    labels: dict[str, str] | None = Field(default=None, alias="Labels", repr=False)
    env: list[str] | None = Field(default=None, alias="Env", repr=False)
    image: str | None = Field(default=None, alias="Image")


class _State(BaseModel):
    model_config = ConfigDict(strict=True, hide_input_in_errors=True)

    is_running: bool = Field(alias="Running")
    pid: int = Field(alias="Pid")


class _Inspected(BaseModel):
    """The part of a container's inspection that is read."""

    model_config = ConfigDict(strict=True, hide_input_in_errors=True)

    id: str = Field(alias="Id")
    image: str = Field(alias="Image")
    state: _State = Field(alias="State")
    config: _Declared = Field(alias="Config")


class _Image(BaseModel):
    model_config = ConfigDict(strict=True, hide_input_in_errors=True)

    id: str = Field(alias="Id")
    config: _Declared | None = Field(default=None, alias="Config")


def _docs(settings: DockerSettings) -> Iterator[SelectorDoc]:
    """Say what is given under these settings, and who stands behind it."""
    # NOTE(security): with a user's own Podman that user may answer anything, under the same names as everybody else's.
    runtime = Strength.SELF_DECLARED if settings.use_rootless_podman else Strength.RUNTIME
    label = runtime if settings.require_runtime_label else Strength.SELF_DECLARED
    env = runtime if settings.require_runtime_env else Strength.SELF_DECLARED
    for kind, form, meaning, strength in (
        (Kind.LABEL, "<key>:<value>", "a label set when the container was made", label),
        (Kind.ENV, "<NAME=value>", "a variable set when the container was made", env),
        (Kind.IMAGE_ID, "<name>", "the image's name as given to the runtime", runtime),
        (Kind.IMAGE_CONFIG_DIGEST, "<sha256:hex>", "the image by its content", runtime),
    ):
        if kind in settings.trusted_kinds:
            yield SelectorDoc(f"{NAME}:{kind}:{form}", meaning, strength)


class DockerAttestor:
    """See the module; ``DockerSettings`` are its settings."""

    name: ClassVar[str] = NAME
    settings: ClassVar[type[BaseModel]] = DockerSettings
    selectors: tuple[SelectorDoc, ...] = tuple(_docs(DockerSettings()))

    def __init__(self, settings: DockerSettings, node: Node = THIS_NODE) -> None:
        self.selectors = tuple(_docs(settings))
        self._settings = settings
        self._node = node
        self._matchers = tuple(parse_matcher(one) for one in settings.container_id_cgroup_matchers)
        self._reads = BlockingReads()
        self._images: OrderedDict[tuple[str, str], _Declared] = OrderedDict()

    async def attest(self, process: Process) -> frozenset[Selector]:
        """Give the selectors of the process's container; none outside of Docker and Podman.

        Raises ``AttestorFailed``, after four seconds at the latest.
        """
        container = locate(process.facts.cgroup, self._matchers)
        engine = self._engine(container) if container is not None else None
        if container is None or engine is None:
            return frozenset()
        try:
            async with asyncio.timeout(ATTEST_TIMEOUT):
                return await self._describe(container, engine)
        except TimeoutError:
            raise late() from None

    def _engine(self, container: Container) -> RuntimeSocket | None:
        """Choose whom to ask; ``None``: a container of somebody who is not served here."""
        url, owner, reads = "", self._node.root, None
        if container.user is not None:
            if container.runtime is Runtime.PODMAN and self._settings.use_rootless_podman:
                url = self._settings.podman_socket_path_template % container.user
                owner, reads = container.user, self._reads
        elif container.runtime is Runtime.PODMAN:
            url = self._settings.podman_socket_path
        elif container.runtime in {Runtime.DOCKER, None}:
            url = self._settings.docker_socket_path
        if not url:
            return None
        version = self._settings.docker_version
        return RuntimeSocket(url.removeprefix("unix://"), owner, f"/v{version}" if version else "", reads)

    async def _describe(self, container: Container, engine: RuntimeSocket) -> frozenset[Selector]:
        require_owned(container, self._node)
        try:
            inspected = await self._asked(_Inspected, engine, f"/containers/{container.id}/json")
        except NotThere:
            if container.runtime is None:
                return frozenset()  # the place is shared with other runtimes, and Docker says that it is not its own
            raise AttestorFailed("the runtime does not know the container", code="container_unknown") from None
        if inspected.id != container.id:
            raise AttestorFailed("the runtime answered for another container", code="runtime_answer")
        if not inspected.state.is_running or inspected.state.pid <= 0:
            raise AttestorFailed("the runtime says that the container is not running", code="container_not_running")
        require_member(container, inspected.state.pid, self._node)
        digest = _digest(inspected.image)
        counted = self._counted(inspected.config, await self._image(digest, engine))
        return frozenset(_selectors(counted, digest, self._settings.trusted_kinds))

    def _counted(self, config: _Declared, image: _Declared) -> _Declared:
        """Leave out of a container's declarations what the settings do not let count."""
        settings = self._settings
        own = (image.labels or {}).items() if settings.require_runtime_label else ()
        labels = dict((config.labels or {}).items() - own)
        if (prefixes := settings.trusted_label_prefixes) is not None:
            labels = {key: value for key, value in labels.items() if key.startswith(prefixes)}
        without = set(image.env or ()) if settings.require_runtime_env else set()
        return _Declared(Labels=labels, Env=[one for one in config.env or () if one not in without], Image=config.image)

    async def _image(self, digest: str, engine: RuntimeSocket) -> _Declared:
        key = (engine.path, digest)  # by socket: one user's Podman must not speak of others' images
        if (known := self._images.get(key)) is not None:
            self._images.move_to_end(key)
            return known
        try:
            image = await self._asked(_Image, engine, f"/images/sha256:{digest}/json")
        except NotThere:
            raise AttestorFailed("the runtime does not know the container's image", code="image_unknown") from None
        if _digest(image.id) != digest:
            raise AttestorFailed("the runtime answered for another image", code="runtime_answer")
        declared = image.config or _Declared()
        self._images[key] = declared
        while len(self._images) > MAX_IMAGES:
            self._images.popitem(last=False)
        return declared

    async def _asked(self, model: type[M], engine: RuntimeSocket, path: str) -> M:
        body = await engine.get(path)
        if len(body) <= LARGE_ANSWER:
            return _read(model, body)
        return await self._reads.run(engine.owner, lambda _: _read(model, body))


def _selectors(config: _Declared, digest: str, kinds: frozenset[Kind]) -> Iterator[Selector]:
    for kind, value in _values(config, digest):
        if kind in kinds:
            # A value that cannot be a selector's (control characters, too long) gives none.
            with suppress(Invalid):
                yield Selector.of(NAME, f"{kind}:{value}")


def _values(config: _Declared, digest: str) -> Iterator[tuple[Kind, str]]:
    for key, value in (config.labels or {}).items():
        # NOTE(security): "a" with "b:c" and "a:b" with "c" would be one text; a key with a colon gives none.
        if key and ":" not in key:
            yield Kind.LABEL, f"{key}:{value}"
    for variable in filter(None, config.env or ()):
        yield Kind.ENV, variable
    if config.image:
        yield Kind.IMAGE_ID, config.image
    yield Kind.IMAGE_CONFIG_DIGEST, f"sha256:{digest}"


def _read(model: type[M], body: bytes) -> M:
    try:
        return model.model_validate(loads(body, max_bytes=MAX_ANSWER, max_depth=MAX_DEPTH))
    except (ValidationError, Invalid):
        raise AttestorFailed("the runtime's answer is not what it should be", code="runtime_answer") from None


def _digest(text: str) -> str:
    match = _DIGEST.fullmatch(text)
    if match is None:
        raise AttestorFailed("the runtime names an image in an unknown way", code="runtime_answer")
    return match[1]
