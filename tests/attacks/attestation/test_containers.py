"""Forged containers, and a container runtime that lies, before an agent that asks it (A15, A16, A17, A18).

The control groups are the machine's own; the runtime is a fake on a socket of root's.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import pytest_asyncio

from tests.attacks.attestation.arena import (
    EVIL_UID,
    REFUSED,
    WITH_PATHS,
    Arena,
    Puppet,
    Witness,
    arena,
    bystander_of,
    served,
)
from tests.attacks.attestation.control_groups import ControlGroups
from tests.fakes.runtime import FakeRuntime, answer, inspected

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.root("control groups, a runtime's socket, other users"),
]
PAYMENTS, MINE, UNKNOWN = "fedcba98" * 8, "0123abcd" * 8, "00ff00ff" * 8
OTHER_IMAGE = "b" * 64


@dataclass
class Yard:
    """Two containers: the victim's, which is called payments, and one that the attacker may fill as he likes."""

    it: Arena
    runtime: FakeRuntime
    groups: ControlGroups
    witness: Witness

    @asynccontextmanager
    async def process(self, group: str = "", owner: int = 0) -> AsyncIterator[Puppet]:
        """A process of the attacker's, in this control group."""
        async with self.it.puppet(uid=EVIL_UID) as puppet:
            if group:
                self.groups.put(puppet.pid, group, owner=owner)
            yield puppet

    async def ask(self, group: str = "", owner: int = 0):
        """What a new process of the attacker's there is answered."""
        async with self.process(group, owner) as puppet:
            return await puppet.do("ask", self.it.socket)

    async def payments_is_served(self) -> None:
        async with self.process(f"/docker/{PAYMENTS}") as honest:
            # What is in the container is the container's: also a process that the attacker's user runs.
            assert await honest.do("ask", self.it.socket) == served("/wl/payments", "/wl/weak")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[Yard]:
    with FakeRuntime() as runtime, ControlGroups() as groups:
        docker = f'[agent.attestors.workload.docker]\ndocker_socket_path = "{runtime.url}"\n'
        async with (
            arena(attestors=lambda it: WITH_PATHS + docker) as it,
            bystander_of(it) as witness,
            it.puppet() as first,
            it.puppet() as mine,
        ):
            groups.put(first.pid, f"/docker/{PAYMENTS}")
            groups.put(mine.pid, f"/docker/{MINE}")
            runtime.containers[PAYMENTS] = inspected(PAYMENTS, pid=first.pid, Labels={"app": "payments"})
            it.register("payments", "docker:label:app:payments")
            it.register("weak", f"unix:uid:{EVIL_UID}", f"unix:path:{it.evil}")
            yard = Yard(it, runtime, groups, witness)
            yard.first, yard.mine = first, mine
            yield yard
            assert "Traceback" not in it.log


@pytest_asyncio.fixture(loop_scope="module")
async def yard(shared: Yard) -> AsyncIterator[Yard]:
    """The yard, with a true runtime; afterwards the honest ones must be served, and the bystander all along."""
    truth = dict(shared.runtime.containers)
    await shared.witness.report()
    yield shared
    shared.runtime.faults.clear()
    shared.runtime.containers = truth
    await shared.payments_is_served()
    assert await shared.ask() == served("/wl/weak")
    report = await shared.witness.report()
    assert not report["failed"], report


# --- A15: places that look like a container's


FORGED = (
    # What systemd gives a user, with a group of the victim's name in it.
    (f"/broker-test.slice/user@{EVIL_UID}.service/docker/{PAYMENTS}", EVIL_UID),
    (f"/broker-test.slice/user-{EVIL_UID}.slice/docker-{PAYMENTS}.scope", EVIL_UID),
    # Below the container, in a part that belongs to a user.
    (f"/docker/{PAYMENTS}/handed-on", EVIL_UID),
    # A unit of that name, in the system's own tree: systemd-run --unit docker-<id> --scope.
    (f"/broker-test.slice/docker-{PAYMENTS}.scope", 0),
    (f"/docker-{PAYMENTS}.scope", 0),
    # One id in the other, either way round.
    (f"/docker/{PAYMENTS}/docker/{MINE}", 0),
    (f"/docker/{MINE}/docker/{PAYMENTS}", 0),
    (f"/docker/{MINE}/{PAYMENTS}", 0),
    # A container that the runtime never made, and names that are nearly right.
    (f"/docker/{UNKNOWN}", 0),
    (f"/broker-test/{PAYMENTS}", 0),
    (f"/broker-test/docker-{PAYMENTS}", 0),
)
# A rootless container of the user's own: nobody speaks for it here, and it is none of the system's.
ROOTLESS = f"/user.slice/user-{EVIL_UID}.slice/user@{EVIL_UID}.service/docker-{PAYMENTS}.scope"


