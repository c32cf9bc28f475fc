"""A store is the same with and without the clock around it, and the observer hears of each operation."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from asyncproxy.core.errors import (
    IdempotencyKeyReused,
    Overloaded,
    StoreFull,
    StoreUnavailable,
    TooManyJobs,
)
from asyncproxy.core.events import Observer, StoreOperation
from asyncproxy.observe.timed_store import TimedStore
from asyncproxy.stores.base import Store

OPERATIONS = sorted(name for name, member in vars(Store).items() if inspect.iscoroutinefunction(member))
WAITING = {"claim", "wait"}
REFUSALS = (IdempotencyKeyReused(), Overloaded(), StoreFull(), TooManyJobs(3))


class Inner:
    """Does each operation by giving back what it was asked, or by raising ``error``."""

    error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        async def operation(*args: Any, **kwargs: Any) -> Any:
            if self.error is not None:
                raise self.error
            return name, args, kwargs

        return operation


class Seen(Observer):
    def __init__(self) -> None:
        self.events: list[StoreOperation] = []

    def store_operation(self, event: StoreOperation) -> None:
        self.events.append(event)


@pytest.fixture
def inner() -> Inner:
    return Inner()


@pytest.fixture
def seen() -> Seen:
    return Seen()


@pytest.fixture
def store(inner: Inner, seen: Seen) -> Any:
    made: Any = inner
    return TimedStore(made, seen)


def test_it_has_all_that_a_store_has(store: Any) -> None:
    wanted = {name for name in vars(Store) if not name.startswith("_")}
    assert wanted <= set(dir(store))


@pytest.mark.parametrize("name", OPERATIONS)
async def test_an_operation_is_that_of_the_inner_store(store: Any, seen: Seen, name: str) -> None:
    for _ in range(2):
        assert await getattr(store, name)(1, 2, x=3) == (name, (1, 2), {"x": 3})
    if name in WAITING:
        assert seen.events == []
    else:
        assert [event.operation for event in seen.events] == [name, name]
        assert all(event.error == "" and (event.duration_s or 0) > 0 for event in seen.events)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StoreUnavailable("x"), "store_unavailable"),
        (LookupError(), "internal_error"),
        *((refusal, "") for refusal in REFUSALS),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_an_error_gets_through_and_is_told(
    store: Any, inner: Inner, seen: Seen, error: Exception, code: str
) -> None:
    inner.error = error
    for name in OPERATIONS:
        with pytest.raises(type(error)) as caught:
            await getattr(store, name)()
        assert caught.value is error
        event = seen.events.pop()
        assert (event.operation, event.error) == (name, code)
        assert (event.duration_s is None) == (name in WAITING)
        assert seen.events == []
