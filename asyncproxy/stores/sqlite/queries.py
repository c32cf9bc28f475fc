"""The SQL of the store. Each function is a step on a connection: of the writer, or of a reader."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from asyncproxy.stores.base import Alias

__all__ = [
    "ROWS",
    "Gone",
    "alias_of",
    "call_of",
    "count",
    "expire",
    "insert",
    "live_after",
    "outcome_of",
    "part_of",
    "remove",
    "replace",
    "retire",
]

# Rows per step of long work, so that other steps need not wait for long.
ROWS: Final = 1000


class Gone(NamedTuple):
    """A deleted result."""

    job_id: str
    size: int


# Live jobs.


def live_after(seq: int, on: sqlite3.Connection) -> list[tuple[int, int, bytes]]:
    """Row number, size and record of the jobs after row ``seq``, at most :data:`ROWS`."""
    select = "SELECT seq, size, record FROM jobs WHERE seq > ? ORDER BY seq LIMIT ?"
    return on.execute(select, (seq, ROWS)).fetchall()


def insert(alias: Alias | None, row: tuple[Any, ...], on: sqlite3.Connection) -> None:
    """Add a job. ``row`` is its row number, id, size, record and sealed call."""
    on.execute("INSERT INTO jobs (seq, id, size, record, call) VALUES (?, ?, ?, ?, ?)", row)
    if alias is not None:
        on.execute(
            "INSERT OR REPLACE INTO aliases VALUES (?, ?, ?, ?)",
            (alias.key, alias.fingerprint, row[1], alias.single_use),
        )


def call_of(seq: int | None, on: sqlite3.Connection) -> bytes | None:
    """The sealed call of a job."""
    select = "SELECT call FROM jobs WHERE seq = ?"
    found: tuple[bytes] | None = on.execute(select, (seq,)).fetchone()
    return None if found is None else found[0]


def alias_of(key: bytes, on: sqlite3.Connection) -> tuple[bytes, str] | None:
    """The fingerprint and the job id of an alias."""
    select = "SELECT fingerprint, job_id FROM aliases WHERE key = ?"
    found: tuple[bytes, str] | None = on.execute(select, (key,)).fetchone()
    return found


# Results.


def count(on: sqlite3.Connection) -> tuple[int, int, int]:
    """The number of results, their bytes, and the row number of the last job."""
    results: tuple[int, int] = on.execute(
        "SELECT count(*), coalesce(sum(size), 0) FROM results"
    ).fetchone()
    (last,) = on.execute("SELECT coalesce(max(seq), 0) FROM jobs").fetchone()
    return *results, last


def replace(
    seq: int | None,
    result: tuple[str, float, int],
    packed: tuple[bytes, Iterable[bytes]],
    on: sqlite3.Connection,
) -> bool:
    """Replace a job by its result. False: an earlier step has deleted the job.

    ``result`` is the id, the expiry and the size; ``packed`` is the outcome and its parts.
    """
    if not on.execute("DELETE FROM jobs WHERE seq = ?", (seq,)).rowcount:
        return False
    outcome, parts = packed
    insert_result = "INSERT INTO results (id, expires_at, size, outcome) VALUES (?, ?, ?, ?)"
    row = on.execute(insert_result, (*result, outcome)).lastrowid
    on.executemany(
        "INSERT INTO parts (result, number, body) VALUES (?, ?, ?)",
        ((row, number, part) for number, part in enumerate(parts)),
    )
    return True


def outcome_of(job_id: str, on: sqlite3.Connection) -> tuple[bytes, float] | None:
    """The packed outcome of a job, and its expiry in seconds since the epoch."""
    select = "SELECT outcome, expires_at FROM results WHERE id = ?"
    found: tuple[bytes, float] | None = on.execute(select, (job_id,)).fetchone()
    return found


def part_of(job_id: str, number: int, on: sqlite3.Connection) -> bytes | None:
    """One part of a result. None: the result is gone."""
    select = (
        "SELECT body FROM parts WHERE result = (SELECT seq FROM results WHERE id = ?) AND number = ?"
    )
    found: tuple[bytes] | None = on.execute(select, (job_id, number)).fetchone()
    return None if found is None else found[0]


def remove(seq: int | None, job_id: str, now: float, on: sqlite3.Connection) -> int | None:
    """Delete a job. Returns the size of its result, 0 for a live job, None if there is neither.

    ``seq`` is the row number of a live job. None: the job is not live.
    """
    on.execute("DELETE FROM aliases WHERE job_id = ?", (job_id,))
    if on.execute("DELETE FROM jobs WHERE seq = ?", (seq,)).rowcount:
        return 0
    gone = _delete("id = ? AND expires_at > ?", (job_id, now), on)
    return gone[0].size if gone else None


def expire(now: float, on: sqlite3.Connection) -> list[Gone]:
    """Delete expired results, at most :data:`ROWS`."""
    oldest = "seq IN (SELECT seq FROM results WHERE expires_at <= ? ORDER BY expires_at LIMIT ?)"
    gone = _delete(oldest, (now, ROWS), on)
    on.executemany("DELETE FROM aliases WHERE job_id = ?", [(one.job_id,) for one in gone])
    return gone


def retire(job_id: str, until: float | None, on: sqlite3.Connection) -> bool:
    """Drop the single-use alias of a result, and let the result expire at ``until``. False: no alias.

    ``until`` of None deletes the result at once.
    """
    if not on.execute("DELETE FROM aliases WHERE job_id = ? AND once", (job_id,)).rowcount:
        return False
    if until is None:
        return bool(_delete("id = ?", (job_id,), on))
    update = "UPDATE results SET expires_at = ? WHERE id = ?"
    return bool(on.execute(update, (until, job_id)).rowcount)


def _delete(where: str, values: tuple[Any, ...], on: sqlite3.Connection) -> list[Gone]:
    delete = f"DELETE FROM results WHERE {where} RETURNING seq, id, size"  # noqa: S608  our own text
    gone = on.execute(delete, values).fetchall()
    on.executemany("DELETE FROM parts WHERE result = ?", [(seq,) for seq, _, _ in gone])
    return [Gone(job_id, size) for _, job_id, size in gone]
