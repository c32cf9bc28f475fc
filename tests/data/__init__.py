"""Data that each version of a store's format has written, and that all later ones have to read.

``sqlite-<schema>.db.gz`` is a database, ``sqlite-<schema>.key`` its key file. ``redis-<schema>.txt`` holds
the commands that put the keys of a deployment back, one a line, as Python literals. All of them hold the
jobs of :func:`fill`. Files of a schema that was released never change: ``python -m tests.data`` writes
those of the schema that is in the working tree, to be kept before it becomes another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from asyncproxy.core.errors import DeadlineExceeded
from asyncproxy.core.jobs import Fallback, Job, Outcome, UpstreamResponse
from asyncproxy.stores.base import Alias, Store
from asyncproxy.wire import envelope
from tests.stores.test_contract import CALL, UPSTREAM, Clock, call, completed, job

__all__ = ["FOLDER", "KEY", "OTHER", "fill"]

FOLDER: Final = Path(__file__).parent

# That of the Redis data. The SQLite data have their key file.
KEY: Final = b"k" * 32

# The upstream of the job that has fallen back.
OTHER: Final = "other"


async def fill(store: Store, clock: Clock) -> None:
    """Put a job of each kind into a store: some that are done, some that are not."""

    async def claimed(name: str, alias: Alias | None = None) -> Job:
        submitted = msgspec.structs.replace(
            job(name, clock=clock),
            fallbacks=(Fallback(OTHER, "n"), Fallback(UPSTREAM, "o")),
            fallback_index=0,
            request_id="request-1",
            traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        )
        await store.create(submitted, CALL, alias)
        return (await store.claim(UPSTREAM)).job

    done = await claimed("done", Alias(b"of done", b"print", single_use=True))
    assert await store.finish(done, completed(done, clock))
    failed = await claimed("failed")
    assert await store.finish(failed, envelope.failed(failed, DeadlineExceeded("Late."), now=clock()))
    audio = msgspec.structs.replace(await claimed("audio"), endpoint="audio/speech")
    answer = UpstreamResponse(200, ((b"Content-Type", b"audio/mpeg"),), (b"\xff\xfb",))
    assert await store.finish(audio, envelope.finished(audio, answer, now=clock()))
    large = await claimed("large")
    assert await store.finish(large, in_pieces(completed(large, clock)))

    fell = await claimed("fell")
    following = msgspec.structs.replace(
        fell, upstream=OTHER, model="n", fallbacks=fell.fallbacks[1:], fallback_index=1
    )
    await store.release(following, attempts=0, call=call(b'{"model":"n"}'))
    # Those that were claimed wait first, and then are not the next to be claimed.
    await store.release(await claimed("tried"), attempts=2, delay_s=10)
    await claimed("processed")
    await store.create(job("waits", clock=clock), CALL, Alias(b"of waits", b"print"))


def in_pieces(outcome: Outcome) -> Outcome:
    """``outcome`` in the form that those of 256 KiB and more have."""
    before, after = outcome.envelope[: outcome.start], outcome.envelope[outcome.end :]
    body = outcome.envelope[outcome.start : outcome.end]
    return msgspec.structs.replace(
        outcome, envelope=before + after, end=outcome.start, pieces=(body[:3], body[3:])
    )
