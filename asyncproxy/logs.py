"""Events as log lines, and the set-up of logging for the command line.

A line is made of the parts that operators search for, as ``key=value`` or JSON. What a client had a say
in is escaped in both, so that it cannot start a line or a field of its own.
"""

from __future__ import annotations

import json
import logging
import queue
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener
from typing import Any, Final

from asyncproxy.events import JobFinished, RequestPassed
from asyncproxy.jobs import JobStatus

__all__ = ["LogObserver", "logging_to_stderr"]

logger = logging.getLogger("asyncproxy")

_PLAIN: Final = re.compile(r"[A-Za-z0-9._:/@+*,;%&?()\[\]~=-]+")
_LONGEST_VALUE: Final = 512


class LogObserver:
    """Writes one line per job outcome and per request that went through."""

    def job_finished(self, event: JobFinished) -> None:
        good = event.status is JobStatus.COMPLETED
        _log(
            logging.INFO if good else logging.WARNING,
            "job " + event.status.value,
            job=event.job_id,
            endpoint=event.endpoint,
            upstream=event.upstream,
            model=event.model,
            status=event.status_code,
            code=event.code,
            attempts=event.attempts,
            total_ms=round(event.total_s * 1000),
            call_ms=round(event.call_s * 1000),
            bytes=event.result_bytes,
            detail=event.detail,
        )

    def request_passed(self, event: RequestPassed) -> None:
        _log(
            logging.INFO if event.outcome in ("ok", "client_gone") else logging.WARNING,
            "request",
            method=event.method,
            path=event.path,
            upstream=event.upstream,
            status=event.status,
            outcome=event.outcome,
            bytes=event.sent_bytes,
            total_ms=round(event.total_s * 1000, 1),
            request_id=event.request_id,
            detail=event.detail,
        )


def _log(level: int, message: str, **fields: object) -> None:
    if logger.isEnabledFor(level):
        logger.log(level, message, extra={"fields": fields})


class _Formatter(logging.Formatter):
    def _parts(self, record: logging.LogRecord) -> dict[str, Any]:
        moment = datetime.fromtimestamp(record.created, UTC)
        parts: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        fields = getattr(record, "fields", {})
        parts.update((k, _cut(v)) for k, v in fields.items() if v != "")
        if record.exc_info:
            parts["traceback"] = self.formatException(record.exc_info)
        return parts


class _TextFormatter(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        parts = self._parts(record)
        traceback = parts.pop("traceback", None)
        line = f"{parts.pop('time')} {parts.pop('level'):<7} {_escaped(parts.pop('event'))}"
        line += "".join(f" {key}={_quoted(value)}" for key, value in parts.items())
        return f"{line}\n{traceback}" if traceback else line


class _JsonFormatter(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(self._parts(record), ensure_ascii=True)


def _cut(value: object) -> object:
    if isinstance(value, str) and len(value) > _LONGEST_VALUE:
        return value[:_LONGEST_VALUE] + "…"
    return value


def _quoted(value: object) -> str:
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _escaped(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)


class _AsIs(QueueHandler):
    """Hands a record over as it is: it is formatted by the thread that writes it."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record


@contextmanager
def logging_to_stderr(level: str, style: str) -> Iterator[None]:
    """Write the log of this process to stderr for the length of a ``with``.

    ``style`` is ``text`` or ``json``. Of libraries only the warnings are written.

    Formatting and writing happen on a thread, so that a terminal that is slow does not stop the loop.
    """
    writer = logging.StreamHandler(sys.stderr)
    writer.setFormatter(_JsonFormatter() if style == "json" else _TextFormatter())
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    listener = QueueListener(records, writer)
    root = logging.getLogger()
    before = root.handlers
    root.handlers = [_AsIs(records)]  # instead of what a library may have put there at its import
    root.setLevel(logging.WARNING)
    logger.setLevel(level.upper())
    listener.start()
    try:
        yield
    finally:
        root.handlers = before
        listener.stop()
