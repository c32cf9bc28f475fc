"""Several worker processes on one port: starts them, restarts those that die, and stops them all.

Each worker has a socket of its own on the same address (``SO_REUSEPORT``), and the kernel spreads
connections among the workers. The stdin of a worker is a pipe from its supervisor. When the supervisor
dies, the pipe ends, and the worker stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from time import monotonic
from typing import Any

from asyncproxy.core.errors import StartupError

__all__ = ["Supervisor", "reserved"]

logger = logging.getLogger(__name__)

# A worker that dies is restarted at once. If it dies soon after each start, the waits grow.
_SOON_S = 10.0
_LONGEST_WAIT_S = 30.0

# Seconds after the grace period until a worker is killed. A worker stops by itself, unless it hangs.
_PATIENCE_S = 10.0


@contextlib.contextmanager
def reserved(host: str | None, port: int) -> Iterator[tuple[str, int]]:
    """Reserve an address for several processes. Yields host and port, which may have been port 0.

    Raises :class:`StartupError` if the address is taken. The reserving socket never listens, so it gets
    no connection.
    """
    if not hasattr(socket, "SO_REUSEPORT"):
        raise StartupError("--workers needs SO_REUSEPORT, which this platform does not have")
    host = host or "0.0.0.0"  # noqa: S104  what `listen` without a host asks for
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as held:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            held.bind((host, port))
            yield host, held.getsockname()[1]
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise StartupError(f"cannot listen on {host}:{port}: {reason}") from error


class Supervisor:
    """Runs ``count`` workers. ``command`` returns the command line of the worker of a number, from 0.

    A worker prints one line when it listens, and stops by itself within ``grace_s`` after SIGTERM.
    """

    def __init__(self, command: Callable[[int], Sequence[str]], count: int, *, grace_s: float) -> None:
        self._command = command
        self._count = count
        self._grace_s = grace_s
        self._workers: dict[int, asyncio.subprocess.Process] = {}
        self._stopping = asyncio.Event()

    async def run(self, ready: Callable[[], None]) -> int:
        """Run until SIGTERM or SIGINT. ``ready`` is called when all workers listen.

        Returns the exit code: 0, or the code of a worker that could not start.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        loop.add_signal_handler(signal.SIGHUP, self._tell, signal.SIGHUP)
        keeping: list[asyncio.Task[None]] = []
        try:
            ended = await asyncio.gather(*(self._start(number) for number in range(self._count)))
            codes = [code for code in ended if code is not None]
            if codes:
                return max(codes)
            ready()
            keeping += [asyncio.create_task(self._keep(number)) for number in range(self._count)]
            await self._stopping.wait()
            return 0
        finally:
            await self._end(keeping)

    async def _start(self, number: int) -> int | None:
        """Start a worker. Returns None when it listens, or its exit code if it ends before."""
        process = await asyncio.create_subprocess_exec(
            *self._command(number), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        self._workers[number] = process
        if self._stopping.is_set():  # the signal came while this worker was being started
            process.terminate()
        assert process.stdout is not None
        if await process.stdout.readline():
            return None
        return await process.wait()

    async def _keep(self, number: int) -> None:
        """Restart a worker whenever it ends, until the supervisor stops."""
        wait_s = 0.0
        while True:
            started = monotonic()
            code = await self._workers[number].wait()
            if self._stopping.is_set():
                return
            wait_s = 0.0 if monotonic() - started > _SOON_S else min(_LONGEST_WAIT_S, 2 * wait_s + 0.1)
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            logger.error("worker %d ended with %s; it is started again in %g s", number, how, wait_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._stopping.wait()
                    return
            await self._start(number)

    def _stop(self, number: signal.Signals) -> None:
        self._stopping.set()
        self._tell(number)

    def _tell(self, number: signal.Signals) -> None:
        for process in self._workers.values():
            if process.returncode is None:
                process.send_signal(number)

    async def _end(self, keeping: Iterable[asyncio.Task[None]]) -> None:
        """Wait for all workers and their restart tasks, and kill the workers that do not stop."""
        if not self._stopping.is_set():
            self._stop(signal.SIGTERM)
        ending: set[asyncio.Task[Any]] = set(keeping)
        ending |= {asyncio.create_task(process.wait()) for process in self._workers.values()}
        _, late = await asyncio.wait(ending, timeout=self._grace_s + _PATIENCE_S)
        if late:
            logger.error("workers that do not stop are killed")
            self._tell(signal.SIGKILL)
            await asyncio.wait(ending)
