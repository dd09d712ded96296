"""Runs a target: with atheris, which learns from coverage, or with a few fixed mutations, which need nothing."""

import contextlib
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

WORK = Path(".fuzz")  # corpora grow here from run to run, and inputs that broke a rule are left here
VECTORS = os.environ.get("BROKER_VECTORS")
MAX_INPUT = 8192
MAX_CPU = 10.0  # seconds for one input; the slowest known ones take some milliseconds, the collector its own time
PIECES = (b"/", b"..", b":", b"\n", b" ", b"-", b"0", b"\xff", b"0123456789abcdef" * 4, b"docker-", b".scope", b"\\040")

Target = Callable[[bytes], None]


def instrumented(module: str) -> AbstractContextManager[object]:
    """Around a target's imports: where the target runs as a program, atheris sees into what is imported."""
    if module != "__main__":
        return contextlib.nullcontext()
    import atheris  # noqa: PLC0415 - for whoever fuzzes, only

    return atheris.instrument_imports(include=["broker"])


def run(name: str, target: Target, seeds: Sequence[bytes], hooks: Sequence[str] = ("RegEx", "str")) -> None:
    """Fuzz until told to stop; libFuzzer's options stand on the command line. Does not return."""
    import atheris  # noqa: PLC0415

    corpus = WORK / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    for hook in hooks:
        atheris.enabled_hooks.add(hook)
    options = (f"-artifact_prefix={WORK}/{name}-", f"-max_len={MAX_INPUT}", str(corpus))
    atheris.Setup([*sys.argv, *options], target)
    atheris.Fuzz()


def replay(target: Target, seeds: Sequence[bytes], mutations: int) -> None:
    """Give the target each seed and then as many mutations, always the same ones; an input that is slow is a failure."""
    chance = random.Random(0)
    for data in (*seeds, *_mutated(chance, seeds, mutations)):
        began = time.thread_time()
        target(data)
        took = time.thread_time() - began
        assert took < MAX_CPU, f"{took:.1f} s for {data[:200]!r} ({len(data)} bytes)"


def _mutated(chance: random.Random, seeds: Sequence[bytes], count: int) -> Iterator[bytes]:
    for _ in range(count):
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 4)):
            at = chance.randint(0, len(data))
            match chance.randint(0, 4):
                case 0:
                    data[at:at] = chance.choice(PIECES)
                case 1:
                    del data[at : at + chance.randint(1, 12)]
                case 2:
                    data[at : at + 1] = bytes([chance.randrange(256)])
                case 3:
                    other = chance.choice(seeds)
                    data[at:] = other[chance.randint(0, len(other)) :]
                case _:
                    data[at:at] = data[at : at + 80] * chance.randint(1, 20)
        yield bytes(data[:MAX_INPUT])


def recorded(kind: str) -> list[bytes]:
    """Give what others recorded of ``kind``, cgroup or mountinfo, where the public vectors are at hand."""
    if not VECTORS:
        return []
    cases = json.loads((Path(VECTORS) / "container_cases.json").read_text())["cases"]
    files = [path.read_bytes() for path in sorted((Path(VECTORS) / "spire-procfs").rglob(kind))]
    return [*files, *(case["files"][kind].encode() for case in cases if kind in case["files"])]
