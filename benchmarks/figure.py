"""What a figure is: a subject, what it is compared with, and what that should come to. Data only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.lab import Lab, Measurement, Sample

__all__ = ["Baseline", "Figure"]


@dataclass(frozen=True, slots=True)
class Baseline:
    """What a figure is compared with. ``run`` gets the size of the subject's answers, for its own.

    ``goal`` is the ratio that the subject should reach, ``added_p50_goal_ms`` what it may add to
    the median latency, ``p99_goal`` how many times the baseline's its 99th percentile may be. None: it
    is only reported.
    """

    name: str
    run: Callable[[Lab, int], Measurement | Sample]
    goal: float | None = None
    added_p50_goal_ms: float | None = None
    p99_goal: float | None = None


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table or more: a subject, and each of its baselines.

    Those that are measurements are loaded in turns; what is a sample has been measured by itself.
    ``saturates``: the load is meant to keep the server's core busy all the time. ``most_rounds`` is
    less than what is asked for where one measurement takes long, and is steady. ``apart``: measured
    only when it is asked for by its name.
    """

    name: str
    title: str
    unit: str
    subject: Callable[[Lab], Measurement | Sample]
    baselines: tuple[Baseline, ...]
    lower_is_better: bool = False
    saturates: bool = True
    most_rounds: int = 99
    apart: bool = False
