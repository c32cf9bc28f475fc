"""Work in steps: the caller can let other tasks run between two steps. Pure."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeAlias, TypeVar

__all__ = ["Steps", "at_once"]

T = TypeVar("T")

# A generator that does some milliseconds of work up to each ``yield``, and returns the result.
Steps: TypeAlias = Generator[None, None, T]


def at_once(steps: Steps[T]) -> T:
    """Run ``steps`` without a pause and return their result. Raises the errors of the steps."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result
