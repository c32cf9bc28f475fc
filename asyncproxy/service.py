"""The operations on jobs, the same for every way in: submit, find, wait, delete."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

from asyncproxy.core.endpoints import Endpoint
from asyncproxy.core.errors import (
    ApiError,
    InternalError,
    JobNotFound,
    Overloaded,
    ShuttingDown,
    StoreFull,
    StoreUnavailable,
    TooManyJobs,
)
from asyncproxy.core.events import JobSubmitted, Observer, SubmitRefused, WaitEnded
from asyncproxy.core.jobs import Call, Fallback, Job, Outcome
from asyncproxy.dispatch.dispatcher import Dispatcher
from asyncproxy.loop.heavy_work import HeavyWork
from asyncproxy.observe.tracing import ENDPOINT, JOB, MODEL, Tracer
from asyncproxy.stores.base import Alias, Store
from asyncproxy.upstream.model_routes import ModelRoutes
from asyncproxy.wire import credentials, preferences, submission
from asyncproxy.wire.request import Caller, Request, RequestHead
from asyncproxy.wire.steps import Steps, at_once
from asyncproxy.wire.submission import Submission

__all__ = ["JobService", "Lifetimes", "Submitted", "shutting_down"]

logger = logging.getLogger(__name__)

# Bytes of a body that are hashed in one step. A step takes about a millisecond.
_HASHED_AT_ONCE = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """How long results live, and how long a client may wait for a job, in seconds."""

    default_s: int = 3600
    """The lifetime of a result after completion, if the client asks for none."""
    max_s: int = 86400
    """The longest lifetime that a client may ask for."""
    max_wait_s: float = 60.0
    """The longest wait of a poll."""


class Submitted(NamedTuple):
    """The job of a request."""

    job: Job | Outcome
    replayed: bool
    """Whether an earlier request has made the job."""


class JobService:
    """The operations on jobs that the async paths, the relay and the header form share.

    ``clock`` returns seconds since the epoch. ``new_id`` returns the id of a new job. Nobody may be
    able to guess an id: nothing else protects a job that was submitted without a credential.
    """

    def __init__(
        self,
        *,
        store: Store,
        dispatcher: Dispatcher,
        routes: ModelRoutes,
        lifetimes: Lifetimes,
        new_id: Callable[[], str],
        observer: Observer,
        tracer: Tracer,
        heavy_work: HeavyWork,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._dispatcher = dispatcher
        self._routes = routes
        self._key, *self._older_keys = store.credential_keys
        self.lifetimes = lifetimes
        self._clock = clock
        self._new_id = new_id
        self._observer = observer
        self._tracer = tracer
        self._heavy_work = heavy_work
        self.retry_after_s = dispatcher.retry_after_s
        self.read = store.read
        self.waiting = 0  # clients that wait for a job to end

    @property
    def draining(self) -> bool:
        """Whether the proxy stops and accepts no job any more."""
        return self._dispatcher.draining

    async def submit(self, endpoint: Endpoint, request: Request) -> Submitted:
        """Make a request a job, or find the job that its ``Idempotency-Key`` names.

        Raises :class:`ModelNotFound`, :class:`ShuttingDown`, and the errors of
        :func:`submission.check` and :meth:`Store.create`.
        """
        head = request.head
        asked = await self._check(endpoint, request)
        alias = None
        if (key := head.idempotency_key) is not None:
            name = at_once(self._hash(b"key", head.caller.digest, endpoint.name.encode(), key))
            alias = Alias(name, await self._identify(asked, request, request.query_bytes))
        return await self._create(endpoint, request, asked, alias)

    async def submit_relayed(
        self, endpoint: Endpoint, request: Request, *, is_retry: bool
    ) -> Submitted:
        """Make a relayed request a job, or find the job of an equal earlier request.

        ``is_retry``: the client says that it has sent this request before. Raises as :meth:`submit`.
        """
        head = request.head
        asked = await self._check(endpoint, request)
        key = head.idempotency_key
        path, query = endpoint.name.encode(), request.query_bytes
        name = await self._identify(
            asked, request, b"relay", head.caller.digest, path, query, key or b""
        )
        reuse = is_retry or endpoint.repeatable or key is not None
        alias = Alias(name, b"", reuse_existing=reuse, single_use=True)
        return await self._create(endpoint, request, asked, alias)

    async def _check(self, endpoint: Endpoint, request: Request) -> Submission:
        content_type, body = request.head.content_type, request.body
        asked = submission.check_small(endpoint, content_type, body)
        if asked is None:
            steps = submission.check_in_steps(endpoint, content_type, body)
            asked = await self._heavy_work.run(steps)
        return asked

    async def _create(
        self, endpoint: Endpoint, request: Request, asked: Submission, alias: Alias | None
    ) -> Submitted:
        if self._dispatcher.draining:  # the stop may have begun while the body was read
            raise shutting_down()
        head = request.head
        span = self._tracer.start(
            "submit", head.traceparent, {ENDPOINT: endpoint.name, MODEL: asked.model}
        )
        outcome = InternalError.code
        try:
            job = self._job(endpoint, head, asked, span.traceparent or head.traceparent)
            query = request.query
            call = Call(
                endpoint=endpoint.name,
                target=f"{endpoint.sync_path}?{query}" if query else endpoint.sync_path,
                head=head.sent_for(job.id),
                body=asked.body,
            )
            existing = await self._store.create(job, call, alias)
            span.note(JOB, job.id if existing is None else existing.id)
            outcome = ""
        except ApiError as error:
            outcome = error.code
            error.model = asked.model
            if isinstance(error, TooManyJobs | Overloaded):
                # The jobs that take the room wait for the upstream.
                error.postpone(self._dispatcher.back_after_s(job.upstream))
            raise
        finally:
            span.end(outcome)
        if existing is not None:
            return Submitted(existing, replayed=True)
        self._observer.job_submitted(JobSubmitted(job.id, job.endpoint, job.upstream))
        return Submitted(job, replayed=False)

    def refused(self, endpoint: Endpoint, error: ApiError) -> None:
        """Tell the observers that a request did not become a job."""
        self._observer.submit_refused(SubmitRefused(endpoint.name, error.code))

    async def find(self, endpoint: Endpoint, caller: Caller, job_id: str) -> Job | Outcome:
        """The job, if ``caller`` may see it. Raises :class:`JobNotFound` otherwise."""
        job = await self._store.get(job_id)
        owner = b"" if job is None else job.credential
        allowed = credentials.same(owner or caller.digest, caller.digest)
        if caller.credential:
            for key in self._older_keys:  # the job may be older than the newest key
                allowed |= credentials.same(owner, credentials.digest(caller.credential, key))
        if job is None or not allowed or job.endpoint != endpoint.name:
            raise not_found()
        return job

    async def wait(self, job: Job | Outcome, timeout_s: float) -> Job | Outcome:
        """``job`` as soon as it is terminal, or its state after ``timeout_s``.

        Raises :class:`JobNotFound` if the job is deleted meanwhile.
        """
        if isinstance(job, Outcome):
            return job
        outcome = "gone"  # if the wait is cancelled, the client has gone
        self.waiting += 1
        try:
            now = await self._store.wait(job.id, timeout_s)
            outcome = "deleted" if now is None else "done" if isinstance(now, Outcome) else "timeout"
        finally:
            self.waiting -= 1
            self._observer.wait_ended(WaitEnded(job.endpoint, outcome))
        if now is None:
            raise not_found()
        return now

    def waiting_time(self, *, query: str | None, prefer: str | None) -> float | None:
        """Seconds that a client asks to wait, in ``?wait=`` or ``Prefer``. None: it does not ask."""
        if query is None and prefer is None:
            return None
        return preferences.wait(query, prefer, max_s=self.lifetimes.max_wait_s)

    async def delete(self, job: Job | Outcome) -> None:
        """Delete a job and abort its call. Raises :class:`JobNotFound` if the job is already gone."""
        if not await self._store.delete(job.id):
            raise not_found()
        if isinstance(job, Job):
            self._dispatcher.abort(job.id)

    async def delivered(self, outcome: Outcome, keep_s: float) -> None:
        """Let the next equal relayed request be a new job: the client has the response of this one.

        The result is kept for ``keep_s`` more, at most.
        """
        try:
            await self._store.retire(outcome, keep_s)
        except (StoreUnavailable, StoreFull) as error:
            # The response is already written, so the client cannot be told. The next equal request
            # gets the same result.
            logger.warning("job %s: that it was delivered is not noted: %s", outcome.id, error.detail)

    def _job(self, endpoint: Endpoint, head: RequestHead, asked: Submission, traceparent: str) -> Job:
        lifetimes = self.lifetimes
        fallbacks = asked.fallbacks
        return Job(
            id=self._new_id(),
            endpoint=endpoint.name,
            credential=head.caller.digest,
            upstream=self._routes.upstream_for(asked.model),
            model=asked.model,
            created_at=round(self._clock() * 1000) / 1000,
            ttl_s=preferences.ttl(head.ttl, default_s=lifetimes.default_s, max_s=lifetimes.max_s),
            fallbacks=()
            if fallbacks is None
            else tuple(Fallback(self._routes.upstream_for(model), model) for model in fallbacks),
            fallback_index=None if fallbacks is None else 0,
            request_id=head.request_id,
            traceparent=traceparent,
        )

    async def _identify(self, asked: Submission, request: Request, *parts: bytes) -> bytes:
        """The hash of ``parts`` and of the body. A form's boundary is random, so it is left out."""
        body = memoryview(request.body)
        contents = (body[start:end] for start, end in asked.contents or ((0, len(body)),))
        return await self._heavy_work.run(self._hash(*parts, *contents))

    def _hash(self, *parts: bytes | memoryview) -> Steps[bytes]:
        """The keyed hash of ``parts``, 16 bytes. Each part is hashed with its length before it.

        Without the lengths, ``ab, c`` and ``a, bc`` would have one hash. Without the key, whoever reads
        the store could find out a request's text by trying.
        """
        digest = blake2b(digest_size=16, key=self._key)
        for part in parts:
            digest.update(len(part).to_bytes(8, "big"))
            for start in range(0, len(part), _HASHED_AT_ONCE):
                if start:
                    yield
                digest.update(part[start : start + _HASHED_AT_ONCE])
        return digest.digest()


def not_found() -> JobNotFound:
    """The same error for a job that is unknown, expired, deleted, or another client's."""
    return JobNotFound("job not found or expired")


def shutting_down() -> ShuttingDown:
    """The error for a request that comes while the proxy stops."""
    return ShuttingDown("The proxy is shutting down. Try again in a moment.")
