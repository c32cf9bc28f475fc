"""What there is to observe. Whoever looks on gets a frozen event, and nothing else of us.

Durations are in seconds. ``endpoint`` and ``upstream`` are names of the configuration, and every
``code``, ``outcome`` and ``reason`` is one of a set of ours, so they may be labels of a metric.
``model``, ``path``, ``method``, ids and ``detail`` may not: clients or upstreams have a say in them.
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
    """A request did not become a job; ``code`` is that of its error."""

    endpoint: str
    code: str


class JobStarted(msgspec.Struct, frozen=True, gc=False):
    """A job was claimed for the first time, ``queued_s`` after its submission."""

    job_id: str
    endpoint: str
    upstream: str
    queued_s: float


class CallEnded(msgspec.Struct, frozen=True, gc=False):
    """An attempt at a job has ended.

    ``outcome`` is the class of the upstream's status (``2xx``), the code of an error of ours, or
    ``aborted``: its job was deleted, or the proxy stops.
    """

    job_id: str
    endpoint: str
    upstream: str
    attempt: int
    outcome: str
    duration_s: float


class Retried(msgspec.Struct, frozen=True, gc=False):
    """A job will be tried again in ``delay_s``.

    ``reason`` is the upstream's status, one of those worth a retry, or the code of an error of ours.
    """

    job_id: str
    upstream: str
    reason: str
    delay_s: float


class FellBack(msgspec.Struct, frozen=True, gc=False):
    """A job goes on with the next of its models, for ``upstream`` has failed it."""

    job_id: str
    upstream: str


class Paused(msgspec.Struct, frozen=True, gc=False):
    """The jobs of an upstream, a model and a credential wait for ``delay_s``: a rate limit."""

    upstream: str
    delay_s: float


class JobFinished(msgspec.Struct, frozen=True, gc=False):
    """A job has its outcome."""

    job_id: str
    endpoint: str
    upstream: str
    model: str
    """The client's text, as is ``request_id``."""
    status: JobStatus
    status_code: int
    code: str
    """That of an error of ours. Empty if the upstream's answer is the outcome."""
    attempts: int
    """Calls that count against the limit of retries."""
    total_s: float
    call_s: float
    """Of the last call."""
    result_bytes: int
    """Of the upstream's answer."""
    detail: str = ""
    """Of an error of ours; unlike what the client sees, it may name an address."""
    queued_s: float = 0.0
    """From the submission to the last call."""
    held_s: float = 0.0
    """How much of it the job waited for an upstream that was away or limited its rate."""
    request_id: str = ""
    trace_id: str = ""
    calls: int = 0
    """Calls that were made, those that a rate limit refused included."""
    client: str = ""
    """The fingerprint of the credential."""
    request_bytes: int | None = None
    """Of the request's body. None if the job ended without a call, as of ``inputs``."""
    inputs: int | None = None
    """Inputs of a request for embeddings. None if there are none, or it takes long to count them."""
    upstream_code: str = ""
    """The code in the upstream's error."""
    upstream_message: str = ""
    """What the upstream says of a failure. It may quote the input of the request."""


class UpstreamAway(msgspec.Struct, frozen=True, gc=False):
    """An upstream takes no calls: since now, or still after ``away_s``.

    ``reason`` is the status or the code that was seen last. ``waiting`` is how many jobs wait in the
    store, None if the store does not say.
    """

    upstream: str
    reason: str
    away_s: float
    waiting: int | None


class UpstreamBack(msgspec.Struct, frozen=True, gc=False):
    """An upstream takes calls again, after ``away_s``. ``waiting`` is as in :class:`UpstreamAway`."""

    upstream: str
    away_s: float
    waiting: int | None


class RequestPassed(msgspec.Struct, frozen=True, gc=False):
    """A request has gone through to an upstream. ``path`` is the client's text, without its query.

    ``outcome`` is ``ok``, ``client_gone``, ``upstream_broke`` (in the middle of the answer), or the
    code of the error that was answered instead. ``status`` is 0 where nothing was answered.
    ``sent_bytes`` are those of the answer's body, ``received_bytes`` those of the request's.
    ``first_byte_s``: until the head of the answer left; None if none did. ``client`` is the fingerprint
    of the credential.
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
    received_bytes: int = 0
    first_byte_s: float | None = None
    trace_id: str = ""
    client: str = ""


class WaitEnded(msgspec.Struct, frozen=True, gc=False):
    """A client that was held until a job ends is held no more.

    ``outcome`` is ``done``, ``timeout``, ``deleted`` (the job), or ``gone`` (the client).
    """

    endpoint: str
    outcome: str


class RelayHop(msgspec.Struct, frozen=True, gc=False):
    """A relayed request was redirected to go on waiting."""

    endpoint: str


class StoreOperation(msgspec.Struct, frozen=True, gc=False):
    """A store has done what it was asked for, or not: ``error`` is a code then, otherwise empty.

    Of operations that wait by design, ``duration_s`` is None.
    """

    operation: str
    duration_s: float | None
    error: str = ""


class ConfigReloaded(msgspec.Struct, frozen=True, gc=False):
    """The configuration was read again. Unless it ``succeeded``, the old one stays."""

    succeeded: bool


def status_class(status: int) -> str:
    """``2xx`` for 204: the same few labels, whatever an upstream answers with."""
    return f"{status // 100}xx" if 100 <= status < 600 else "other"


class Observer:
    """Told of each event as it happens, on the event loop: it must not block, nor raise.

    Each method does nothing here. An observer has those that it is interested in.
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
    """Several observers as one. Each is told only of what it has a method of its own for."""

    def __init__(self, observers: Iterable[Observer]) -> None:
        observers = tuple(observers)
        for name in vars(Observer):
            if name.startswith("_"):
                continue
            nothing = getattr(Observer, name)
            told = [getattr(o, name) for o in observers if getattr(type(o), name) is not nothing]
            if len(told) == 1:
                setattr(self, name, told[0])  # nearly every event has one: no call in between
            elif told:
                setattr(self, name, _telling(told))


def _telling(told: list[Callable[[Any], None]]) -> Callable[[Any], None]:
    def tell(event: Any) -> None:
        for one in told:
            one(event)

    return tell
