"""The schemas of a SQLite file, and the steps from each to the next.

A released step never changes: there are files that it will still be applied to. ``tests/data/`` has a
file of each schema, which a test opens.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Final

__all__ = ["MIGRATIONS", "SCHEMA", "migrate"]

MIGRATIONS: Final = (
    # 1. A call is the last column, so the other columns are read without the pages of the call.
    """
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL, size INTEGER NOT NULL,
    record BLOB NOT NULL, call BLOB NOT NULL
);
CREATE TABLE results (
    seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, expires_at REAL NOT NULL,
    size INTEGER NOT NULL, outcome BLOB NOT NULL
);
CREATE INDEX results_expiry ON results (expires_at, size);
CREATE TABLE aliases (
    key BLOB PRIMARY KEY, fingerprint BLOB NOT NULL, job_id TEXT NOT NULL, once INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX aliases_job ON aliases (job_id);
""",
    # 2. Large results are in parts. Versions with schema 1 drop unknown fields of a record, so they
    # must not open a file that a later version has written to.
    """
CREATE TABLE parts (result INTEGER NOT NULL, number INTEGER NOT NULL, body BLOB NOT NULL);
CREATE UNIQUE INDEX parts_result ON parts (result, number);
""",
)

# The schema of this version. A later one is refused.
SCHEMA: Final = len(MIGRATIONS)


def migrate(
    connection: sqlite3.Connection, schema: int, migrations: Sequence[str] = MIGRATIONS
) -> None:
    """Begin a transaction and apply the steps after ``schema`` (0: the file is empty) in it.

    The caller commits.
    """
    connection.executescript("BEGIN IMMEDIATE;" + "".join(migrations[schema:]))
    if schema < len(migrations):
        connection.execute(f"PRAGMA user_version={len(migrations)}")
