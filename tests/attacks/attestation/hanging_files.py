"""A file system of one executable, served through /dev/fuse, that can stop to answer one process. Standard library only.

    hanging_files.py DIRECTORY EXECUTABLE [COMMAND…]

shows EXECUTABLE as DIRECTORY/program. Then, without COMMAND, it reads lines: ``hang PID OPERATION`` (LOOKUP, GETATTR, OPEN or READ:
requests of that process for it are kept waiting from now on), ``release`` (all are answered), ``seen`` (how many waited). With
COMMAND, which it becomes, a child serves for as long as it lives.
"""

import ctypes
import errno
import json
import os
import select
import stat
import struct
import sys

_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _STATFS, _INIT, _INTERRUPT, _BATCH_FORGET = 1, 2, 3, 14, 15, 17, 26, 36, 42
_QUIET = {18, 25, 29}  # RELEASE, FLUSH, RELEASEDIR
OPERATIONS = {"LOOKUP": _LOOKUP, "GETATTR": _GETATTR, "OPEN": _OPEN, "READ": _READ}
_HEAD = struct.Struct("<IIQQIIIHH")  # length, opcode, unique, node, uid, gid, thread, two unused
_OUT = struct.Struct("<IiQ")
_ROOT, _PROGRAM = 1, 2
_NAME = b"program\0"
_DIRECT_IO = 1  # past the page cache: a page that is waited for would hold up the program itself, too
_LARGEST = 1 << 17
_NOSUID, _NODEV, _DETACH = 2, 4, 2


class Files:
    """The mounted file system and its server."""

    def __init__(self, directory, executable):
        self.content = os.open(executable, os.O_RDONLY)
        self.size = os.fstat(self.content).st_size
        self.device = os.open("/dev/fuse", os.O_RDWR)
        self.hanging = {}  # operation: the process that waits for it
        self.waiting = []  # requests that were not answered
        self.changed = 1  # when the program was, in seconds since 1970
        # Who owns a user namespace may not let others in.
        others = ",allow_other" if os.geteuid() == 0 and len(sys.argv) == 3 else ""
        options = f"fd={self.device},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()}{others}"
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"files", os.fsencode(directory), b"fuse", _NOSUID | _NODEV, options.encode()) != 0:
            raise OSError(ctypes.get_errno(), f"mount: {os.strerror(ctypes.get_errno())}")

    def one(self):
        """Answer one request; raises OSError (ENODEV) when the file system is gone."""
        request = os.read(self.device, _LARGEST + 4096)
        _, opcode, unique, node, _, _, thread, _, _ = _HEAD.unpack_from(request)
        who = self.hanging.get(opcode)
        is_it = who is not None and os.path.exists(f"/proc/{who}/task/{thread}")
        if is_it:
            self.waiting.append((opcode, unique, node, request[_HEAD.size :]))
            return
        self.answer(opcode, unique, node, request[_HEAD.size :])

    def answer(self, opcode, unique, node, body):
        if opcode in {_FORGET, _BATCH_FORGET, _INTERRUPT}:
            return
        try:
            payload = self.payload(opcode, node, body)
        except OSError as error:
            self.send(unique, -error.errno)
        else:
            self.send(unique, 0, payload)

    def send(self, unique, error, payload=b""):
        try:
            os.write(self.device, _OUT.pack(_OUT.size + len(payload), error, unique) + payload)
        except OSError as gone:
            if gone.errno != errno.ENOENT:  # whoever asked was killed meanwhile
                raise

    def payload(self, opcode, node, body):
        if opcode == _INIT:
            return struct.pack("<IIIIHHIIHHI7I", 7, 31, 0, 0, 12, 9, _LARGEST, 1, 0, 0, 0, *[0] * 7)
        if opcode == _LOOKUP:
            if (node, body) != (_ROOT, _NAME):
                raise OSError(errno.ENOENT, "no such file")
            # Nothing of it is valid for any time: the kernel asks again, always.
            return struct.pack("<QQQQII", _PROGRAM, 0, 0, 0, 0, 0) + self.attributes(_PROGRAM)
        if opcode == _GETATTR:
            return struct.pack("<QII", 0, 0, 0) + self.attributes(node)
        if opcode == _OPEN:
            return struct.pack("<QII", 0, _DIRECT_IO if self.hanging else 0, 0)
        if opcode == _READ:
            _, offset, length = struct.unpack_from("<QQI", body)
            return os.pread(self.content, length, offset)
        if opcode == _STATFS:
            return struct.pack("<5Q4I6I", 0, 0, 0, 0, 0, 4096, 255, 4096, *[0] * 7)
        if opcode in _QUIET:
            return b""
        raise OSError(errno.ENOSYS, "not served")

    def attributes(self, node):
        mode, size = (stat.S_IFDIR | 0o755, 0) if node == _ROOT else (stat.S_IFREG | 0o755, self.size)
        times = [self.changed] * 3
        return struct.pack("<6Q10I", node, size, size // 512, *times, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def told(self, line):
        """Do as a line says; give the answer."""
        verb, *words = line.split()
        if verb == "hang":
            self.hanging[OPERATIONS[words[1]]] = int(words[0])
            self.changed += 1  # nobody knows it by what it was
        elif verb == "release":
            self.hanging.clear()
            waiting, self.waiting = self.waiting, []
            for one in waiting:
                self.answer(*one)
        return len(self.waiting)

    def serve(self):
        """Serve, and do as standard input says until its end."""
        poll = select.poll()
        poll.register(self.device, select.POLLIN)
        poll.register(0, select.POLLIN)
        print("ready", flush=True)
        while True:
            for fd, _ in poll.poll():
                if fd == self.device:
                    self.one()
                    continue
                line = os.read(0, 4096).decode()
                if not line:
                    return
                print(json.dumps(self.told(line)), flush=True)


def main():
    directory, executable, *command = sys.argv[1:]
    files = Files(directory, executable)
    if not command:
        try:
            files.serve()
        finally:
            ctypes.CDLL(None).umount2(os.fsencode(directory), _DETACH)
        return
    if os.fork():
        os.close(files.device)
        os.execv(command[0], command)
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
    while True:
        files.one()


if __name__ == "__main__":
    main()
