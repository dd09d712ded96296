"""Process ids used again, thousands of times: the first process of a pid namespace of its own. Standard library only.

    pid_rounds.py CONFIG

CONFIG is a JSON file: how to start the agent, the victims, the bystander and the credulous listeners, and how many rounds of what. In a
round a process connects and ends, a victim is started under its number, and then the connection, which the harness kept, asks for an
identity. Prints what the rounds were answered.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import wire

BATCH = 50  # rounds at once: each has a victim alive
STORM_SECONDS = 2  # of the positive control, each time
PATIENCE = 20.0  # seconds for an answer
LOWEST_PID_MAX = 400  # numbers 300 to 399 come again and again: the kernel keeps the lower ones after the first wrap


class Program:
    """A process that answers lines with lines of JSON."""

    def __init__(self, argv, environ):
        self.process = subprocess.Popen(argv, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def say(self, line=""):
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def heard(self):
        return json.loads(self.process.stdout.readline())

    def __call__(self, line=""):
        self.say(line)
        return self.heard()


class Target:
    """Who is attacked: a listener, and the process that listens."""

    def __init__(self, path, pid, victims):
        self.path, self.pid, self.victims = path, pid, victims
        self.answers = Counter()

    # ---- rounds: ``uids`` are the attackers' users, one a round

    def before_accept(self, uids):
        """The listener is stopped while its callers end and their numbers are used again."""
        with self._stopped():
            connections, pids = self._ended([self._attacker(uid) for uid in uids])
            self._reborn(pids)
        self._ask(connections)

    def racing(self, uids):
        """Nobody waits for anybody: the call is sent, its sender ends, and its number is used again, as fast as it goes."""
        connections, pids = [], []
        for uid in uids:
            made, pid, _ = self._attacker(uid, saying=wire.opening() + wire.request())
            os.waitpid(pid, 0)
            self._reborn([pid])
            connections.append(wire.Connection(made))
            pids.append(pid)
        for connection in connections:
            self._count(connection.hear(1, PATIENCE))
            connection.socket.close()
        self.victims("kill")

    def after_accept(self, uids, opened):
        """The listener has accepted, and perhaps heard the preface, before the caller ends."""
        attackers = [self._attacker(uid, waiting=True) for uid in uids]
        for connection, _, _ in attackers:
            if opened:
                connection.open()
            assert connection.wait_accepted(PATIENCE), "the listener does not accept"
        connections, pids = self._ended(attackers)
        self._reborn(pids)
        self._ask(connections)

    def _attacker(self, uid, *, waiting=False, saying=b""):
        """A process that connects as this user and ends, at once or when it is told; the connection stays with us."""
        made = socket.socket(socket.AF_UNIX)
        reader, writer = os.pipe() if waiting else (None, None)
        pid = os.fork()
        if pid == 0:
            try:
                if waiting:
                    os.close(writer)
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
                made.connect(self.path)
                if saying:
                    made.sendall(saying)
                if waiting:
                    os.read(reader, 1)
            finally:
                os._exit(0)
        if waiting:
            os.close(reader)
        return (made if saying else wire.Connection(made)), pid, writer

    def _ended(self, attackers):
        for _, pid, writer in attackers:
            if writer is not None:
                os.write(writer, b"x")  # closing it would not do: the later attackers hold it, too
                os.close(writer)
            os.waitpid(pid, 0)
        return [connection for connection, _, _ in attackers], [pid for _, pid, _ in attackers]

    def _reborn(self, pids):
        self.victims("spawn " + " ".join(map(str, pids)))

    def _ask(self, connections):
        streams = [(connection, connection.call()) for connection in connections]
        for connection, stream in streams:
            self._count(connection.hear(stream, PATIENCE))
            connection.socket.close()
        self.victims("kill")

    def _count(self, answer):
        self.answers[json.dumps(answer)] += 1

    @contextmanager
    def _stopped(self):
        os.kill(self.pid, signal.SIGSTOP)
        while state(self.pid) != "T":
            time.sleep(0.001)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)


def state(pid):
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]


def rounds(target, count, uids, kinds):
    """This many rounds of these kinds, in batches, attackers' users in turn."""
    done = 0
    while done < count:
        uid = [uids[number % len(uids)] for number in range(BATCH)]
        kind = kinds[(done // BATCH) % len(kinds)]
        if kind == "before accept":
            target.before_accept(uid)
        elif kind == "racing":
            target.racing(uid)
        else:
            target.after_accept(uid, opened=kind == "after preface")
        done += BATCH
    return done


# ---- the storm: nothing is arranged, numbers come again by themselves


def holder(path, seconds, in_flight, uid, writer):
    """Attackers that connect, call and end, as fast as it goes; writes what was answered, and which numbers they had when."""
    until, flying, answers, seen = time.monotonic() + seconds, {}, Counter(), []
    while flying or time.monotonic() < until:
        while len(flying) < in_flight and time.monotonic() < until:
            made = socket.socket(socket.AF_UNIX)
            try:
                pid = os.fork()
            except BlockingIOError:  # no number is free
                made.close()
                time.sleep(0.001)
                break
            if pid == 0:
                try:
                    os.setgroups([])
                    os.setresgid(uid, uid, uid)
                    os.setresuid(uid, uid, uid)
                    made.connect(path)
                    made.sendall(wire.opening() + wire.request())
                finally:
                    os._exit(0)
            os.waitpid(pid, 0)
            flying[made] = wire.Connection(made), pid, time.monotonic()
        for made in select.select(list(flying), [], [], 0.01)[0]:
            connection, pid, began = flying[made]
            answer = connection.hear(1, 0.0)
            if answer == (wire.SILENT, None):
                answer = connection.hear(1, PATIENCE)
            answers[json.dumps(answer)] += 1
            seen.append((pid, began, time.monotonic()))
            made.close()
            del flying[made]
    with os.fdopen(writer, "w") as out:
        json.dump({"answers": answers, "seen": seen}, out)
    os._exit(0)


def storm(path, victims, seconds, uid, holders, in_flight, alive):
    """Give the answers, and how many connections were open while their maker's number was a victim's."""
    victims.say(f"churn {seconds} {alive}")
    pipes = []
    for _ in range(holders):
        reader, writer = os.pipe()
        if os.fork() == 0:
            os.close(reader)
            holder(path, seconds, in_flight, uid, writer)
        os.close(writer)
        pipes.append(reader)
    answers, seen = Counter(), []
    for reader in pipes:
        with os.fdopen(reader) as said:
            report = json.load(said)
        answers.update(report["answers"])
        seen += report["seen"]
    for _ in pipes:
        os.wait()
    return {"answers": answers, "overlaps": overlaps(seen, victims.heard())}


def overlaps(attackers, victims):
    """How many of the first intervals meet one of the second under the same number."""
    by_pid = {}
    for pid, began, ended in victims:
        by_pid.setdefault(pid, []).append((began, ended))
    return sum(
        any(begin < ended and began < end for begin, end in by_pid.get(pid, ())) for pid, began, ended in attackers
    )


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def served(victims, seconds=60.0):
    """Wait until the honest victim is; a machine may be slow, and the agent has to join first."""
    until = time.monotonic() + seconds
    while (answer := victims("serve"))[0] != wire.SERVED and time.monotonic() < until:
        time.sleep(0.05)
    return answer


def main():
    with open(sys.argv[1]) as file:
        config = json.load(file)
    environ, path, uids = config["environ"], config["socket"], config["uids"]
    with open(config["log"], "wb") as log:
        agent = subprocess.Popen(
            config["agent"], stdout=log, stderr=log, cwd=config["cwd"], env=config["agent_environ"]
        )
    victims = Program([*config["victims"]], environ)
    report = {"served_before": served(victims)}
    bystander = Program(config["bystander"], environ)

    report["control"] = {}
    for name, argv in config["credulous"].items():
        listener = subprocess.Popen(argv, env=environ)
        while not os.path.exists(argv[-6]):
            time.sleep(0.005)
        report["control"][name] = {}
        for kind in ("before accept", "after accept"):
            target = Target(argv[-6], listener.pid, victims)
            rounds(target, BATCH, [config["uid"]], [kind])
            report["control"][name][kind] = target.answers
        if name == "number":
            with open("/proc/sys/kernel/pid_max", "w") as limit:
                limit.write(str(LOWEST_PID_MAX))
            # A matter of luck each time, so it is tried until it came: the storm must be one that can be lost.
            until = time.monotonic() + config["control_seconds"]
            report["control_storm"] = storm(argv[-6], victims, STORM_SECONDS, uids[0], 2, 50, 20)
            while config["honest"] not in report["control_storm"]["answers"] and time.monotonic() < until:
                report["control_storm"] = storm(argv[-6], victims, STORM_SECONDS, uids[0], 2, 50, 20)
            with open("/proc/sys/kernel/pid_max", "w") as limit:
                limit.write("32768")
        listener.kill()
        listener.wait()

    before = descriptors(agent.pid)
    target = Target(path, agent.pid, victims)
    report["phases"] = {}
    for kind in ("before accept", "racing", "after accept", "after preface"):
        began = time.monotonic()
        count = rounds(target, config["rounds"][kind], uids, [kind])
        report["phases"][kind] = {"rounds": count, "seconds": time.monotonic() - began}
    report["answers"] = target.answers
    with open("/proc/sys/kernel/pid_max", "w") as limit:
        limit.write(str(LOWEST_PID_MAX))
    report["storm"] = storm(path, victims, config["seconds"], uids[0], 4, 50, 20)
    deadline = time.monotonic() + 30
    while (after := descriptors(agent.pid)) > before + 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    report["descriptors"] = [before, after]
    report["agent_ended"] = agent.poll()
    report["served_after"] = served(victims)
    report["bystander"] = bystander()
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
