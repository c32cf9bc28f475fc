"""The schemas of a SQLite file, and the steps from each to the next.

A step stays as it is once it was released: files that it has not been applied to exist. ``tests/data/``
has a file of each schema, which a test opens.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Final

__all__ = ["MIGRATIONS", "SCHEMA", "migrate"]

MIGRATIONS: Final = (
    # 1. A call comes last in its row: what stands before it is read without its pages.
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
    # 2. Large results are in parts. Versions of schema 1 drop the fields of a record that they do not
    # know, so they must not open a file that later versions have written to.
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
    """Begin a transaction, and bring a file from ``schema`` (0: it is empty) to the last one in it.

    The caller commits.
    """
    connection.executescript("BEGIN IMMEDIATE;" + "".join(migrations[schema:]))
    if schema < len(migrations):
        connection.execute(f"PRAGMA user_version={len(migrations)}")
