"""The claims that a node holds: renewed in time, and given up when they are lost."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import Any, Final, NamedTuple

from asyncproxy.core.jobs import Job
from asyncproxy.stores.base import Lost

__all__ = ["Held", "Leases"]

_RENEWED_AT_ONCE: Final = 500


class Held(NamedTuple):
    """A job as it was claimed, and its record in Redis, which may have more fields."""

    job: Job
    record: bytes


class Leases:
    """Claims by their jobs. ``run`` runs a script, ``lost`` hears whose claim is lost."""

    def __init__(self, run: Callable[..., Awaitable[Any]], lease_ms: int) -> None:
        self.lost: Lost = lambda _: None
        self._run = run
        self._lease_ms = lease_ms
        self._held: dict[str, Held] = {}

    def take(self, job: Job, record: bytes) -> Job:
        """Hold a job that was claimed from now on."""
        self._held[job.id] = Held(job, record)
        return job

    def held(self, job: Job) -> Held | None:
        """What is held of a job, by the claim that ``job`` names."""
        held = self._held.get(job.id)
        return held if held is not None and held.job.claims == job.claims else None

    def forget(self, job: Job) -> None:
        """Hold a job no more: that claim has ended."""
        if self.held(job) is not None:
            del self._held[job.id]

    def drop(self, job_id: str) -> None:
        """Hold a job no more, whatever its claim."""
        self._held.pop(job_id, None)

    def lose(self, job_id: str) -> None:
        """Say that a job is not this node's any more, if it was."""
        if self._held.pop(job_id, None) is not None:
            self.lost(job_id)

    async def renew(self, upstreams: Collection[str]) -> None:
        """Renew all of them, note that ``upstreams`` are served, and hear which claims are lost."""
        held = dict(self._held)
        pairs = list(held.items())
        for start in range(0, len(pairs) or 1, _RENEWED_AT_ONCE):
            some: list[str | int] = []
            for job_id, claimed in pairs[start : start + _RENEWED_AT_ONCE]:
                some += (job_id, claimed.job.claims)
            lost = await self._run("renew", self._lease_ms, len(upstreams), *upstreams, *some)
            for job_id in map(bytes.decode, lost):
                if self._held.get(job_id) is held[job_id]:  # and not ended or claimed again meanwhile
                    self.lose(job_id)
