"""Counts work in place of time: how many lines of a module run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any


@contextmanager
def lines_run_in(module: ModuleType) -> Iterator[Callable[[], int]]:
    """Count the lines of ``module`` that run within this. It gives a function that tells how many."""
    count = 0

    def at_line(_frame: FrameType, event: str, _arg: Any) -> Any:
        nonlocal count
        count += event == "line"
        return at_line

    def at_call(frame: FrameType, _event: str, _arg: Any) -> Any:
        return at_line if frame.f_code.co_filename == module.__file__ else None

    before = sys.gettrace()
    sys.settrace(at_call)
    try:
        yield lambda: count
    finally:
        sys.settrace(before)
