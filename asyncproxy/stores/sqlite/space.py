"""Gives unused pages of a SQLite file back to the file system."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable
from typing import Final

__all__ = ["FREED_PAGES", "SPARE_PAGES", "free_pages", "give_back"]

# Unused pages of 4 KiB that the file may keep, and pages that one step frees, in 10 ms.
SPARE_PAGES: Final = 4096
FREED_PAGES: Final = 1024

# Each second a tenth of the surplus is freed, so most of it is gone in a minute: one further step for
# each of so many surplus pages, up to 0.6 s of the writing thread.
_PAGES_PER_STEP: Final = 10 * FREED_PAGES
_MOST_STEPS: Final = 64

Step = Callable[[sqlite3.Connection], int]
Run = Callable[[Step], Awaitable[int]]


async def give_back(write: Run, read: Run) -> None:
    """Make the file smaller if much of it is unused. Call this about once a second.

    ``write`` runs a step in a transaction, ``read`` runs one outside of any.
    """
    surplus = await write(free_pages)
    for _ in range(min(surplus // _PAGES_PER_STEP, _MOST_STEPS)):
        await write(free_pages)
    if surplus:
        await read(_cut_off)


def free_pages(on: sqlite3.Connection) -> int:
    """Free some unused pages. Returns the surplus before: unused pages beyond those to keep."""
    (pages,) = on.execute("PRAGMA page_count").fetchone()
    (unused,) = on.execute("PRAGMA freelist_count").fetchone()
    surplus: int = max(0, unused - max(SPARE_PAGES, pages // 4))
    # SQLite frees one page per row of this statement, and Python 3.11 asks for the first row alone.
    for _ in range(min(surplus, FREED_PAGES)):
        on.execute("PRAGMA incremental_vacuum(1)").fetchall()
    return surplus


def _cut_off(on: sqlite3.Connection) -> int:
    """Move the log into the file, which is truncated only then. Blocks no reader or writer."""
    return len(on.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall())
