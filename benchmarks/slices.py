"""Loads that take turns on one core: a slice for each, in which the others stand still.

The speed of a machine that others share changes by a fifth from one tenth of a second to the next but
one. What is to be compared gets all of these changes alike.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.load import Load, Request, Wrk
from benchmarks.servers import Server

__all__ = ["Wanted", "in_turns"]

_SLICE_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Wanted:
    """A load for ``servers``, the first of which gets the requests."""

    servers: Sequence[Server]
    request: Request
    connections: int
    answer_bytes: int = 0


class _Running:
    """A load, its servers, and the time in which neither stood still."""

    def __init__(self, wanted: Wanted, *, core: int | None, folder: Path) -> None:
        self._wanted = wanted
        self._pauses = 0
        self._since = time.monotonic()
        self.active_s = 0.0
        self.wrk = Wrk(
            wanted.servers[0].url,
            wanted.request,
            connections=wanted.connections,
            core=core,
            folder=folder,
        )

    def pause(self) -> None:
        self.wrk.process.send_signal(signal.SIGSTOP)
        self._servers(signal.SIGSTOP)
        self.active_s += time.monotonic() - self._since
        self._pauses += 1

    def go_on(self) -> None:
        self._since = time.monotonic()
        self._servers(signal.SIGCONT)
        self.wrk.process.send_signal(signal.SIGCONT)

    def end(self) -> Load:
        """End the load. Raises :class:`~benchmarks.errors.Broken` if an answer was an error."""
        report = self.wrk.end()
        self.active_s += time.monotonic() - self._since
        held_up = self._pauses * self._wanted.connections
        return Load.of(report, seconds=self.active_s, held_up=held_up)

    def stand_still(self) -> None:
        """Have the servers wait, once the load has ended, with what is still to be done."""
        self._servers(signal.SIGSTOP)

    def finish(self) -> None:
        self._servers(signal.SIGCONT)

    def _servers(self, number: int) -> None:
        for server in self._wanted.servers:
            os.killpg(server.process.pid, number)


def in_turns(wanted: Sequence[Wanted], *, seconds: float, core: int | None, folder: Path) -> list[Load]:
    """Put each load on its servers for ``seconds``, with wrk on ``core``. One alone runs on and on."""
    with ExitStack() as stack:
        running: list[_Running] = []
        for one in wanted:
            running.append(_Running(one, core=core, folder=folder))
            stack.callback(running[-1].wrk.kill)
            if len(wanted) == 1:
                time.sleep(seconds)
                return [running[0].end()]
            time.sleep(_SLICE_S)
            running[-1].pause()
        while running[-1].active_s < seconds:
            for load in running:
                load.go_on()
                time.sleep(_SLICE_S)
                load.pause()
        done = []
        for load in running:
            load.go_on()
            time.sleep(_SLICE_S)  # a signal right after the one to go on may meet any of wrk's threads
            done.append(load.end())
            load.stand_still()
        for load in running:
            load.finish()
        return done
