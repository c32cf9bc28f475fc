"""Writes to a SQLite database: all that comes while a commit is under way shares the next one.

A commit costs a wait for the disk, whatever is in it. So a busy store commits as often as the disk
allows, and not once per job.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from asyncproxy.errors import StoreUnavailable
from asyncproxy.stores.sqlite_file import translate

__all__ = ["Step", "Then", "Writer"]

T = TypeVar("T")

# What is done in a transaction, with what was prepared for it, if anything was, and the connection. And
# what hears of its end on the loop: its result or error.
Step = Callable[..., T]
Then = Callable[[T | Exception], None]

_Item = tuple[Callable[[], Any] | None, Step[Any], Then[Any] | None, asyncio.Future[Any]]

# Steps that share a commit at the most: those that wait for it must not wait for long.
_MOST_STEPS = 1024


class Writer:
    """One thread and one connection. Steps run in the order in which they were handed in."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._waiting: queue.SimpleQueue[_Item | None]
        self._waiting = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop
        self._closed = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Write for the length of a ``with``. What was handed in is written when it ends."""
        self._loop = asyncio.get_running_loop()
        thread = threading.Thread(target=self._work, name="asyncproxy-sqlite", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._closed = True
            self._waiting.put(None)
            await asyncio.to_thread(thread.join)

    def do(
        self,
        step: Step[T],
        then: Then[T] | None = None,
        *,
        prepare: Callable[[], Any] | None = None,
    ) -> asyncio.Future[T]:
        """Run ``step`` in a transaction; its result, once that is on disk.

        ``prepare`` runs before the transaction begins, for all steps that share it one after another:
        to seal ten calls in a row takes half of what it takes between other things.

        The future fails with :class:`~asyncproxy.errors.StoreFull` or ``StoreUnavailable``, and then
        the step has changed nothing. Cancelling the future does not stop the step, and ``then`` hears
        of its end all the same, before whoever waits for the future.
        """
        done: asyncio.Future[T] = self._loop.create_future()
        item = (prepare, step, then, done)
        if self._closed:
            _tell([item], [StoreUnavailable("The store is closed.")])
        else:
            self._waiting.put(item)
        return done

    def _work(self) -> None:
        more = True
        while more:
            batch = [self._waiting.get()]
            while len(batch) < _MOST_STEPS and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            more = batch[-1] is not None
            items = [item for item in batch if item is not None]
            if items:
                outcomes = self._commit([_prepared(prepare, step) for prepare, step, _, _ in items])
                self._loop.call_soon_threadsafe(_tell, items, outcomes)

    def _commit(self, steps: list[Step[Any]]) -> list[Any]:
        """The result of each step, or the exception that it met."""
        connection = self._connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            results = [step(connection) for step in steps]
            connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001  it is the caller's, who waits in another thread
            if connection.in_transaction:
                with contextlib.suppress(sqlite3.Error):  # the next BEGIN says it, if that is so
                    connection.execute("ROLLBACK")
            if len(steps) > 1:
                # Each on its own: a step that cannot be done must not undo the others.
                return [outcome for step in steps for outcome in self._commit([step])]
            return [_ours(error)]
        return results


def _prepared(prepare: Callable[[], Any] | None, step: Step[Any]) -> Step[Any]:
    if prepare is None:
        return step
    try:
        return partial(step, prepare())
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
    for (_, _, then, done), outcome in zip(items, outcomes, strict=True):
        error = outcome if isinstance(outcome, Exception) else None
        if then is not None:
            try:
                then(outcome)
            except Exception as ours:  # noqa: BLE001  it is the caller's, and not that of the others
                error = ours
        if done.done():
            continue
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(outcome)
