"""Records what became of a claimed job, however long the store is away.

Every job that ends, ends here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple, TypeVar

from asyncproxy.core.errors import (
    ApiError,
    IllegalTransition,
    Interrupted,
    InvalidUpstreamResponse,
    StoreFull,
    StoreUnavailable,
)
from asyncproxy.core.events import JobFinished, Observer
from asyncproxy.core.jobs import Call, Job, Lane, Outcome, UpstreamResponse
from asyncproxy.loop.heavy_work import HEAVY_BYTES, HeavyWork
from asyncproxy.stores.base import Store
from asyncproxy.wire import credentials, envelope, submission
from asyncproxy.wire.trace_context import trace_id

__all__ = ["LastCall", "Recorder"]

logger = logging.getLogger(__name__)

# After an error of our own, so that an error that stays does not keep a core busy.
PAUSE_AFTER_ERROR_S: Final = 1.0

# Between two attempts to record an outcome, while the store does not take it.
_FIRST_RETRY_S = 0.1
_LONGEST_RETRY_S: Final = 5.0

# Between two attempts to end a job that met an error of ours.
_LONGEST_INTERRUPT_S: Final = 120.0

# Characters that the log shows of what an upstream says.
_SHOWN: Final = 512

T = TypeVar("T")


class LastCall(NamedTuple):
    """The last call of a job, for the log. Times are in seconds.

    ``hidden`` are the operator's own credentials, which the upstream got beside the call.
    """

    call: Call
    queued_s: float
    call_s: float
    hidden: frozenset[str]


class Recorder:
    """Writes outcomes, releases and pauses to the store.

    The outcome of a call was paid for: it is kept here until the store takes it. Each worker holds one
    outcome at the most, so what is kept is bounded. ``clock`` gives seconds since the epoch.
    """

    def __init__(
        self, store: Store, *, observer: Observer, heavy_work: HeavyWork, clock: Callable[[], float]
    ) -> None:
        self._store = store
        self._observer = observer
        self._heavy_work = heavy_work
        self._clock = clock

    async def finish(
        self, job: Job, outcome: UpstreamResponse | ApiError, last_call: LastCall | None = None
    ) -> None:
        """Record the outcome of a claimed job.

        ``last_call`` is the call that brought the outcome. Without one the job has waited all the time.
        """
        now = round(self._clock(), 3)
        error = outcome if isinstance(outcome, ApiError) else None
        if isinstance(outcome, UpstreamResponse):
            if outcome.size >= HEAVY_BYTES:
                await self._heavy_work.next()  # to check it, if that is not done, and to write it down
            try:
                finished = envelope.finished(job, outcome, now=now)
            except InvalidUpstreamResponse as invalid:
                error = invalid
        if error is not None:
            finished = envelope.failed(job, error, now=now)
        if await self._until_stored(job, lambda: self._store.finish(job, finished)):
            self._tell(job, finished, outcome, error, last_call, now)

    def _tell(
        self,
        job: Job,
        finished: Outcome,
        outcome: UpstreamResponse | ApiError,
        error: ApiError | None,
        last_call: LastCall | None,
        now: float,
    ) -> None:
        total_s = max(0.0, now - job.created_at)
        code, message = _upstream_error(outcome, last_call)
        body = last_call.call.body if last_call else None
        self._observer.job_finished(
            JobFinished(
                job_id=job.id,
                endpoint=job.endpoint,
                upstream=job.upstream,
                model=job.model,
                status=finished.status,
                status_code=finished.status_code,
                code=error.code if error else "",
                attempts=job.attempts,
                calls=job.calls,
                total_s=total_s,
                call_s=last_call.call_s if last_call else 0.0,
                result_bytes=outcome.size if isinstance(outcome, UpstreamResponse) else 0,
                detail=(error.detail or error.message) if error else "",
                queued_s=last_call.queued_s if last_call else total_s,
                held_s=job.held_s,
                request_id=job.request_id or job.id,
                trace_id=trace_id(job.traceparent),
                client=credentials.fingerprint(job.credential),
                request_bytes=None if body is None else len(body),
                inputs=None if body is None else submission.count_inputs(job.endpoint, body),
                upstream_code=code,
                upstream_message=message,
            )
        )

    async def release(
        self, job: Job, *, delay_s: float = 0.0, whole_lane: bool = False, call: Call | None = None
    ) -> None:
        """Make a claimed job pending again, as ``job`` is now. See :meth:`Store.release`."""
        await self._until_stored(
            job,
            lambda: self._store.release(
                job, attempts=job.attempts, delay_s=delay_s, whole_lane=whole_lane, call=call
            ),
        )

    async def pause(self, job: Job, lane: Lane, delay_s: float) -> None:
        """Hand out no job of ``lane``, which is that of ``job``, for ``delay_s``."""
        await self._until_stored(job, lambda: self._store.pause(lane, delay_s))

    async def give_back(self, job: Job) -> None:
        """Release a job at the end of this process, which does not wait for a store that is away."""
        try:
            await self._store.release(job, attempts=job.attempts)
        except (StoreUnavailable, StoreFull) as error:
            logger.warning("job %s cannot be given back now: %s", job.id, error.detail or error)

    async def interrupt(self, job: Job, why: str) -> None:
        """End a job that met an error of ours. Whatever happens, it must not stay processing.

        Never raises: the worker that calls it goes on, or there would be one less for good.
        """
        delay_s = PAUSE_AFTER_ERROR_S
        while True:
            try:
                await self.finish(job, Interrupted(why))
            except IllegalTransition:
                return  # it is pending again, or done: the error came later
            except Exception:
                logger.exception("job %s: its end cannot be recorded, it is tried again", job.id)
            else:
                return
            try:
                await self.release(job, delay_s=delay_s)
            except IllegalTransition:
                return
            except Exception:
                logger.exception("job %s: it cannot be given back either", job.id)
            else:
                return
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _LONGEST_INTERRUPT_S)

    async def _until_stored(self, job: Job, step: Callable[[], Awaitable[T]]) -> T:
        """Take a step of a claimed job, however long the store is away."""
        delay_s = _FIRST_RETRY_S
        while True:
            try:
                return await step()
            except (StoreUnavailable, StoreFull) as error:
                if delay_s == _FIRST_RETRY_S:
                    logger.warning("job %s waits for the store: %s", job.id, error.detail or error)
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _LONGEST_RETRY_S)


def _upstream_error(
    outcome: UpstreamResponse | ApiError, last_call: LastCall | None
) -> tuple[str, str]:
    """The code and the message of an upstream's error, without the credentials that it was sent."""
    if last_call is None or not isinstance(outcome, UpstreamResponse) or 200 <= outcome.status < 300:
        return "", ""
    call = last_call.call
    hidden = credentials.secrets(call.headers, call.target.partition("?")[2]) | last_call.hidden
    code, message = envelope.error_in(outcome)
    return (
        credentials.masked(code, hidden, limit=_SHOWN),
        credentials.masked(message, hidden, limit=_SHOWN),
    )
