"""A store that reports the durations and the failures of its operations to an observer."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from time import perf_counter
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from asyncproxy.core.errors import ApiError, IdempotencyKeyReused, Overloaded, StoreFull, TooManyJobs
from asyncproxy.core.events import Observer, StoreOperation
from asyncproxy.stores.base import Limits, Lost, Store

__all__ = ["TimedStore"]

# Refusals because of a limit or a client's mistake. They are no failures of the store.
_REFUSALS = (IdempotencyKeyReused, Overloaded, StoreFull, TooManyJobs)

P = ParamSpec("P")
T = TypeVar("T")


class _Timed(Generic[P, T]):
    """A method of :class:`TimedStore`: calls the inner store, and tells the observer.

    Of an operation that ``waits`` by design, only errors are told. The bound method is made at its
    first use, and then kept in the instance.
    """

    def __init__(
        self, method: Callable[Concatenate[Store, P], Coroutine[Any, Any, T]], *, waits: bool = False
    ) -> None:
        self._name = method.__name__
        self._waits = waits

    def __get__(self, store: TimedStore, kind: type[TimedStore]) -> Callable[P, Coroutine[Any, Any, T]]:
        name, waits, tell = self._name, self._waits, store._tell  # noqa: SLF001  one class in two
        inner = store._inner  # noqa: SLF001  the same

        async def timed(*args: P.args, **kwargs: P.kwargs) -> T:
            started = perf_counter()
            try:
                done: T = await getattr(inner, name)(*args, **kwargs)
            except Exception as error:
                tell(StoreOperation(name, None if waits else perf_counter() - started, _code(error)))
                raise
            if not waits:
                tell(StoreOperation(name, perf_counter() - started))
            return done

        setattr(store, name, timed)
        return timed


class TimedStore:
    """See :class:`~asyncproxy.stores.base.Store`. Delegates every operation to ``inner``."""

    def __init__(self, inner: Store, observer: Observer) -> None:
        self._inner = inner
        self._tell = observer.store_operation
        # These are not timed. ``position`` is called for each response.
        self.position = inner.position
        self.allow = inner.allow
        self.read = inner.read
        self.release_waiters = inner.release_waiters

    @property
    def credential_keys(self) -> tuple[bytes, ...]:
        return self._inner.credential_keys

    @property
    def survives(self) -> bool:
        return self._inner.survives

    @property
    def limits(self) -> Limits:
        return self._inner.limits

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self._inner.limits = limits

    def opened(self, lost: Lost) -> AbstractAsyncContextManager[None]:
        return self._inner.opened(lost)

    create = _Timed(Store.create)
    get = _Timed(Store.get)
    claim = _Timed(Store.claim, waits=True)
    release = _Timed(Store.release)
    pause = _Timed(Store.pause)
    finish = _Timed(Store.finish)
    delete = _Timed(Store.delete)
    claim_overdue = _Timed(Store.claim_overdue)
    claim_orphans = _Timed(Store.claim_orphans)
    wait = _Timed(Store.wait, waits=True)
    retire = _Timed(Store.retire)
    usage = _Timed(Store.usage)
    states = _Timed(Store.states)
    check = _Timed(Store.check)
    tick = _Timed(Store.tick)


def _code(error: Exception) -> str:
    if isinstance(error, _REFUSALS):
        return ""
    return error.code if isinstance(error, ApiError) else "internal_error"
