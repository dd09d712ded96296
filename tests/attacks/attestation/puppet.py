"""A process that does what it is told, one JSON line at a time: what an attacker or a victim is made of. Standard library only.

    puppet.py CONTROL

CONTROL is the number of an inherited Unix socket. Each line is ``[verb, arguments…]``, each answer a JSON value. ``give`` and ``take`` pass
the connection to and from the harness (SCM_RIGHTS), so that whoever holds the other end is a sibling, a parent or an accomplice.
"""

import array
import ctypes
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import wire

_libc = ctypes.CDLL(None, use_errno=True)
_EXIT = {"x86_64": 60, "aarch64": 93}
_CAPSET = {"x86_64": 126, "aarch64": 91}
_CAPABILITY_VERSION_3 = 0x20080522


def _checked(result):
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Puppet:
    def __init__(self, control):
        self.control = control
        self.lines = control.makefile("rb")
        self.connection = None

    def serve(self):
        while line := self.lines.readline():
            verb, *arguments = json.loads(line)
            try:
                answer = getattr(self, verb)(*arguments)
            except OSError as error:
                answer = {"error": error.errno}
            self.say(answer)
        os._exit(0)

    def say(self, answer):
        self.control.sendall(json.dumps(answer).encode() + b"\n")

    # ---- who it is

    def become(self, uid, gid, groups):
        os.setgroups(groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)

    def effective(self, uid):
        os.seteuid(uid)

    def groups(self, groups):
        os.setgroups(groups)

    def group(self, gid):
        os.setresgid(gid, gid, gid)

    def drop_capabilities(self):
        header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
        data = (ctypes.c_uint32 * 6)()
        _checked(_libc.syscall(_CAPSET[os.uname().machine], ctypes.byref(header), ctypes.byref(data)))

    def dumpable(self, value):
        _checked(_libc.prctl(4, value, 0, 0, 0))  # PR_SET_DUMPABLE

    def unshare(self, flags):
        _checked(_libc.unshare(flags))

    def enter(self, pid, kind, flag):
        fd = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY)
        try:
            _checked(_libc.setns(fd, flag))
        finally:
            os.close(fd)

    def pid(self):
        return os.getpid()

    # ---- its connection

    def connect(self, path):
        """Connect, and wait until the agent has accepted: what happens from then on happens after accept."""
        self.connection = wire.connected(path)
        return self.connection.wait_accepted(30.0)

    def call(self, seconds=20.0):
        return self.connection.hear(self.connection.call(), seconds)

    def ask(self, path):
        return wire.asked(path)

    def give(self):
        self._pass(self.connection.socket)

    def take(self):
        self.say("ready")
        _, (fd,), _, _ = socket.recv_fds(self.control, 1, 1)
        self.connection = wire.Connection(socket.socket(fileno=fd))

    def fork(self):
        """A child that holds the same connection and does what it is told on a control socket of its own."""
        theirs, ours = socket.socketpair()
        if os.fork() == 0:
            theirs.close()
            self.control.close()
            os.setsid()
            child = Puppet(ours)
            child.connection = self.connection
            child.serve()
        ours.close()
        self._pass(theirs)
        theirs.close()

    def _pass(self, one):
        self.control.sendmsg([b"g"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [one.fileno()]))])

    def zombie(self, path):
        """A child connects and ends; nobody reaps it. The connection is this process's from then on."""
        made = socket.socket(socket.AF_UNIX)
        child = os.fork()
        if child == 0:
            made.connect(path)
            os._exit(0)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        self.connection = wire.Connection(made)
        return child

    # ---- its end

    def become_program(self, path, arguments):
        os.execv(path, arguments)

    def end(self):
        os._exit(0)

    def lose_leader(self):
        """End the first thread; another one goes on, and answers when the kernel calls the process a zombie."""
        threading.Thread(target=self._without_leader).start()
        _libc.syscall(_EXIT[os.uname().machine], 0)  # exit(2): this thread alone

    def _without_leader(self):
        while "State:\tZ" not in Path("/proc/self/status").read_text():
            time.sleep(0.001)
        self.say(None)
        self.serve()


if __name__ == "__main__":
    Puppet(socket.socket(fileno=int(sys.argv[1]))).serve()
