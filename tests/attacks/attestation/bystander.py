"""An honest workload that asks for its identity all the time, on a new connection each time. Standard library only.

    bystander.py SOCKET IDENTITY

For each line on its standard input it prints what became of its calls so far: how many were served, which failed, and how long they took.
"""

import json
import os
import select
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import wire

EVERY = 0.02  # seconds between calls
PATIENCE = 30.0  # seconds for one call: an agent that an attack has stopped answers when it goes on


def main():
    path, identity = sys.argv[1:]
    failed, took = [], []
    while True:
        began = time.monotonic()
        answer = wire.asked(path, PATIENCE)
        took.append(time.monotonic() - began)
        if answer != (wire.SERVED, [identity]):
            failed.append(answer)
        if not select.select([sys.stdin], [], [], EVERY)[0]:
            continue
        if not sys.stdin.readline():
            return
        ordered = sorted(took)
        print(
            json.dumps(
                {
                    "calls": len(took),
                    "failed": failed[:10],
                    "p50": ordered[len(ordered) // 2],
                    "p99": ordered[int(len(ordered) * 0.99)],
                    "max": ordered[-1],
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
