"""Unused pages of a SQLite file, given back to the file system."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable
from typing import Final

__all__ = ["FREED_PAGES", "SPARE_PAGES", "free_pages", "give_back"]

# Unused pages of 4 KiB that the file may keep, and how many are freed in one step: 10 ms.
SPARE_PAGES: Final = 4096
FREED_PAGES: Final = 1024

# Of what is too much a tenth is freed in each second, so most is gone in a minute: one step more for
# each of so many pages, up to 0.6 s of the writing thread.
_PAGES_PER_STEP: Final = 10 * FREED_PAGES
_MOST_STEPS: Final = 64

Step = Callable[[sqlite3.Connection], int]
Run = Callable[[Step], Awaitable[int]]


async def give_back(write: Run, read: Run) -> None:
    """Make the file smaller if much of it is unused. To be called about once a second.

    ``write`` runs a step in a transaction, ``read`` runs one outside of any.
    """
    surplus = await write(free_pages)
    for _ in range(min(surplus // _PAGES_PER_STEP, _MOST_STEPS)):
        await write(free_pages)
    if surplus:
        await read(_cut_off)


def free_pages(on: sqlite3.Connection) -> int:
    """Free unused pages, but for some: they are used again soon. How many were too many before."""
    (pages,) = on.execute("PRAGMA page_count").fetchone()
    (unused,) = on.execute("PRAGMA freelist_count").fetchone()
    surplus: int = max(0, unused - max(SPARE_PAGES, pages // 4))
    # SQLite frees one page per row of this statement, and Python 3.11 asks for the first row alone.
    for _ in range(min(surplus, FREED_PAGES)):
        on.execute("PRAGMA incremental_vacuum(1)").fetchall()
    return surplus


def _cut_off(on: sqlite3.Connection) -> int:
    """Move the log into the file, whose end goes only then. Nobody waits for it."""
    return len(on.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall())
