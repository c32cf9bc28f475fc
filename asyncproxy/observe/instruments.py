"""Counters and histograms without locks, because only the event loop writes them.

Any thread may write those of prometheus_client: a value costs a lock, in a histogram two, and with the
look-up of its labels about a microsecond. A job writes a dozen values. Here a value costs a third.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

__all__ = ["Count", "Distribution"]

Labels = tuple[str, ...]


class Count(Collector):
    """A counter. ``name`` is without its ``_total``."""

    def __init__(
        self, name: str, text: str, labels: Sequence[str], *, registry: CollectorRegistry
    ) -> None:
        self.name = name
        self.labels = tuple(labels)
        self._text = text
        self._values: dict[Labels, float] = {} if labels else {(): 0}
        registry.register(self)

    def add(self, labels: Labels, amount: float = 1) -> None:
        """Count ``amount`` more for these values of the labels."""
        self._values[labels] = self._values.get(labels, 0) + amount

    def describe(self) -> list[Metric]:
        """The name of the counter, for the registry."""
        return [CounterMetricFamily(self.name, self._text, labels=self.labels)]

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self.name, self._text, labels=self.labels)
        for labels, value in self._values.items():
            family.add_metric(labels, value)
        yield family


class Distribution(Collector):
    """A histogram; ``bounds`` are the upper bounds of its buckets, but for the infinite one."""

    def __init__(
        self,
        name: str,
        text: str,
        labels: Sequence[str],
        bounds: Sequence[float],
        *,
        registry: CollectorRegistry,
    ) -> None:
        self.name = name
        self.labels = tuple(labels)
        self.bounds = tuple(bounds)
        self._text = text
        self._counts: dict[Labels, list[int]] = {}
        self._sums: dict[Labels, float] = {}
        if not labels:
            self._begin(())
        registry.register(self)

    def observe(self, labels: Labels, value: float) -> None:
        """Note a value for these values of the labels."""
        counts = self._counts.get(labels)
        if counts is None:
            counts = self._begin(labels)
        counts[bisect_left(self.bounds, value)] += 1
        self._sums[labels] += value

    def _begin(self, labels: Labels) -> list[int]:
        counts = self._counts[labels] = [0] * (len(self.bounds) + 1)
        self._sums[labels] = 0.0
        return counts

    def describe(self) -> list[Metric]:
        """The name of the histogram, for the registry."""
        return [HistogramMetricFamily(self.name, self._text, labels=self.labels)]

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self.name, self._text, labels=self.labels)
        edges = [*map(floatToGoString, self.bounds), "+Inf"]
        for labels, counts in self._counts.items():
            total, buckets = 0, []
            for edge, count in zip(edges, counts, strict=True):
                total += count
                buckets.append((edge, float(total)))
            family.add_metric(labels, buckets, self._sums[labels])
        yield family
