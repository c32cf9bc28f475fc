"""``python -m benchmarks``: measures every figure, prints the table, writes it into ``results/``."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import machine, report
from benchmarks.errors import Broken, OutOfTime
from benchmarks.figures import FIGURES
from benchmarks.lab import Lab
from benchmarks.rounds import Row, measure

__all__ = ["bounded", "main"]

_ROUNDS = 3
_LIMIT_S = 300


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: measured. 1: something is broken, or took too long. 130: interrupted."""
    chosen = _parser().parse_args(argv)
    figures = [f for f in FIGURES if (not f.apart if chosen.only is None else f.name == chosen.only)]
    facts = {**machine.describe(), "cores": str(machine.cores())}
    for name, value in facts.items():
        _say(f"{name}: {value}")
    rows: list[Row] = []
    failures: list[str] = []
    left = [figure.name for figure in figures]
    started = time.monotonic()
    seconds = 1 if chosen.quick else chosen.seconds
    try:
        with bounded(_LIMIT_S), tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
            lab = Lab(seconds, machine.cores(), Path(folder), log_level=chosen.log_level)
            for figure in figures:
                try:
                    rows += measure(figure, lab, rounds=_ROUNDS, say=_say)
                except Broken as error:
                    failures.append(f"{figure.name}: {error}")
                    _say(f"{figure.name}: BROKEN: {error}")
                left.remove(figure.name)
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except OutOfTime:
        failures.append(f"stopped after {_LIMIT_S} s, without {', '.join(left)}")
    if rows:
        print(report.table(rows))
    print(f"\n{time.monotonic() - started:.0f} s")
    for failure in failures:
        print(f"BROKEN: {failure}")
    if rows and not chosen.quick and chosen.only is None:
        path = report.write(
            rows,
            facts,
            folder=Path(__file__).parent / "results",
            date=f"{datetime.now(UTC):%Y-%m-%d}",
            rounds=_ROUNDS,
            seconds=seconds,
            log_level=chosen.log_level,
            missing=failures,
        )
        print(f"written to benchmarks/results/{path.name}")
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", metavar="NAME", choices=[f.name for f in FIGURES], help="one figure")
    parser.add_argument("--quick", action="store_true", help="a second each, nothing is written")
    parser.add_argument("--seconds", type=int, default=2, help="length of each load (2)")
    parser.add_argument(
        "--log-level", choices=["info", "warning"], default="warning", help="of the proxy"
    )
    return parser


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def bounded(limit_s: int) -> Iterator[None]:
    """Raise :class:`OutOfTime` after ``limit_s``, and KeyboardInterrupt for SIGTERM as for Ctrl-C.

    Both go through every ``with`` on their way out, and so end all children.
    """

    def too_late(*_: object) -> None:
        raise OutOfTime

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, too_late), signal.signal(signal.SIGTERM, stop)
    signal.alarm(limit_s)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before[0])
        signal.signal(signal.SIGTERM, before[1])


if __name__ == "__main__":
    sys.exit(main())
