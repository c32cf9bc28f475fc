"""Events as log lines, and the set-up of logging for the command line.

A line has the fields that operators search for, as ``key=value`` or JSON. Text that a client can choose
is escaped in both, so that it cannot begin a new line or field.
"""

from __future__ import annotations

import json
import logging
import queue
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from logging.handlers import QueueHandler
from time import time
from typing import Any, Final

from asyncproxy.core.events import (
    JobFinished,
    Observer,
    RequestPassed,
    Retried,
    SubmitRefused,
    UpstreamAway,
    UpstreamBack,
)
from asyncproxy.core.jobs import JobStatus

__all__ = ["Log", "LogObserver", "json_line", "logging_to_stderr"]

logger = logging.getLogger("asyncproxy")

_PLAIN: Final = re.compile(r"[A-Za-z0-9._:/@+*,;%&?()\[\]~=-]+")
_LONGEST_VALUE: Final = 512
_MOST_WAITING: Final = 10_000
_LAST_WAIT_S: Final = 2.0


class LogObserver(Observer):
    """Writes one line per job outcome and per request that passed through.

    ``base_urls`` are the URLs of the upstreams by name. May be set at any time.
    """

    def __init__(self, base_urls: Mapping[str, str] | None = None) -> None:
        self.base_urls = base_urls or {}

    def job_finished(self, event: JobFinished) -> None:
        # A client's mistake is no warning for the operator.
        theirs = event.status is JobStatus.COMPLETED or 400 <= event.status_code < 500
        level = logging.INFO if theirs else logging.WARNING
        if not logger.isEnabledFor(level):
            return
        # An upstream's message may quote the client's input, so it is logged at debug only.
        quoted = event.upstream_message if logger.isEnabledFor(logging.DEBUG) else ""
        _log(
            level,
            "job " + event.status.value,
            job=event.job_id,
            request_id=event.request_id,
            trace_id=event.trace_id,
            client=event.client,
            endpoint=event.endpoint,
            upstream=event.upstream,
            model=event.model,
            status=event.status_code,
            code=event.code,
            upstream_code=event.upstream_code,
            attempts=event.attempts,
            calls=event.calls,
            total_ms=round(event.total_s * 1000),
            queue_ms=round(event.queued_s * 1000),
            held_ms=round(event.held_s * 1000) or "",
            call_ms=round(event.call_s * 1000),
            inputs=event.inputs,
            request_bytes=event.request_bytes,
            bytes=event.result_bytes,
            base_url="" if event.code else self._base_url(event.status_code, event.upstream),
            detail=event.detail,
            upstream_message=quoted,
        )

    def request_passed(self, event: RequestPassed) -> None:
        level = logging.INFO if event.outcome in ("ok", "client_gone") else logging.WARNING
        if not logger.isEnabledFor(level):
            return  # saves the work for thousands of requests per second
        _log(
            level,
            "request",
            method=event.method,
            path=event.path,
            client=event.client,
            upstream=event.upstream,
            status=event.status,
            outcome=event.outcome,
            request_bytes=event.received_bytes,
            bytes=event.sent_bytes,
            total_ms=round(event.total_s * 1000, 1),
            request_id=event.request_id,
            trace_id=event.trace_id,
            base_url=self._base_url(event.status, event.upstream) if event.outcome == "ok" else "",
            detail=event.detail,
        )

    def upstream_away(self, event: UpstreamAway) -> None:
        _log(
            logging.WARNING,
            "upstream is still away" if event.away_s else "upstream is away",
            upstream=event.upstream,
            reason=event.reason,
            away_s=round(event.away_s),
            waiting="" if event.waiting is None else event.waiting,
        )

    def upstream_back(self, event: UpstreamBack) -> None:
        _log(
            logging.WARNING,
            "upstream is back",
            upstream=event.upstream,
            away_s=round(event.away_s),
            waiting="" if event.waiting is None else event.waiting,
        )

    def _base_url(self, status: int, upstream: str) -> str:
        """The URL of an upstream after a 404, which may mean a wrong path. Empty otherwise."""
        return self.base_urls.get(upstream, "") if status == 404 else ""

    def retried(self, event: Retried) -> None:
        _log(
            logging.DEBUG,
            "job retried",
            job=event.job_id,
            upstream=event.upstream,
            reason=event.reason,
            delay_ms=round(event.delay_s * 1000),
        )

    def submit_refused(self, event: SubmitRefused) -> None:
        _log(logging.DEBUG, "submit refused", endpoint=event.endpoint, code=event.code)


