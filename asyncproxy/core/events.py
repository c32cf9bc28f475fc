"""The events that observers get: frozen data, and no access to the parts of the proxy.

Durations are in seconds. ``endpoint`` and ``upstream`` are names from the configuration, and ``code``,
``outcome`` and ``reason`` come from small fixed sets, so all of them may be labels of a metric.
``model``, ``path``, ``method``, ids and ``detail`` may not: clients or upstreams can choose their text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from asyncproxy.core.jobs import JobStatus

__all__ = [
    "CallEnded",
    "ConfigReloaded",
    "FellBack",
    "JobFinished",
    "JobStarted",
    "JobSubmitted",
    "Observer",
    "Observers",
    "Paused",
    "RelayHop",
    "RequestPassed",
    "Retried",
    "StoreOperation",
    "SubmitRefused",
    "UpstreamAway",
    "UpstreamBack",
    "WaitEnded",
    "status_class",
]


class JobSubmitted(msgspec.Struct, frozen=True, gc=False):
    """A new job was accepted."""

    job_id: str
    endpoint: str
    upstream: str


class SubmitRefused(msgspec.Struct, frozen=True, gc=False):
    """A request did not become a job."""

    endpoint: str
    code: str
    """The code of the error that the client got."""


class JobStarted(msgspec.Struct, frozen=True, gc=False):
    """A job was claimed for the first time."""

    job_id: str
    endpoint: str
    upstream: str
    queued_s: float
    """From the submission to the claim."""


class CallEnded(msgspec.Struct, frozen=True, gc=False):
    """A call for a job has ended."""

    job_id: str
    endpoint: str
    upstream: str
    attempt: int
    outcome: str
    """The class of the upstream's status (``2xx``), the code of the proxy's own error, or ``aborted``.

    ``aborted``: the job was deleted, or the proxy stops.
    """
    duration_s: float


class Retried(msgspec.Struct, frozen=True, gc=False):
    """A job will be sent again after ``delay_s``."""

    job_id: str
    upstream: str
    reason: str
    """The upstream's status, if another attempt is worth it, or the code of the proxy's own error."""
    delay_s: float


class FellBack(msgspec.Struct, frozen=True, gc=False):
    """A job goes on with its next model, because ``upstream`` failed with the one before."""

    job_id: str
    upstream: str


class Paused(msgspec.Struct, frozen=True, gc=False):
    """A rate limit: the jobs of an upstream, a model and a credential wait for ``delay_s``."""

    upstream: str
    delay_s: float


class JobFinished(msgspec.Struct, frozen=True, gc=False):
    """A job has its outcome."""

    job_id: str
    endpoint: str
    upstream: str
    model: str
    """The client's text."""
    status: JobStatus
    status_code: int
    code: str
    """The code of the proxy's own error. Empty if the upstream's response is the outcome."""
    attempts: int
    """Calls that count against the retry limit."""
    total_s: float
    """From the submission to the outcome."""
    call_s: float
    """The duration of the last call."""
    result_bytes: int
    """The size of the upstream's response body."""
    detail: str = ""
    """Details of the proxy's own error, for the log. Unlike the message, they may name an address."""
    queued_s: float = 0.0
    """From the submission to the last call."""
    held_s: float = 0.0
    """The part of ``queued_s`` in which the upstream was away or limited its rate."""
    request_id: str = ""
    """The client's text, or the job's id if the client sent none."""
    trace_id: str = ""
    calls: int = 0
    """Calls that were made, including those that a rate limit refused."""
    client: str = ""
    """The fingerprint of the credential."""
    request_bytes: int | None = None
    """The size of the request body. None if the job ended without a call."""
    inputs: int | None = None
    """How many inputs an embeddings request has. None for other requests, large ones, and no call."""
    upstream_code: str = ""
    """The code in the upstream's error."""
    upstream_message: str = ""
    """The upstream's error message. It may quote the input of the request."""


