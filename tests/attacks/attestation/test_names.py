"""What an executable is called proves nothing: every way to be called like the victim, as an ordinary user has them (A06).

Each process has an identity of its own by what it really executes, and gets that one or none; the victim's never.
"""

import glob
import os
import shutil
from pathlib import Path

import pytest

from tests.attacks.attestation.arena import DENIED, UID, Arena, Program, as_user, served

pytestmark = pytest.mark.asyncio(loop_scope="package")
AS_ROOT_OF_ITS_OWN = ("unshare", "--user", "--map-root-user", "--mount", "/bin/sh", "-e", "-c")


def entry(it: Arena, name: str, path: Path | str) -> tuple[str, list[str]]:
    """Register what this path earns; gives the answer that whoever executes it has."""
    it.register(name, f"unix:uid:{UID}", f"unix:path:{path}")
    return served(f"/wl/{name}")


def called(it: Program) -> str:
    """What the executable is called for whoever reads the link in /proc from outside: what a credulous agent would believe."""
    return os.readlink(f"/proc/{it.pid}/exe")


def inode(it: Program) -> tuple[int, int]:
    facts = os.stat(f"/proc/{it.pid}/exe")
    return facts.st_dev, facts.st_ino


def inode_of(path: Path) -> tuple[int, int]:
    return path.stat().st_dev, path.stat().st_ino


# --- other mounts


@pytest.mark.bears("A06")
async def test_its_own_file_mounted_over_the_victims(duel: Arena) -> None:
    duel.may_unshare("-m")
    script = f'mount --bind {duel.evil} {duel.victim}; exec "$0" "$@"'
    async with duel.asks(str(duel.victim), inside=(*AS_ROOT_OF_ITS_OWN, script), uid=UID) as attacker:
        assert called(attacker) == str(duel.victim)  # the forgery stands
        assert inode(attacker) == inode_of(duel.evil)
        assert attacker.answer == DENIED


@pytest.mark.bears("A06")
async def test_its_own_directory_mounted_over_the_victims(duel: Arena) -> None:
    duel.may_unshare("-m")
    theirs = duel.directory / "theirs"
    theirs.mkdir()
    shutil.copy(duel.evil, theirs / "victim")
    script = f'mount --bind {theirs} {duel.programs}; exec "$0" "$@"'
    async with duel.asks(str(duel.victim), inside=(*AS_ROOT_OF_ITS_OWN, script), uid=UID) as attacker:
        assert called(attacker) == str(duel.victim)
        assert inode(attacker) == inode_of(theirs / "victim")
        assert attacker.answer == DENIED


@pytest.mark.bears("A06")
async def test_a_root_of_its_own_with_a_victim_in_it(duel: Arena) -> None:
    """pivot_root: the link shows the path within the attacker's root, which is the victim's."""
    duel.may_unshare("-m")
    script = (
        'mount --make-rprivate /; mount -t tmpfs none "$ROOT"; mkdir -p "$ROOT$PROGRAMS" "$ROOT/old"; '
        'cp "$EVIL" "$ROOT$VICTIM"; cp -r "$HOME_" "$ROOT$HOME_"; '
        'for d in lib lib64 usr bin proc; do [ -e "/$d" ] || continue; mkdir -p "$ROOT/$d"; mount --rbind "/$d" "$ROOT/$d"; done; '
        'mkdir -p "$ROOT$AGENT"; mount --rbind "$AGENT" "$ROOT$AGENT"; cd "$ROOT"; pivot_root . old; cd /; exec "$0" "$@"'
    )
    root = duel.directory / "root"
    root.mkdir()
    variables = {
        "ROOT": root, "PROGRAMS": duel.programs, "EVIL": duel.evil, "VICTIM": duel.victim, "HOME_": duel.home,
        "AGENT": duel.directory / "agent" / "public",
    }  # fmt: skip
    inside = ("env", *(f"{name}={value}" for name, value in variables.items()), *AS_ROOT_OF_ITS_OWN, script)
    async with duel.asks(str(duel.victim), inside=inside, uid=UID) as attacker:
        assert called(attacker) == str(duel.victim)
        assert inode(attacker) != inode_of(duel.victim)
        assert attacker.answer == DENIED


@pytest.mark.bears("A06")
async def test_a_changed_root_with_a_victim_in_it(duel: Arena) -> None:
    """chroot: within it the program is called like the victim; from outside its path is told in full."""
    duel.may_unshare("-m")
    root = duel.directory / "chroot"
    within = Path(f"{root}{duel.victim}")
    expected = entry(duel, "chrooted", within)
    within.parent.mkdir(parents=True)
    shutil.copy(duel.evil, within)
    shutil.copytree(duel.home, Path(f"{root}{duel.home}"))
    script = (
        f'for d in lib lib64 usr bin proc {duel.directory}/agent/public; do [ -e "/$d" ] || continue; '
        f'mkdir -p "{root}/$d"; mount --rbind "/$d" "{root}/$d"; done; exec chroot "{root}" "$0" "$@"'
    )
    for one in (root, *root.rglob("*")):
        if one.is_dir():
            one.chmod(0o777)
    async with duel.asks(str(duel.victim), inside=(*AS_ROOT_OF_ITS_OWN, script), uid=UID) as attacker:
        assert attacker.exe_for_itself == str(duel.victim)
        assert called(attacker) == str(within)
        assert attacker.answer == expected


