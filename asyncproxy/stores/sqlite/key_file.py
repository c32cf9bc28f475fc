"""The key file beside a database, for a configuration without ``store.encryption_key``."""

from __future__ import annotations

import logging
import os
import secrets
from base64 import b64decode, b64encode
from contextlib import suppress
from pathlib import Path

from asyncproxy.core.errors import StartupError

__all__ = ["key_beside", "key_of"]

logger = logging.getLogger(__name__)


def key_of(path: Path) -> bytes:
    """The key in the key file of a database. Makes the file if the database does not exist yet.

    Raises :class:`StartupError`.
    """
    return key_beside(path) or _make_key(path)


def key_beside(path: Path) -> bytes | None:
    """The key in the key file of a database. None if neither file exists yet.

    Raises :class:`StartupError`.
    """
    beside = path.with_name(path.name + ".key")
    try:
        return _read_key(beside)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StartupError(f"the key file {beside} cannot be read: {error.strerror}") from None
    if path.exists() and path.stat().st_size:
        raise StartupError(
            f"{path} is there, and its key file {beside} is not. Put that back, or set "
            "store.encryption_key to what was in it"
        )
    return None


def _make_key(path: Path) -> bytes:
    beside = path.with_name(path.name + ".key")
    key = secrets.token_bytes(32)
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(b64encode(key) + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StartupError(f"the key file {beside} cannot be made: {error.strerror}") from None
    logger.info(
        "no store.encryption_key is set: made one, in %s. Keep it with the database and its backups: "
        "without it, jobs that wait cannot be read",
        beside,
    )
    return key


def _read_key(beside: Path) -> bytes:
    text = beside.read_bytes().strip()
    with suppress(ValueError):
        key = b64decode(text, validate=True)
        if len(key) == 32:
            return key
    raise StartupError(f"the key file {beside} does not hold 32 bytes in Base64")
