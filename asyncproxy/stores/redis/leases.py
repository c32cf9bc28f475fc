"""The claims that a node holds: renews them in time, and drops those that are lost."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import Any, Final, NamedTuple

from asyncproxy.core.jobs import Job
from asyncproxy.stores.base import Lost

__all__ = ["Held", "Leases"]

_RENEWED_AT_ONCE: Final = 500


class Held(NamedTuple):
    """A claimed job, and its record in Redis, which may have more fields."""

    job: Job
    record: bytes


class Leases:
    """The claims by job id. ``run`` runs a script. ``lost`` is called when a claim is lost."""

    def __init__(self, run: Callable[..., Awaitable[Any]], lease_ms: int) -> None:
        self.lost: Lost = lambda _: None
        self._run = run
        self._lease_ms = lease_ms
        self._held: dict[str, Held] = {}

    def take(self, job: Job, record: bytes) -> Job:
        """Hold a claimed job from now on."""
        self._held[job.id] = Held(job, record)
        return job

    def held(self, job: Job) -> Held | None:
        """The held job and record, if the claim of ``job`` is still held."""
        held = self._held.get(job.id)
        return held if held is not None and held.job.claims == job.claims else None

    def forget(self, job: Job) -> None:
        """Stop holding a job: its claim has ended."""
        if self.held(job) is not None:
            del self._held[job.id]

    def drop(self, job_id: str) -> None:
        """Stop holding a job, whatever the number of its claim."""
        self._held.pop(job_id, None)

    def lose(self, job_id: str) -> None:
        """Stop holding a job, and report its claim as lost, if it was held."""
        if self._held.pop(job_id, None) is not None:
            self.lost(job_id)

    async def renew(self, upstreams: Collection[str]) -> None:
        """Renew all claims, note that ``upstreams`` are served, and drop the claims that are lost."""
        held = dict(self._held)
        pairs = list(held.items())
        for start in range(0, len(pairs) or 1, _RENEWED_AT_ONCE):
            some: list[str | int] = []
            for job_id, claimed in pairs[start : start + _RENEWED_AT_ONCE]:
                some += (job_id, claimed.job.claims)
            lost = await self._run("renew", self._lease_ms, len(upstreams), *upstreams, *some)
            for job_id in map(bytes.decode, lost):
                if self._held.get(job_id) is held[job_id]:  # not ended or claimed again meanwhile
                    self.lose(job_id)
