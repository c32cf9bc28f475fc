"""What it costs to keep jobs on disk or in Redis, and what several processes come to with one Redis.

Subject and baseline differ in the store alone, or in the number of processes. At the end all jobs that
were answered 202 have to be in the store.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Final

from benchmarks.figure import Baseline, Figure
from benchmarks.lab import Lab, Measurement
from benchmarks.requests import CONNECTIONS, SUBMIT
from benchmarks.servers import UNLIMITED, parked

__all__ = ["DURABLE", "SCALE"]


@contextmanager
def _sqlite(durability: str, lab: Lab) -> Iterator[dict[str, Any]]:
    """The store's section of a configuration, for a file of its own. It goes with the lab's folder."""
    path = lab.folder / f"{os.urandom(8).hex()}.db"
    yield {"url": f"sqlite://{path}", "durability": durability, "max_bytes": UNLIMITED}


@contextmanager
def _redis(lab: Lab) -> Iterator[dict[str, Any]]:
    """The store's section of a configuration, for a Redis of its own."""
    key = base64.b64encode(os.urandom(32)).decode()
    with lab.redis() as url:
        yield {"url": url, "encryption_key": key, "max_bytes": UNLIMITED}


@contextmanager
def _memory(lab: Lab) -> Iterator[dict[str, Any]]:
    yield {"url": "memory://", "max_bytes": UNLIMITED}


def _submit(store: Callable[[Lab], AbstractContextManager[dict[str, Any]]], lab: Lab) -> Measurement:
    """Submits into a store, and a look at what is in it afterwards."""
    with parked() as upstream, store(lab) as section, lab.proxy(upstream, store=section) as server:
        sample = yield from lab.throughput(server, SUBMIT, status=202, connections=CONNECTIONS)
        lab.kept(server).check(live=server.submitted, more=CONNECTIONS)
        return sample


def _submit_in_memory(lab: Lab, answer_bytes: int) -> Measurement:
    return _submit(_memory, lab)


def _scale(processes: int, lab: Lab) -> Measurement:
    """Submits to so many processes in turn, with one Redis. The system spreads them over the cores.

    With fewer cores than processes that are busy, which are wrk, nginx, Redis and ours, the ratio says
    little, and the processor time per request says more: as long as it stays, cores are all that is
    missing.
    """
    with ExitStack() as stack:
        free = lab.unpinned()
        section = stack.enter_context(_redis(free))
        upstream = stack.enter_context(parked())
        proxies = [stack.enter_context(free.proxy(upstream, store=section)) for _ in range(processes)]
        front = stack.enter_context(free.round_robin(proxies))
        sample = yield from free.throughput(
            front, SUBMIT, status=202, connections=CONNECTIONS, behind=proxies
        )
        free.kept(proxies[0]).check(live=front.submitted, more=CONNECTIONS)
        return sample


def _scale_to(processes: int, lab: Lab, answer_bytes: int) -> Measurement:
    return _scale(processes, lab)


def _durable_figure(
    name: str,
    title: str,
    store: Callable[[Lab], AbstractContextManager[dict[str, Any]]],
    goal: float | None,
) -> Figure:
    return Figure(
        name=f"durable-{name}",
        title=f"submit into {title}",
        unit="req/s",
        subject=partial(_submit, store),
        baselines=(Baseline("the memory store", _submit_in_memory, goal=goal),),
        saturates=False,
        most_rounds=2,
    )


DURABLE: Final = (
    _durable_figure("sqlite-full", "SQLite, durability: full", partial(_sqlite, "full"), 0.55),
    _durable_figure("sqlite-normal", "SQLite, durability: normal", partial(_sqlite, "normal"), None),
    _durable_figure("redis", "Redis, appendfsync everysec", _redis, 0.5),
)

SCALE: Final = Figure(
    name="scale",
    title="submit to 3 processes with one Redis",
    unit="req/s",
    subject=partial(_scale, 3),
    baselines=tuple(
        Baseline(f"{number} process{'es' if number > 1 else ''}", partial(_scale_to, number))
        for number in (1, 2)
    ),
    saturates=False,
    apart=True,
)
