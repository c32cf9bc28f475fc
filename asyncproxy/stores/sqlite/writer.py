"""Writes to a SQLite database. Steps that come together, or during a commit, share the next commit.

Each commit waits for the disk once, however many steps are in it. So a busy store commits as often as
the disk allows, and not once per job.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

from asyncproxy.core.errors import StoreUnavailable
from asyncproxy.stores.sqlite.file import translate

__all__ = ["Step", "Then", "Writer"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Runs in a transaction. Its arguments: the result of ``prepare``, if there is one, and the connection.
Step = Callable[..., T]

# Is called on the event loop with the result or the error of a step.
Then = Callable[[T | Exception], None]

# Limits of one commit: steps, so that none waits for long, and prepared bytes, which are in memory at
# once.
_MOST_STEPS = 1024
_MOST_BYTES = 4 * 1024 * 1024

# While each round of the loop brings more steps, they are gathered, for this time at most. A commit
# costs the processor time of five jobs. A commit of the first step alone would need a second commit.
_GATHER_S = 0.005


class _Item(NamedTuple):
    step: Step[Any]
    then: Then[Any] | None
    prepare: Callable[[], Any] | None
    size: int
    done: asyncio.Future[Any]


class Writer:
    """One thread and one connection. Steps run in the order in which they were handed in.

    ``guard`` is called before each transaction. If it raises, nothing is written.
    """

    def __init__(self, connection: sqlite3.Connection, guard: Callable[[], None]) -> None:
        self._connection = connection
        self._guard = guard
        self._waiting: queue.SimpleQueue[list[_Item] | None]
        self._waiting = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop
        self._gathered: list[_Item] = []
        self._closed = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Write for the length of a ``with``. At its end all steps that were handed in are written."""
        self._loop = asyncio.get_running_loop()
        thread = threading.Thread(target=self._work, name="asyncproxy-sqlite", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._closed = True
            self._hand_over()
            self._waiting.put(None)
            await asyncio.to_thread(thread.join)

    def do(
        self,
        step: Step[T],
        then: Then[T] | None = None,
        *,
        prepare: Callable[[], Any] | None = None,
        size: int = 0,
    ) -> asyncio.Future[T]:
        """Run ``step`` in a transaction. The future gets its result once the commit is on disk.

        ``prepare`` runs before the transaction, for all steps of a commit one after the other: sealing
        ten calls in a row takes half the time of sealing them one by one. Its result has about ``size``
        bytes.

        The future fails with ``StoreFull`` or ``StoreUnavailable``. Then the step has changed nothing.
        Cancelling the future does not stop the step. ``then`` is called in any case, before the future
        is done.
        """
        done: asyncio.Future[T] = self._loop.create_future()
        item = _Item(step, then, prepare, size, done)
        if self._closed:
            _tell([item], [StoreUnavailable("The store is closed.")])
        else:
            self._gathered.append(item)
            if len(self._gathered) == 1:
                self._loop.call_soon(self._gather, 0, self._loop.time() + _GATHER_S)
        return done

    def _gather(self, before: int, until: float) -> None:
        """Hand the steps over if there are no more than ``before``, or if it is ``until``."""
        now = len(self._gathered)
        if now > before and self._loop.time() < until:
            self._loop.call_soon(self._gather, now, until)
        else:
            self._hand_over()

    def _hand_over(self) -> None:
        self._waiting.put(self._gathered)
        self._gathered = []

    def _all_waiting(self) -> list[_Item] | None:
        """Wait for steps, and return all that were handed over. None at the end."""
        items = self._waiting.get()
        while items is not None and not self._waiting.empty():
            more = self._waiting.get_nowait()
            if more is None:
                self._waiting.put(None)  # for the next time
                break
            items += more
        return items

    def _work(self) -> None:
        while (items := self._all_waiting()) is not None:
            for share in _shares(items):
                outcomes = self._commit([_prepared(item) for item in share])
                self._loop.call_soon_threadsafe(_tell, share, outcomes)

    def _commit(self, steps: list[Step[Any]]) -> list[Any]:
        """The result of each step, or its exception."""
        connection = self._connection
        try:
            self._guard()
            connection.execute("BEGIN IMMEDIATE")
            results = [step(connection) for step in steps]
            connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001  it is the caller's, who waits in another thread
            if connection.in_transaction:
                with contextlib.suppress(sqlite3.Error):  # the next BEGIN says it, if that is so
                    connection.execute("ROLLBACK")
            if len(steps) > 1:
                # Run each step alone: a step that fails must not undo the others.
                return [outcome for step in steps for outcome in self._commit([step])]
            return [_ours(error)]
        return results


def _shares(items: list[_Item]) -> Iterator[list[_Item]]:
    """Groups steps into commits."""
    share: list[_Item] = []
    size = 0
    for item in items:
        share.append(item)
        size += item.size
        if len(share) == _MOST_STEPS or size >= _MOST_BYTES:
            yield share
            share, size = [], 0
    if share:
        yield share


def _prepared(item: _Item) -> Step[Any]:
    if item.prepare is None:
        return item.step
    try:
        return partial(item.step, item.prepare())
    except Exception as error:  # noqa: BLE001  it is the caller's, and not that of the others
        return partial(_fail, error)


def _fail(error: Exception, _: sqlite3.Connection) -> None:
    raise error


def _ours(error: Exception) -> Exception:
    if not isinstance(error, sqlite3.Error):
        return error
    ours = translate(error)
    ours.__cause__ = error
    return ours


def _tell(items: list[_Item], outcomes: list[Any]) -> None:
    for item, outcome in zip(items, outcomes, strict=True):
        error = outcome if isinstance(outcome, Exception) else None
        if item.then is not None:
            try:
                item.then(outcome)
            except Exception as ours:
                logger.exception("what was written is not taken note of: an error inside the proxy")
                error = ours
        if item.done.done():
            continue  # the future was cancelled
        if error is not None:
            item.done.set_exception(error)
        else:
            item.done.set_result(outcome)
