"""What there is to observe. Whoever looks on gets a frozen event, and nothing else of us."""

from __future__ import annotations

from typing import Protocol

import msgspec

from asyncproxy.jobs import JobStatus

__all__ = ["JobFinished", "Observer", "RequestPassed"]


class JobFinished(msgspec.Struct, frozen=True):
    """A job has its outcome. Durations in seconds.

    ``detail`` is what the client library said of a call that brought no answer; unlike the error that
    the client sees, it may name an address. ``model`` is the client's text.
    """

    job_id: str
    endpoint: str
    upstream: str
    model: str
    status: JobStatus
    status_code: int
    code: str
    attempts: int
    total_s: float
    call_s: float
    result_bytes: int
    detail: str = ""


class RequestPassed(msgspec.Struct, frozen=True):
    """A request has gone through to an upstream. ``path`` is the client's text, without its query.

    ``outcome`` is ``ok``, ``client_gone``, ``upstream_broke`` (in the middle of the answer), or the
    code of the error that was answered instead.
    """

    method: str
    path: str
    upstream: str
    status: int
    outcome: str
    sent_bytes: int
    total_s: float
    request_id: str
    detail: str = ""


class Observer(Protocol):
    """Told of each event as it happens, on the event loop: it must not block."""

    def job_finished(self, event: JobFinished) -> None: ...

    def request_passed(self, event: RequestPassed) -> None: ...
