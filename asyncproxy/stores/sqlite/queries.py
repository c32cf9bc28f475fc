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

# Rows per step of work that must not keep others waiting.
ROWS: Final = 1000


class Gone(NamedTuple):
    """A result that was deleted, and its bytes."""

    job_id: str
    size: int


# Live jobs.


def live_after(seq: int, on: sqlite3.Connection) -> list[tuple[int, int, bytes]]:
    """Number, size and record of the jobs behind ``seq``, :data:`ROWS` at the most."""
    select = "SELECT seq, size, record FROM jobs WHERE seq > ? ORDER BY seq LIMIT ?"
    return on.execute(select, (seq, ROWS)).fetchall()


def insert(alias: Alias | None, row: tuple[Any, ...], on: sqlite3.Connection) -> None:
    """Add a job: its number, id, size, record and sealed call."""
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
    """The fingerprint and the job of a name."""
    select = "SELECT fingerprint, job_id FROM aliases WHERE key = ?"
    found: tuple[bytes, str] | None = on.execute(select, (key,)).fetchone()
    return found


# Results.


def count(on: sqlite3.Connection) -> tuple[int, int, int]:
    """How many results there are, their bytes, and the number of the last job."""
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
    """Put a result in the place of a job. False: the job was deleted by a step before this one.

    ``result`` is its id, its expiry and its size; ``packed`` are the outcome and its parts.
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
    """The packed outcome of a job, and when it expires."""
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
    """Delete a job. The size of the result that is gone, 0 for a live job. None: there was neither.

    Without a ``seq`` it was no live job.
    """
    on.execute("DELETE FROM aliases WHERE job_id = ?", (job_id,))
    if on.execute("DELETE FROM jobs WHERE seq = ?", (seq,)).rowcount:
        return 0
    gone = _delete("id = ? AND expires_at > ?", (job_id, now), on)
    return gone[0].size if gone else None


def expire(now: float, on: sqlite3.Connection) -> list[Gone]:
    """Delete results whose time has come, :data:`ROWS` at the most."""
    oldest = "seq IN (SELECT seq FROM results WHERE expires_at <= ? ORDER BY expires_at LIMIT ?)"
    gone = _delete(oldest, (now, ROWS), on)
    on.executemany("DELETE FROM aliases WHERE job_id = ?", [(one.job_id,) for one in gone])
    return gone


def retire(job_id: str, until: float | None, on: sqlite3.Connection) -> bool:
    """Drop the single-use name of a result, and the result at once or ``until``. False: it had none."""
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