def _log(level: int, message: str, **fields: object) -> None:
    if logger.isEnabledFor(level):
        # Values are cut here: the queue of lines is bounded by their number, and not by their size.
        cut = {key: _cut(v) for key, v in fields.items() if v is not None and v != ""}
        logger.log(level, _Line(message, cut), extra={"fields": cut})


class _Line:
    """An event and its fields. ``str()`` has both, for the formatters of a host application."""

    __slots__ = ("event", "fields")

    def __init__(self, event: str, fields: Mapping[str, object]) -> None:
        self.event = event
        self.fields = fields

    def __str__(self) -> str:
        return self.event + "".join(f" {key}={_quoted(value)}" for key, value in self.fields.items())


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        event = record.msg
        text = str(event) if isinstance(event, _Line) else _escaped(record.getMessage())
        line = f"{_time(record.created)} {record.levelname.lower():<7} {text}"
        if not record.exc_info:
            return line
        # Indented, so that no line of it can pass for a line of the log.
        return "\n    ".join([line, *self.formatException(record.exc_info).splitlines()])


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = record.msg
        parts: dict[str, Any] = {
            "time": _time(record.created),
            "level": record.levelname.lower(),
            "event": line.event if isinstance(line, _Line) else record.getMessage(),
        }
        if isinstance(line, _Line):
            parts.update(line.fields)
        if record.exc_info:
            parts["traceback"] = self.formatException(record.exc_info)
        return json.dumps(parts, ensure_ascii=True)


def _time(seconds: float) -> str:
    moment = datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


def json_line(event: str, **fields: object) -> str:
    """A line in the form of ``format: json``, for output outside the log."""
    parts = {"time": _time(time()), "level": "info", "event": event, **fields}
    return json.dumps(parts, ensure_ascii=True)


def _cut(value: object) -> object:
    if isinstance(value, str) and len(value) > _LONGEST_VALUE:
        return value[:_LONGEST_VALUE] + "…"
    return value


def _quoted(value: object) -> str:
    text = str(value)
    if type(value) is int:  # half of all fields
        return text
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


def _escaped(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)


class _Outbox(QueueHandler):
    """Passes records to the writing thread. Drops records while its queue is full."""

    def __init__(self, records: queue.Queue[logging.LogRecord | None]) -> None:
        super().__init__(records)
        self.dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # the writing thread formats it

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1


def _is_ours_to_show(record: logging.LogRecord) -> bool:
    """Whether a record may be shown. Those of the form parser quote bytes of the body."""
    return not record.name.startswith("python_multipart")


class Log:
    """The settings of the log on stderr."""

    def __init__(self, writer: logging.Handler) -> None:
        self._writer = writer

    def configure(self, level: str, style: str) -> None:
        """Write lines of ``level`` and above, as ``text`` or ``json``. Also applies to queued lines."""
        self._writer.setFormatter(_JsonFormatter() if style == "json" else _TextFormatter())
        logger.setLevel(level.upper())


@contextmanager
def logging_to_stderr(level: str, style: str) -> Iterator[Log]:
    """Write the log of this process to stderr for the length of a ``with``.

    ``level`` and ``style`` are as for :meth:`Log.configure`. Only warnings of libraries are written. A
    thread formats and writes, so a slow terminal does not block the loop. If nobody reads stderr, lines
    are dropped, and the end of the ``with`` waits at most two seconds for the remaining lines.
    """
    writer = logging.StreamHandler(sys.stderr)
    records: queue.Queue[logging.LogRecord | None] = queue.Queue(_MOST_WAITING)
    outbox = _Outbox(records)
    outbox.addFilter(_is_ours_to_show)
    thread = threading.Thread(target=_write, args=(records, writer), daemon=True, name="log")
    root = logging.getLogger()
    before = root.handlers, root.level, logger.level
    root.handlers = [outbox]  # replaces handlers that a library may have added at its import
    root.setLevel(logging.WARNING)
    log = Log(writer)
    log.configure(level, style)
    thread.start()
    try:
        yield log
    finally:
        if outbox.dropped:
            logger.warning("%d lines of this log were dropped", outbox.dropped)
        root.handlers, root.level, logger.level = before
        with suppress(queue.Full):
            records.put(None, timeout=_LAST_WAIT_S)
        thread.join(_LAST_WAIT_S)


def _write(records: queue.Queue[logging.LogRecord | None], writer: logging.Handler) -> None:
    while (record := records.get()) is not None:
        writer.handle(record)
