"""A container runtime on a Unix socket that knows one container, until its standard input ends. A program of its own."""

import asyncio
import sys

from broker.dev.lines import say, stdin_closed
from tests.fakes.runtime import FakeRuntime, inspected


def main() -> None:
    container, pid, label, value = sys.argv[1:]
    with FakeRuntime() as runtime:
        runtime.containers[container] = inspected(container, pid=int(pid), Labels={label: value})
        say({"socket": str(runtime.path)})
        asyncio.run(stdin_closed())


if __name__ == "__main__":
    main()
