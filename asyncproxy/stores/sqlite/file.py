"""The file of a SQLite store: its lock, its schema, and the checks before it is used."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Final

from asyncproxy.core.errors import ApiError, StartupError, StoreFull, StoreUnavailable
from asyncproxy.stores.codec import Codec, require
from asyncproxy.stores.sqlite.key_file import key_beside
from asyncproxy.stores.sqlite.migrations import SCHEMA, migrate

__all__ = [
    "check",
    "check_place",
    "check_unlocked",
    "connect",
    "guard",
    "is_full",
    "locked",
    "prepared",
    "translate",
]

logger = logging.getLogger(__name__)

_APPLICATION_ID: Final = 0x61707278  # "aprx"
_OLDEST_SQLITE: Final = (3, 35, 0)  # RETURNING

# A file up to this size is checked for damage at the start, which takes a tenth of a second.
_CHECKED_BYTES: Final = 64 * 1024 * 1024

# Pages in the log at which they are moved into the file, and bytes that the log keeps afterwards.
_CHECKPOINT_PAGES: Final = 1024
_LOG_BYTES: Final = 64 * 1024 * 1024

# Bytes that the lock file reserves for a full disk. SQLite cannot open a database without 32 KiB for
# the index of its log. The rest is for the file system.
_RESERVE_BYTES: Final = 64 * 1024

# SQLite's errors on a full disk: for a write, and for the index of the log.
_FULL: Final = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)

# KiB of cached pages of a connection. Further pages are read from the file, which the system caches.
_CACHE_KIB: Final = 16 * 1024


def check(path: Path, keys: Sequence[bytes]) -> None:
    """Raise :class:`StartupError` if a start would refuse the file. Changes nothing.

    ``keys`` come from the configuration. If they are empty, the key file beside the database is used.
    """
    require(extra="sqlite")
    check_place(path)
    keys = keys or tuple(filter(None, [key_beside(path)]))
    place = path if path.exists() else path.parent
    if not os.access(place, os.W_OK):
        raise StartupError(f"{path} cannot be opened: {place} is not writable for this user")
    if not path.exists() or not path.stat().st_size:
        return
    # Read without making a log: a log of this process's user could keep the proxy's user out.
    how = "mode=ro" if path.with_name(path.name + "-wal").exists() else "immutable=1"
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True)) as connection:
            if _check(connection, path):
                _check_keys(connection, Codec(keys, seal_outcomes=False, extra="sqlite"))
    except sqlite3.Error as error:
        raise StartupError(f"{path} cannot be used: {error}") from error


def check_unlocked(path: Path) -> None:
    """Raise :class:`StartupError` if another process uses the database."""
    if path.with_name(path.name + ".lock").exists():
        with locked(path):
            pass


def check_place(path: Path) -> None:
    """Raise :class:`StartupError` if the path is neither a database of asyncproxy nor free for one."""
    if not path.parent.is_dir():
        raise StartupError(
            f"the folder {path.parent} of store.url does not exist. Make it, writable for this user"
        )
    if path.is_dir():
        raise StartupError(f"{path} is a folder; store.url names a file")
    try:
        with path.open("rb") as file:
            head = file.read(72)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StartupError(f"{path} cannot be opened: {error.strerror}") from None
    # https://www.sqlite.org/fileformat2.html#the_database_header
    ours = head[:16] == b"SQLite format 3\0" and head[68:] == _APPLICATION_ID.to_bytes(4, "big")
    if head and not ours:
        raise StartupError(f"{path} is no database of asyncproxy")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes away from a database for the length of a ``with``.

    Raises :class:`StartupError` if another process uses it. The lock ends with the process, however the
    process ends. The lock is on a file of its own: closing any descriptor of the database would drop
    all locks that SQLite has on it.
    """
    try:
        import fcntl
    except ImportError:  # not on this platform: SQLite's own locks keep the file intact
        yield
        return
    beside = path.with_name(path.name + ".lock")
    try:
        descriptor = os.open(beside, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StartupError(f"{path} cannot be opened: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StartupError(
                f"{path} belongs to another process that is running. One process can use it; for more "
                "there is redis://"
            ) from None
        _reserve(descriptor)
        yield
    finally:
        os.close(descriptor)


def is_full(file: Path | int) -> bool:
    """Whether the disk of a file (path or descriptor) has no room left for a start or a job."""
    try:
        disk = os.statvfs(file)
    except OSError:
        return False  # the file is gone: another error reports that
    return disk.f_bavail * disk.f_frsize < _RESERVE_BYTES


def _reserve(descriptor: int) -> None:
    """Reserve the bytes that a start on a full disk needs, or free them if the disk is full now."""
    with suppress(OSError):
        if is_full(descriptor):
            os.ftruncate(descriptor, 0)
        elif os.fstat(descriptor).st_size < _RESERVE_BYTES:
            os.pwrite(descriptor, bytes(_RESERVE_BYTES), 0)  # written zeros take space on the disk


def guard(path: Path) -> Callable[[], None]:
    """A check that raises :class:`StoreUnavailable` once the open database or its log was replaced.

    A deleted file can still be written to while it is open, and its contents are lost at the close.
    The check makes two system calls, about 3 µs.
    """
    files = (path, path.with_name(path.name + "-wal"))
    opened = [(found.st_dev, found.st_ino) for found in map(os.stat, files)]
    said = False

    def check() -> None:
        nonlocal said
        try:
            if [(found.st_dev, found.st_ino) for found in map(os.stat, files)] == opened:
                return
        except OSError:
            pass  # missing or unreadable: treated like a replaced file
        message = f"{path} was deleted, moved or replaced while this proxy has it open"
        if not said:
            logger.error(
                "%s: no job is taken any more. Put the files back in place and restart", message
            )
            said = True
        error = StoreUnavailable("The store is out of reach. Try again later.", retry_after_s=5)
        error.detail = message
        raise error

    return check


def connect(path: Path, *, full_durability: bool) -> sqlite3.Connection:
    """A connection to a :func:`prepared` database, for one thread at a time."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
    connection.execute(f"PRAGMA synchronous={'FULL' if full_durability else 'NORMAL'}")
    connection.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
    connection.execute(f"PRAGMA wal_autocheckpoint={_CHECKPOINT_PAGES}")
    connection.execute(f"PRAGMA journal_size_limit={_LOG_BYTES}")
    connection.execute("PRAGMA schema_version").fetchone()  # the first read opens the log too
    return connection


def prepared(path: Path, codec: Codec) -> None:
    """Make a database, or check an existing one and migrate it to the current schema.

    Raises :class:`StartupError` if the file cannot be used. Then nothing in it has changed.
    """
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        raise StartupError(f"SQLite is too old here: {sqlite3.sqlite_version}; 3.35 is needed")
    try:
        # Only this user may read it. SQLite gives the files beside it the same mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            schema = _check(connection, path)
            if schema:
                _check_keys(connection, codec)
            try:
                _set_up(connection, path, codec, schema)
            except sqlite3.Error as error:
                # A file of an earlier schema cannot be used before it is migrated.
                if schema != SCHEMA or getattr(error, "sqlite_errorcode", None) not in _FULL:
                    raise
                logger.warning("the disk of %s is full: polls are answered, and no job is taken", path)
        if 0 < schema < SCHEMA:
            logger.info("%s was brought from schema %d to %d", path, schema, SCHEMA)
    except OSError as error:
        raise StartupError(f"{path} cannot be opened: {error.strerror}") from None
    except sqlite3.Error as error:
        raise StartupError(f"{path} cannot be used: {error}") from error


def _set_up(connection: sqlite3.Connection, path: Path, codec: Codec, schema: int) -> None:
    """Migrate a database from ``schema`` (0: it is empty) to the current schema."""
    if not schema:
        connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
        connection.execute(f"PRAGMA application_id={_APPLICATION_ID}")
    (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
    if mode != "wal":  # SQLite falls back without an error where files cannot be memory-mapped
        raise StartupError(f"{path} is on a file system that SQLite cannot keep a log on")
    migrate(connection, schema)
    # Made anew at each start, with the key that is now the first.
    connection.execute("INSERT OR REPLACE INTO meta VALUES ('probe', ?)", (codec.probe(),))
    connection.execute("COMMIT")


def _check(connection: sqlite3.Connection, path: Path) -> int:
    """The schema of a file: the current one, an earlier one, or 0 for an empty file.

    Raises :class:`StartupError` for a file that cannot be used.
    """
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    version: int
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application != _APPLICATION_ID and (application or version or tables):
        raise StartupError(f"{path} is a database of another application")
    if version > SCHEMA:
        raise StartupError(
            f"{path} was written by a newer version of asyncproxy (schema {version}, "
            f"known here is {SCHEMA})"
        )
    if path.stat().st_size <= _CHECKED_BYTES:
        (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise StartupError(f"{path} is damaged: {found}")
    return version


def _check_keys(connection: sqlite3.Connection, codec: Codec) -> None:
    """Raise :class:`StartupError` if the database was sealed with none of the keys."""
    probe = connection.execute("SELECT value FROM meta WHERE name = 'probe'").fetchone()
    if probe is not None:
        codec.check(probe[0])


def translate(error: sqlite3.Error) -> ApiError:
    """The proxy's own error for an error of SQLite. Raise it ``from`` the original."""
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        return StoreFull(str(error))
    ours = StoreUnavailable("The store does not work just now. Try again later.", retry_after_s=5)
    ours.detail = f"{type(error).__name__}: {error}"
    return ours