@pytest.mark.bears("A06")
async def test_the_victims_directory_below_an_overlay(duel: Arena) -> None:
    """The upper copy of a file of its own user, changed: same path, same inode number, another device."""
    duel.may_unshare("-m")
    place = duel.directory / "overlaid"
    below, guarded = place / "below", place / "below" / "guarded"
    for directory in (place, below, place / "upper", place / "work"):
        directory.mkdir()
    shutil.copy(duel.victim, guarded)
    for one in (place, *place.rglob("*")):
        os.chown(one, UID, UID if os.geteuid() != UID else -1)
    expected = entry(duel, "guarded", guarded)
    script = (
        f"mount -t overlay none -o lowerdir={below},upperdir={place}/upper,workdir={place}/work,userxattr {below}; "
        f'printf x >> {guarded}; exec "$0" "$@"'
    )
    async with duel.asks(str(guarded), uid=UID) as honest:
        assert honest.answer == expected
    async with duel.asks(str(guarded), inside=(*AS_ROOT_OF_ITS_OWN, script), uid=UID) as attacker:
        assert called(attacker) == str(guarded)
        (place / "work" / "work").chmod(0o700)  # the kernel's, closed to everybody: it could not be removed
        assert (place / "upper" / "guarded").stat().st_size == guarded.stat().st_size + 1
        assert attacker.answer == DENIED


# --- other names


@pytest.mark.bears("A06")
async def test_a_hard_link_is_the_same_file_under_its_own_name(duel: Arena) -> None:
    """Allowed and documented: it is the victim's program. The path is the name by which it was started."""
    link = duel.programs / "link"
    os.link(duel.victim, link)
    expected = entry(duel, "link", link)
    async with duel.asks(str(link), uid=UID) as attacker:
        assert inode(attacker) == inode_of(duel.victim)
        assert attacker.answer == expected


@pytest.mark.bears("A06")
async def test_a_symbolic_link_is_what_it_points_to(duel: Arena) -> None:
    (duel.programs / "symlink").symlink_to(duel.victim)
    async with duel.asks(str(duel.programs / "symlink"), uid=UID) as honest:
        assert honest.answer == served("/wl/victim")


@pytest.mark.bears("A06")
async def test_a_file_that_is_called_deleted(duel: Arena) -> None:
    pretender = duel.program("victim (deleted)")
    expected = entry(duel, "pretender", pretender)
    async with duel.asks(str(pretender), uid=UID) as attacker:
        assert called(attacker) == f"{duel.victim} (deleted)"
        assert attacker.answer == expected


@pytest.mark.bears("A06")
async def test_a_file_that_was_put_in_the_place_of_a_running_one(duel: Arena) -> None:
    """Replaced while it runs: the old process has no path any more, and neither has whoever names his file like that link."""
    path = duel.program("updated")
    expected = entry(duel, "updated", path)
    async with duel.puppet(path, uid=UID) as old:
        assert await old.do("ask", duel.socket) == expected
    async with duel.puppet(path, uid=UID) as old:
        duel.program("next").rename(path)
        assert called_pid(old.pid) == f"{path} (deleted)"
        assert await old.do("ask", duel.socket) == DENIED
        shutil.copy(duel.evil, duel.programs / "updated (deleted)")
        assert await old.do("ask", duel.socket) == DENIED
    async with duel.puppet(path, uid=UID) as new:
        assert await new.do("ask", duel.socket) == expected


def called_pid(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/exe")


# --- no file, or another one than the program


@pytest.mark.bears("A06")
async def test_a_program_in_memory(duel: Arena) -> None:
    """memfd_create and fexecve, with the victim's path for a name."""
    code = (
        "import os,sys; fd = os.memfd_create(sys.argv[1]); data = open(sys.argv[1], 'rb').read()\n"
        "while data: data = data[os.write(fd, data):]\n"
        "os.execve(fd, [sys.argv[1], *sys.argv[3:]], dict(os.environ))"
    )
    inside = (str(duel.evil), "-S", "-s", "-c", code)
    async with duel.asks(str(duel.victim), "--", inside=inside, uid=UID) as attacker:
        assert called(attacker) == f"/memfd:{duel.victim} (deleted)"
        assert attacker.answer == DENIED


@pytest.mark.bears("A06")
async def test_a_script_is_its_interpreter(duel: Arena) -> None:
    script = duel.executable("script", f"#!{duel.evil} -S\nexec(open('{duel.home}/wire.py').read())\n")
    expected = entry(duel, "interpreter", duel.evil)
    duel.register("script", f"unix:uid:{UID}", f"unix:path:{script}")
    async with duel.asks_by(*as_user(UID), str(script), duel.socket, "hold") as attacker:
        assert attacker.answer == expected


@pytest.mark.bears("A06")
@pytest.mark.parametrize("what", ["victim", "evil"])
async def test_a_program_started_by_the_loader_is_the_loader(duel: Arena, what: str) -> None:
    loaders = [os.path.realpath(one) for one in glob.glob("/lib*/ld-linux*.so.*")]
    if not loaders:
        pytest.skip("no glibc loader here")
    expected = entry(duel, "loader", loaders[0])
    async with duel.asks(str(getattr(duel, what)), inside=(loaders[0],), uid=UID) as attacker:
        assert called(attacker) == loaders[0]
        assert attacker.answer == expected
