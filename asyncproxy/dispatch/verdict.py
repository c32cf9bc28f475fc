"""What the end of a call means for its job. Pure: it decides, and the dispatcher carries out."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from asyncproxy.core.errors import CallError, DeadlineExceeded
from asyncproxy.core.jobs import Job, UpstreamResponse
from asyncproxy.dispatch.retry import Ending, backoff

__all__ = ["Again", "CallPolicy", "Done", "NextModel", "Verdict", "held_back", "judge"]

# Statuses after which no other model is tried: the credential is wrong for all of them.
_OF_THE_CREDENTIAL = frozenset({401, 403})


@dataclass(frozen=True, slots=True)
class CallPolicy:
    """How the jobs of one upstream are sent.

    ``attempts`` counts the first call too. ``outage_s`` is how long a job may wait in all because its
    upstream was away or limited its rate. ``hidden`` are the operator's own credentials: an upstream
    may quote them in an error, and the log must not.
    """

    concurrency: int = 64
    attempts: int = 3
    backoff_s: float = 0.5
    max_backoff_s: float = 30.0
    outage_s: float = 900.0
    hidden: frozenset[str] = field(default=frozenset(), repr=False)


class Done(NamedTuple):
    """Record the response or the error as the outcome of the job."""


class Again(NamedTuple):
    """Make ``job`` pending again, not to be claimed for ``delay_s``."""

    job: Job
    delay_s: float


class NextModel(NamedTuple):
    """Go on with the next of the job's models."""


Verdict = Done | Again | NextModel


def judge(
    job: Job,
    outcome: UpstreamResponse | CallError,
    ending: Ending,
    policy: CallPolicy,
    *,
    asked_s: float | None,
    lane_wait_s: float,
    now: float,
    deadline_at: float,
    rng: random.Random,
) -> Verdict:
    """What becomes of ``job``, whose call has ended.

    ``asked_s`` is the wait that the upstream asks for, ``lane_wait_s`` the wait of the job's lane or
    upstream. ``now`` and ``deadline_at`` are in seconds since the epoch. ``ending`` is no
    ``AWAY_OR_FAILED``: the caller knows by now which of the two it is.
    """
    if ending is Ending.SUCCEEDED:
        return Done()
    held = ending in (Ending.AWAY, Ending.RATE_LIMITED)
    if held:
        job = held_back(job, now)
        # A fallback model need not wait for as long as a model that is the only one.
        patience_s = policy.outage_s / 2 if job.fallbacks else policy.outage_s
        worth_it = job.held_s < patience_s
        delay_s = lane_wait_s if asked_s is None else max(asked_s, lane_wait_s)
    else:
        job = _attempted(job, now)
        worth_it = ending is Ending.FAILED and job.attempts < policy.attempts
        delay_s = backoff(job.attempts, base_s=policy.backoff_s, max_s=policy.max_backoff_s, rng=rng)
        delay_s = max(delay_s if asked_s is None else asked_s, lane_wait_s)
    # A wait that ends after the deadline is in vain. The upstream's own error says more than ours
    # would.
    if worth_it and (asked_s is None or now + asked_s < deadline_at):
        return Again(job, delay_s)
    return NextModel() if job.fallbacks and _may_be_the_models(outcome) else Done()


def held_back(job: Job, now: float) -> Job:
    """``job`` after it was told to wait. It has waited since it was told so before."""
    waited_s = max(0.0, now - job.held_at) if job.held_at else 0.0
    return msgspec.structs.replace(job, held_s=job.held_s + waited_s, held_at=now)


def _attempted(job: Job, now: float) -> Job:
    """``job`` after a call that counts as an attempt."""
    job = held_back(job, now)
    return msgspec.structs.replace(job, attempts=job.attempts + 1, held_at=0.0)


def _may_be_the_models(outcome: UpstreamResponse | CallError) -> bool:
    if isinstance(outcome, CallError):
        return not isinstance(outcome, DeadlineExceeded)
    return outcome.status not in _OF_THE_CREDENTIAL