@pytest.mark.bears("A15")
async def test_a_forged_place_gives_neither_the_containers_identity_nor_a_weaker_one(yard: Yard) -> None:
    for group, owner in FORGED:
        assert await yard.ask(group, owner) in REFUSED, group
    assert await yard.ask(ROOTLESS, EVIL_UID) in (*REFUSED, served("/wl/weak"))


@pytest.mark.bears("A15")
async def test_what_a_process_mounts_says_nothing_of_its_container(yard: Yard) -> None:
    """Its own mountinfo full of the victim's container id: nobody reads that."""
    script = (
        f'd=$(mktemp -d); mount -t tmpfs none $d; mkdir -p $d/docker/containers/{PAYMENTS}; '
        f'mount --bind $d/docker/containers/{PAYMENTS} /mnt; exec "$0" "$@"'
    )  # fmt: skip
    inside = ("unshare", "--user", "--map-root-user", "--mount", "/bin/sh", "-e", "-c", script)
    async with yard.it.asks(uid=EVIL_UID, inside=inside) as attacker:
        with open(f"/proc/{attacker.pid}/mountinfo") as mounts:
            assert PAYMENTS in mounts.read()
        assert attacker.answer == served("/wl/weak")


# --- A16: a runtime that lies, or is none


def _hundred_megabytes():
    head = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 104857612\r\n\r\n{"Id": "'
    piece = b"a" * (1 << 20)
    return iter([head, *[piece] * 100, b'"}'])


@pytest.mark.bears("A16")
async def test_a_runtime_that_answers_wrongly_refuses_its_containers_and_nobody_else(yard: Yard) -> None:
    where = f"/docker/{PAYMENTS}"
    true = inspected(PAYMENTS, pid=yard.first.pid, Labels={"app": "payments"})
    faults = {
        "500": answer(b'{"message":"no"}', "500 Internal Server Error"),
        "404": answer(b'{"message":"No such container"}', "404 Not Found"),
        "a redirect": b"HTTP/1.1 301 Moved\r\nLocation: http://localhost/x\r\nContent-Length: 0\r\n\r\n",
        "half of it": b'HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n{"Id": "' + PAYMENTS.encode(),
        "no JSON": answer(b"<html>"),
        "a twin": answer(b'{"Id": "%s", "Id": "x"}' % PAYMENTS.encode()),
    }
    for name, fault in faults.items():
        yard.runtime.faults.clear()
        yard.runtime.fault(fault)
        assert await yard.ask(where) in REFUSED, name
    yard.runtime.faults["/containers/"] = _hundred_megabytes
    assert await yard.ask(where) in REFUSED
    yard.runtime.faults.clear()
    lies = {
        "another container's": inspected(MINE, pid=yard.first.pid, Labels={"app": "payments"}),
        "not running": inspected(PAYMENTS, pid=yard.first.pid, running=False, Labels={"app": "payments"}),
        "no pid": inspected(PAYMENTS, pid=0, Labels={"app": "payments"}),
        "a pid of another group": inspected(PAYMENTS, pid=yard.mine.pid, Labels={"app": "payments"}),
        "a pid of no group": inspected(PAYMENTS, pid=os.getpid(), Labels={"app": "payments"}),
    }
    for name, lie in lies.items():
        yard.runtime.containers[PAYMENTS] = lie
        assert await yard.ask(where) in REFUSED, name
    yard.runtime.containers[PAYMENTS] = true


@pytest.mark.bears("A16")
async def test_a_runtime_that_does_not_answer_holds_up_its_containers_only(yard: Yard) -> None:
    yard.runtime.faults["/containers/"] = lambda: iter([b"HTTP/1.1 200 OK\r\n", *_silence(yard.runtime)])
    async with yard.process(f"/docker/{PAYMENTS}") as waiting:
        await waiting.do("connect", yard.it.socket)
        held = await waiting.give()
        stream = await held.open_stream()
        assert await yard.ask() == served("/wl/weak")  # of the same user, outside of containers
        assert await held.hear(stream) in REFUSED


def _silence(runtime: FakeRuntime):
    runtime.released.wait(5.0)  # longer than it is asked
    yield b""


@pytest.mark.bears("A16")
@pytest.mark.parametrize("what", ["a link to it", "another user's", "nothing", "a file"])
async def test_a_socket_that_is_not_the_runtimes(yard: Yard, what: str) -> None:
    path = yard.runtime.path
    aside = path.with_name("aside")
    path.rename(aside)
    try:
        if what == "a link to it":
            path.symlink_to(aside)
        elif what == "another user's":
            os.link(aside, path)
            os.chown(path, EVIL_UID, EVIL_UID)
        elif what == "a file":
            path.write_text("")
        assert await yard.ask(f"/docker/{PAYMENTS}") in REFUSED
    finally:
        os.chown(aside, 0, 0)
        aside.replace(path)
        aside.unlink(missing_ok=True)


# --- A17: labels that are nearly the victim's


NEARLY = (
        {"app": "Payments"}, {"App": "payments"}, {"app ": "payments"}, {"app": "payments "}, {"app": "payments\n"},
        {"app:payments": ""}, {"": "app:payments"}, {"label:app": "payments"}, {"\u0430pp": "payments"}, {"app": "paymentѕ"},
        {"app\n": "payments"}, {"app": "payments" * 8192}, {"x": "docker:label:app:payments"}, {"x": "\ndocker:label:app:payments"},
        {"app": "paym\u200bents"}, {"unix": "uid:0"}, {"x": "unix:uid:0"}, {},
)  # fmt: skip


@pytest.mark.bears("A17")
async def test_a_label_that_is_nearly_the_victims(yard: Yard) -> None:
    yard.it.register("root", "unix:uid:0", f"unix:path:{yard.it.evil}")
    for labels in NEARLY:
        yard.runtime.containers[MINE] = inspected(MINE, pid=yard.mine.pid, Labels=labels)
        assert await yard.ask(f"/docker/{MINE}") == served("/wl/weak"), labels
    yard.it.server.remove("root")


@pytest.mark.bears("A17")
async def test_all_selectors_of_an_entry_are_needed_and_colons_are_not_moved(yard: Yard) -> None:
    yard.it.register("both", "docker:label:one:1", "docker:label:two:2")
    yard.it.register("colon", "docker:label:a:b:c")
    asked = {
        ("/wl/weak",): [{"one": "1"}, {"two": "2"}, {"one": "2", "two": "1"}, {"a:b": "c"}],
        ("/wl/both", "/wl/weak"): [{"one": "1", "two": "2", "three": "3"}],
        ("/wl/colon", "/wl/weak"): [{"a": "b:c"}],
    }
    for expected, cases in asked.items():
        for labels in cases:
            yard.runtime.containers[MINE] = inspected(MINE, pid=yard.mine.pid, Labels=labels)
            assert await yard.ask(f"/docker/{MINE}") == served(*expected), labels
    for name in ("both", "colon"):
        yard.it.server.remove(name)


# --- A18: an image that carries the victim's label


@pytest.mark.bears("A18")
async def test_a_label_of_the_image_is_not_one_of_the_containers(yard: Yard) -> None:
    spoofed = {"Id": f"sha256:{OTHER_IMAGE}", "Config": {"Labels": {"app": "payments"}, "Env": None}}
    yard.runtime.images[OTHER_IMAGE] = spoofed
    yard.runtime.containers[MINE] = inspected(MINE, pid=yard.mine.pid, Labels={"app": "payments"}) | {
        "Image": f"sha256:{OTHER_IMAGE}"
    }
    assert await yard.ask(f"/docker/{MINE}") == served("/wl/weak")