class UpstreamAway(msgspec.Struct, frozen=True, gc=False):
    """An upstream takes no calls."""

    upstream: str
    reason: str
    """The last status of the upstream, or the code of the last error."""
    away_s: float
    """How long the upstream has been away. 0 when the outage begins."""
    waiting: int | None
    """How many jobs wait in the store. None: the store does not say."""


class UpstreamBack(msgspec.Struct, frozen=True, gc=False):
    """An upstream takes calls again."""

    upstream: str
    away_s: float
    """How long the upstream was away."""
    waiting: int | None
    """How many jobs wait in the store. None: the store does not say."""


class RequestPassed(msgspec.Struct, frozen=True, gc=False):
    """A request was passed through to an upstream."""

    method: str
    path: str
    """The client's text, without the query."""
    upstream: str
    status: int
    """The status that the client got. 0: the client got no response."""
    outcome: str
    """``ok``, ``client_gone``, ``upstream_broke`` (within the response), or the code of the error."""
    sent_bytes: int
    """Bytes of the response body that went to the client."""
    total_s: float
    request_id: str
    detail: str = ""
    received_bytes: int = 0
    """Bytes of the request body."""
    first_byte_s: float | None = None
    """Until the response head was sent. None: it was not sent."""
    trace_id: str = ""
    client: str = ""
    """The fingerprint of the credential."""


class WaitEnded(msgspec.Struct, frozen=True, gc=False):
    """A client's wait for a job has ended."""

    endpoint: str
    outcome: str
    """``done``, ``timeout``, ``deleted`` (the job was deleted), or ``gone`` (the client has gone)."""


class RelayHop(msgspec.Struct, frozen=True, gc=False):
    """A relayed request was redirected, so that the client goes on waiting."""

    endpoint: str


class StoreOperation(msgspec.Struct, frozen=True, gc=False):
    """An operation of the store has ended."""

    operation: str
    duration_s: float | None
    """None for an operation that waits by design."""
    error: str = ""
    """The code of the error. Empty: the operation succeeded."""


class ConfigReloaded(msgspec.Struct, frozen=True, gc=False):
    """The configuration was read again."""

    succeeded: bool
    """False: the old configuration stays."""


def status_class(status: int) -> str:
    """The class of a status: ``2xx`` for 204, ``other`` for a status that HTTP does not have."""
    return f"{status // 100}xx" if 100 <= status < 600 else "other"


class Observer:
    """Is called for each event, on the event loop. A method must not block and must not raise.

    Each method does nothing here. An observer overrides those for the events that it needs.
    """

    def job_submitted(self, event: JobSubmitted) -> None: ...

    def submit_refused(self, event: SubmitRefused) -> None: ...

    def job_started(self, event: JobStarted) -> None: ...

    def call_ended(self, event: CallEnded) -> None: ...

    def retried(self, event: Retried) -> None: ...

    def fell_back(self, event: FellBack) -> None: ...

    def paused(self, event: Paused) -> None: ...

    def job_finished(self, event: JobFinished) -> None: ...

    def upstream_away(self, event: UpstreamAway) -> None: ...

    def upstream_back(self, event: UpstreamBack) -> None: ...

    def request_passed(self, event: RequestPassed) -> None: ...

    def wait_ended(self, event: WaitEnded) -> None: ...

    def relay_hop(self, event: RelayHop) -> None: ...

    def store_operation(self, event: StoreOperation) -> None: ...

    def config_reloaded(self, event: ConfigReloaded) -> None: ...


class Observers(Observer):
    """Several observers as one. An observer is called only for the events whose method it overrides."""

    def __init__(self, observers: Iterable[Observer]) -> None:
        observers = tuple(observers)
        for name in vars(Observer):
            if name.startswith("_"):
                continue
            nothing = getattr(Observer, name)
            told = [getattr(o, name) for o in observers if getattr(type(o), name) is not nothing]
            if len(told) == 1:
                setattr(self, name, told[0])  # one observer is usual: call it without a detour
            elif told:
                setattr(self, name, _telling(told))


def _telling(told: list[Callable[[Any], None]]) -> Callable[[Any], None]:
    def tell(event: Any) -> None:
        for one in told:
            one(event)

    return tell
