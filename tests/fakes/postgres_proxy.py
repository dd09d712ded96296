"""A way to PostgreSQL that can be cut: bytes go through a Unix socket of our own until the test says otherwise."""

import select
import socket
import threading
from pathlib import Path

NAME = ".s.PGSQL.5432"
"""What libpq looks for in a directory."""


class PostgresProxy:
    """Listens in one directory, and connects to the server in another."""

    def __init__(self, directory: Path, server: Path) -> None:
        directory.mkdir()
        self.directory = directory
        self.server = server
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(directory / NAME))
        self._listener.listen()
        self.lose_answer_to = b""
        """When a client has said this: pass it on, wait for the answer, drop it, and break that connection."""
        self.lost = 0
        self.frozen = threading.Event()
        """While set, nothing goes through, and nobody is told."""
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(10)
        self._listener.close()

    def _accept(self) -> None:
        while not self._ended.is_set():
            if not select.select([self._listener], [], [], 0.05)[0]:
                continue
            client, _ = self._listener.accept()
            thread = threading.Thread(target=self._pass, args=(client,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _pass(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server:
            try:
                server.connect(str(self.server / NAME))
                while not self._ended.is_set():
                    if self.frozen.is_set():
                        self._ended.wait(0.01)
                        continue
                    for ready in select.select([client, server], [], [], 0.05)[0]:
                        data = ready.recv(65_536)
                        if not data:
                            return
                        (server if ready is client else client).sendall(data)
                        if ready is client and self.lose_answer_to and self.lose_answer_to in data:
                            self.lose_answer_to = b""
                            server.recv(65_536)
                            self.lost += 1
                            return
            except OSError:
                return
