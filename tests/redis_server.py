"""A real Redis, or Valkey, on a port of its own, that a test may stop, start and freeze."""

from __future__ import annotations

import atexit
import functools
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from tests.shell import program

__all__ = ["RedisServer", "restricted", "shared"]

PAGE = Path(__file__).parents[1] / "docs" / "operations.md"

_STARTS_WITHIN_S = 60


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class RedisServer:
    """A server with ``options``, as they stand in redis.conf: ``RedisServer(appendonly="yes")``."""

    def __init__(self, **options: str) -> None:
        self.program = program("redis-server", "valkey-server")
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="asyncproxy-redis-"))
        self.options = {"appendonly": "no", "save": "", **options}
        self.process: subprocess.Popen[bytes] | None = None
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it, and wait until it takes commands."""
        arguments = [self.program, "--port", str(self.port), "--bind", "127.0.0.1"]
        arguments += ["--dir", str(self.folder), "--logfile", str(self.folder / "log")]
        for name, value in self.options.items():
            arguments += [f"--{name}", value]
        self.process = subprocess.Popen(arguments)
        deadline = time.monotonic() + _STARTS_WITHIN_S
        while not self._answers():
            assert self.process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline, "Redis does not start"
            time.sleep(0.01)

    def kill(self) -> None:
        """End it at once, as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def freeze(self) -> None:
        """Let it be silent, with its connections open."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False


@functools.cache
def shared() -> RedisServer:
    """The one that tests share which only need some Redis. Each takes a prefix of its own."""
    server = RedisServer()
    atexit.register(server.close)
    return server


@functools.cache
def restricted() -> str:
    """The URL of the shared server for a user that may do what the page says is needed, and nothing else.

    The page names the keys of one deployment: they are those of all here.
    """
    found = re.search(
        r"^ACL SETUSER asyncproxy (.+?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S
    )
    assert found is not None
    rules = found[1].replace("{asyncproxy}", "{*}").replace("PASSWORD", "secret").split()
    with socket.create_connection(("127.0.0.1", shared().port), timeout=10) as connection:
        parts = [text.encode() for text in ("ACL", "SETUSER", "asyncproxy", *rules)]
        command = b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)
        connection.sendall(b"*%d\r\n%b" % (len(parts), command))
        reply = connection.recv(1024)
        assert reply == b"+OK\r\n", reply
    return shared().url.replace("//", "//asyncproxy:secret@")
