"""Rounds of subject and baseline in turn, and what they come to: medians, ratios, spreads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import median

from benchmarks.figure import Baseline, Figure
from benchmarks.lab import Lab, Measurement, Sample
from benchmarks.load import Load
from benchmarks.slices import Wanted

__all__ = ["Row", "measure", "subject"]

# Below this share of its core a server under 64 connections was not what limited the figure.
_BUSY = 0.9


@dataclass(frozen=True, slots=True)
class Row:
    """A subject against one baseline, over all rounds."""

    figure: Figure
    baseline: Baseline
    subject_samples: Sequence[Sample]
    baseline_samples: Sequence[Sample]

    @property
    def subject(self) -> Sample:
        return _median(self.subject_samples)

    @property
    def other(self) -> Sample:
        return _median(self.baseline_samples)

    @property
    def ratios(self) -> list[float]:
        """The ratio of each round."""
        pairs = zip(self.subject_samples, self.baseline_samples, strict=True)
        return [ours.value / other.value for ours, other in pairs]

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    @property
    def cpu_ratio(self) -> float | None:
        """The ratio by processor time per request: what else runs on the machine moves it less."""
        if not self.subject.cpu_us or not self.other.cpu_us:
            return None
        return self.other.cpu_us / self.subject.cpu_us

    @property
    def added_p50_ms(self) -> float | None:
        """What we add to the baseline's median latency."""
        if self.subject.p50_ms is None or self.other.p50_ms is None:
            return None
        return self.subject.p50_ms - self.other.p50_ms

    @property
    def p99_ratio(self) -> float | None:
        """The ratio of the 99th percentiles."""
        if not self.subject.p99_ms or not self.other.p99_ms:
            return None
        return self.subject.p99_ms / self.other.p99_ms

    @property
    def reached(self) -> bool | None:
        """Whether every goal is reached. None if there is none."""
        found = []
        if self.baseline.goal is not None:
            above = self.ratio >= self.baseline.goal
            below = self.ratio <= self.baseline.goal
            found.append(below if self.figure.lower_is_better else above)
        goal_ms = self.baseline.added_p50_goal_ms
        if goal_ms is not None and self.added_p50_ms is not None:
            found.append(self.added_p50_ms <= goal_ms)
        if self.baseline.p99_goal is not None and self.p99_ratio is not None:
            found.append(self.p99_ratio <= self.baseline.p99_goal)
        return all(found) if found else None

    @property
    def limited_elsewhere(self) -> bool:
        """Whether a server was waiting in a figure that is about how much it can do."""
        samples = (self.subject, self.other) if self.figure.saturates else ()
        return any(sample.busy is not None and sample.busy < _BUSY for sample in samples)


def measure(figure: Figure, lab: Lab, *, rounds: int, say: Callable[[str], None]) -> list[Row]:
    """Measure ``figure``: a row for each of its baselines."""
    found: list[list[Sample]] = []
    for number in range(min(rounds, figure.most_rounds)):
        found.append(_round(figure, lab))
        values = ", ".join(f"{sample.value:,.0f}" for sample in found[-1])
        say(f"{figure.name} {number + 1}: {values} {figure.unit}")
    ours, *others = zip(*found, strict=True)
    pairs = zip(figure.baselines, others, strict=True)
    return [Row(figure, baseline, ours, samples) for baseline, samples in pairs]


def subject(figure: Figure, lab: Lab) -> Sample:
    """Measure the subject of ``figure`` alone."""
    return _round(replace(figure, baselines=()), lab)[0]


def _round(figure: Figure, lab: Lab) -> list[Sample]:
    """Of the subject and of each baseline."""
    with ExitStack() as stack:
        parts = [_Part(figure.subject(lab), stack)]
        for baseline in figure.baselines:
            parts.append(_Part(baseline.run(lab, parts[0].answer_bytes), stack))
        loaded = [(part, part.wanted) for part in parts if part.wanted is not None]
        loads = lab.load(*(wanted for _, wanted in loaded)) if loaded else []
        for (part, _), done in zip(loaded, loads, strict=True):
            part.advance(done)
        return [part.sample for part in parts]


class _Part:
    """A subject or a baseline: the load that it wants, or its sample."""

    def __init__(self, measuring: Measurement | Sample, stack: ExitStack) -> None:
        self.wanted: Wanted | None = None
        self.sample: Sample
        if isinstance(measuring, Sample):
            self.sample = measuring
        else:
            self._measuring = measuring
            stack.callback(measuring.close)
            self.advance(None)

    @property
    def answer_bytes(self) -> int:
        return self.sample.answer_bytes if self.wanted is None else self.wanted.answer_bytes

    def advance(self, done: Load | None) -> None:
        """Go on with what the load came to."""
        try:
            self.wanted = next(self._measuring) if done is None else self._measuring.send(done)
        except StopIteration as end:
            self.sample = end.value


def _median(samples: Sequence[Sample]) -> Sample:
    """The median of each number by itself."""
    return Sample(
        value=median(s.value for s in samples),
        answer_bytes=samples[0].answer_bytes,
        p50_ms=_known(s.p50_ms for s in samples),
        p99_ms=_known(s.p99_ms for s in samples),
        cpu_us=_known(s.cpu_us for s in samples),
        busy=_known(s.busy for s in samples),
        load_busy=_known(s.load_busy for s in samples),
    )


def _known(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
