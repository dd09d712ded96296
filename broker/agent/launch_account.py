"""The user and groups that a launched program runs as, and how a process becomes them for good."""

import grp
import os
import pwd
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self

from broker.errors import Invalid, Refused

_MAX_ID: Final = 2**32 - 2  # the last one means "no change" to the kernel


@dataclass(frozen=True, slots=True)
class Account:
    """Numbers of a user, his group and his further groups; what the environment says of him."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    environment: Mapping[str, str]

    @classmethod
    def find(cls, user: str, group: str | None) -> Self:
        """Look names or numbers up on this node.

        Raises:
            Invalid: no such user or group; or a number without an account, and no group.
            Refused: we are not root.
        """
        if os.geteuid() != 0:
            raise Refused(
                "only root launches as another user", code="launch_not_root", hint="leave --user out, or use root"
            )
        entry = _entry(user)
        if group is not None:
            gid = _gid(group)
        elif entry is not None:
            gid = entry.pw_gid
        else:
            raise Invalid(f"uid {user} has no account here", code="launch_no_user", hint="say --group as well")
        if entry is None:
            return cls(int(user), gid, (gid,), {})
        groups = tuple(os.getgrouplist(entry.pw_name, gid))
        names = {"HOME": entry.pw_dir, "USER": entry.pw_name, "LOGNAME": entry.pw_name}
        return cls(entry.pw_uid, gid, groups, names)

    def assume(self) -> None:
        """Become it, with no way back. Raises ``OSError``."""
        os.setgroups(self.groups)
        os.setresgid(self.gid, self.gid, self.gid)
        os.setresuid(self.uid, self.uid, self.uid)
        if os.getresuid() != (self.uid,) * 3 or os.getresgid() != (self.gid,) * 3:
            raise PermissionError(1, "the user could not be changed")


def _entry(user: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(_number(user)) if _is_number(user) else pwd.getpwnam(user)
    except KeyError:
        if _is_number(user):
            return None
        raise Invalid(f"there is no user {user!r} here", code="launch_no_user") from None


def _gid(group: str) -> int:
    try:
        return _number(group) if _is_number(group) else grp.getgrnam(group).gr_gid
    except KeyError:
        raise Invalid(f"there is no group {group!r} here", code="launch_no_group") from None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _number(text: str) -> int:
    if len(text) > 10 or int(text) > _MAX_ID:
        raise Invalid(f"{text} is no id of a user or group", code="launch_no_user")
    return int(text)
