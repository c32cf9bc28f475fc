"""``python -m benchmarks.profile NAME``: where the proxy spends its time under one figure's load.

With py-spy, if it is installed: it samples from outside, only while the load lasts, and hardly slows
the proxy. Else with cProfile, which sees the start as well and slows small functions most.
"""

from __future__ import annotations

import argparse
import pstats
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks import machine
from benchmarks.__main__ import bounded
from benchmarks.errors import Broken, OutOfTime
from benchmarks.figures import FIGURES
from benchmarks.lab import Lab
from benchmarks.machine import on_core
from benchmarks.rounds import subject
from benchmarks.servers import Server

_LIMIT_S = 120


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("figure", choices=[figure.name for figure in FIGURES])
    parser.add_argument("--seconds", type=int, default=5, help="length of the load (5)")
    parser.add_argument("--top", type=int, default=25, help="lines to print (25)")
    parser.add_argument("--cprofile", action="store_true", help="cProfile, even if there is py-spy")
    parser.add_argument("--native", action="store_true", help="py-spy: C frames too")
    parser.add_argument("--log-level", choices=["info", "warning"], default="warning", help="ours")
    chosen = parser.parse_args(argv)
    figure = next(figure for figure in FIGURES if figure.name == chosen.figure)
    spy = None if chosen.cprofile else _py_spy()
    try:
        with bounded(_LIMIT_S), tempfile.TemporaryDirectory(prefix="benchmarks-") as temporary:
            folder = Path(temporary)
            lab = Lab(chosen.seconds, machine.cores(), folder, log_level=chosen.log_level)
            path = folder / "profile"
            if spy is None:
                # Stopped by its signal the proxy returns from main as always, and cProfile writes.
                python = [sys.executable, "-m", "cProfile", "-o", str(path)]
                subject(figure, replace(lab, interpreter=python))
                pstats.Stats(str(path)).strip_dirs().sort_stats("tottime").print_stats(chosen.top)
            else:
                command = [spy, "record", "--format", "raw", "--function", "--rate", "400"]
                command += ["--output", str(path), *(["--native"] if chosen.native else [])]
                subject(figure, replace(lab, around=partial(_sampled, command, lab)))
                _print_samples(path, chosen.top)
    except (Broken, FileNotFoundError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, OutOfTime) as error:
        print(f"benchmarks: {type(error).__name__}", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _sampled(command: Sequence[str], lab: Lab, server: Server) -> Iterator[None]:
    """Run py-spy, which is ``command``, on ``server`` for the length of a ``with``."""
    with on_core(lab.cores.load), (lab.folder / "py-spy.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--pid", str(server.process.pid)], stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield
        process.send_signal(signal.SIGINT)
        process.wait(30)
    finally:
        process.kill()
        process.wait()


def _py_spy() -> str | None:
    return shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")


def _print_samples(path: Path, top: int) -> None:
    """Functions by the time in themselves, and in themselves with what they call."""
    own: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for line in path.read_text(encoding="utf-8").splitlines():
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        if not any("asyncio/runners.py" in frame for frame in frames):
            continue  # the thread of the log, which py-spy takes for busy while it waits
        own[frames[-1]] += int(count)
        for frame in set(frames):
            total[frame] += int(count)
    samples = sum(own.values()) or 1
    print(f"{samples} samples\n{'own':>7} {'total':>7}  function")
    for frame, times in own.most_common(top):
        print(f"{times / samples:7.1%} {total[frame] / samples:7.1%}  {_shown(frame)}")
    print(f"\n{'total':>7} {'own':>7}  function of asyncproxy")
    ours = [frame for frame, _ in total.most_common() if "asyncproxy/" in frame]
    for frame in ours[:top]:
        print(f"{total[frame] / samples:7.1%} {own[frame] / samples:7.1%}  {_shown(frame)}")


def _shown(frame: str) -> str:
    """A frame without the folders that differ from machine to machine."""
    return frame.replace(sys.prefix, "").replace(str(Path(__file__).parents[1]), "")


if __name__ == "__main__":
    sys.exit(main())
