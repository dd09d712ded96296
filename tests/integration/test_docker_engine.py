"""The docker attestor against a real Docker Engine, real containers and real control groups."""

import os

import pytest

from broker.attestation.contract import AttestorFailed
from tests.integration.control_groups import tops
from tests.integration.docker_engine import IMAGE, PROGRAM, held, runs_its_command, until

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]


async def test_each_container_has_its_own_selectors(engine) -> None:
    orders = engine.run("--label", "app=orders", "--env", "TIER=prod")
    billing = engine.run("--label", "app=billing", "--label", "a:b=c")
    plain = engine.run()
    common = {"docker:image_id:probe:1", f"docker:image_config_digest:{engine.digest()}"}
    assert await engine.selectors(engine.pid(orders)) == {"docker:label:app:orders", "docker:env:TIER=prod"} | common
    assert await engine.selectors(engine.pid(billing)) == {"docker:label:app:billing"} | common
    assert await engine.selectors(engine.pid(plain)) == common
    assert await engine.selectors(os.getpid()) == set()


@pytest.mark.bears("A18")
async def test_an_image_cannot_name_itself(engine) -> None:
    spoofing = engine.pid(engine.run())
    spoofed = {"docker:label:app:payments", "docker:env:ROLE=payments"}
    assert not spoofed & await engine.selectors(spoofing)
    # What SPIRE would give:
    assert spoofed <= await engine.selectors(spoofing, require_runtime_label=False, require_runtime_env=False)


async def test_a_command_run_in_the_container_by_another_user(engine) -> None:
    container = engine.run("--label", "app=orders")
    first = engine.pid(container)
    engine("exec", "-d", "-u", "1234:1234", container, "/bin/sleep", "999")

    def second() -> int:
        pids = [int(pid) for pid in (tops()[0] / "docker" / container / "cgroup.procs").read_text().split()]
        return next((pid for pid in pids if pid != first and runs_its_command(pid)), 0)

    pid = until(second, "docker exec starts nothing")
    assert os.stat(f"/proc/{pid}").st_uid == 1234
    assert await engine.selectors(pid) == await engine.selectors(first)


async def test_a_container_stopped_and_started(engine) -> None:
    container = engine.run("--label", "app=orders")
    with held(engine.pid(container)) as process:
        before = {str(one) for one in await engine.attestor().attest(process)}
        engine("stop", "-t", "0", container)
        with pytest.raises(AttestorFailed):
            await engine.attestor().attest(process)
    engine("start", container)
    assert await engine.selectors(engine.pid(container)) == before


# --- forgeries, with the control groups of this machine


OTHER = "fedcba9876543210" * 4


@pytest.mark.bears("A15")
async def test_forged_places_are_refused(engine, forge) -> None:
    victim = engine.run("--label", "app=payments-v2")
    ours = "/broker-test"
    for number in range(len(tops())):
        top = -1 - number
        forged = {
            # A user's delegated part of the tree.
            f"{ours}/user@4002.service/docker/{victim}": ("container_not_anchored", 4002),
            # The right name in a place where this engine puts nothing.
            f"{ours}.slice/docker-{victim}.scope": ("container_mismatch", 0),
            f"{ours}.slice/user-4002.slice/docker-{victim}.scope": ("container_not_anchored", 4002),
            # Inside the container, in a part that belongs to a user.
            f"/docker/{victim}/sub": ("container_not_anchored", 4002),
            # Nested ids.
            f"/docker/{victim}/docker/{OTHER}": ("container_ambiguous", 0),
            f"/docker/{OTHER}/{victim}": ("container_ambiguous", 0),
            # A container that the engine never made.
            f"/docker/{OTHER}": ("container_unknown", 0),
        }
        for path, (reason, owner) in forged.items():
            assert await engine.refusal(forge(path, top=top, owner=owner)) == reason, (tops()[top], path)


@pytest.mark.bears("A15")
async def test_hierarchies_that_name_two_containers_are_refused(engine, forge) -> None:
    if len(tops()) < 2:
        pytest.skip("this machine has one hierarchy")
    one, two = engine.run("--label", "app=one"), engine.run("--label", "app=two")
    assert await engine.refusal(forge(f"/docker/{one}", f"/docker/{two}")) == "container_ambiguous"


async def test_a_control_group_made_inside_by_root_is_the_containers(engine, forge) -> None:
    container = engine.run("--label", "app=orders")
    assert "docker:label:app:orders" in await engine.selectors(forge(f"/docker/{container}/init.scope"))


async def test_what_changes_on_a_running_container_changes_no_selector(engine) -> None:
    container = engine.run("--label", "app=orders")
    before = await engine.selectors(engine.pid(container))
    engine("rename", container, "renamed")
    engine("update", "--restart", "always", container)
    engine("tag", IMAGE, "other:1")
    assert await engine.selectors(engine.pid(container)) == before


ATTEST = """
import asyncio, json, os, sys
from attestors.workload.docker import DockerAttestor, DockerSettings
from broker.attestation.process import Process
pid = int(sys.argv[1])
owner = os.stat(f"/proc/{pid}")
process = Process.open(pid=pid, uid=owner.st_uid, gid=owner.st_gid, pidfd=os.pidfd_open(pid))
try:
    print(*sorted(map(str, asyncio.run(DockerAttestor(DockerSettings()).attest(process)))))
except Exception as error:
    print(error.reason)
"""
AS_THE_PAGE_SAYS = ("--pid=host", "--cap-add", "SYS_PTRACE", "-v", "/sys/fs/cgroup:/sys/fs/cgroup:ro")


@pytest.mark.parametrize("namespace", ["host", "private"])
def test_an_agent_in_a_container(engine, namespace: str) -> None:
    mount = ("-v", f"{engine.socket}:/var/run/docker.sock")
    agent = engine.program(f"--cgroupns={namespace}", *AS_THE_PAGE_SAYS, *mount)
    orders = str(engine.pid(engine.run("--label", "app=orders")))
    told = engine("exec", agent, PROGRAM, "-c", ATTEST, orders)
    if namespace == "private":
        assert told == "cgroup_namespace"
    else:
        assert told == f"docker:image_config_digest:{engine.digest()} docker:image_id:{IMAGE} docker:label:app:orders"
