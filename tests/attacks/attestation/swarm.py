"""Many processes that ask for their identity in the same moment. Standard library only.

    swarm.py SOCKET UID…

One process for each UID (-1: who we are). They connect and ask when a line comes in; then one line of JSON goes out: for each its UID, the
answer, and how long it took in seconds.
"""

import ctypes
import json
import os
import signal
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import wire

PATIENCE = 60.0  # seconds for one answer


def one(path, uid, start, out):
    if uid >= 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, which a change of user takes away
    os.write(out, b"\n")
    os.read(start, 1)  # until whoever holds the other end closes it
    began = time.monotonic()
    answer = wire.asked(path, PATIENCE)
    # Below PIPE_BUF, so in one piece.
    os.write(out, json.dumps([uid, answer, time.monotonic() - began]).encode() + b"\n")
    os._exit(0)


def main():
    path, *uids = sys.argv[1:]
    start, starting = os.pipe()
    answers, answering = os.pipe()
    children = []
    for uid in map(int, uids):
        child = os.fork()
        if child == 0:
            try:
                os.close(starting)
                os.close(answers)
                one(path, uid, start, answering)
            finally:
                os._exit(1)
        children.append(child)
    os.close(answering)
    with os.fdopen(answers) as lines:
        for _ in children:
            lines.readline()
        print("ready", flush=True)
        sys.stdin.readline()
        os.close(starting)
        said = [json.loads(line) for line in lines]
    for child in children:
        os.waitpid(child, 0)
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
