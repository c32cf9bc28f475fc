"""A minute of chaos: what was accepted ends once, by the gateway's own answer, whatever goes meanwhile."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.chaos.books import Books
from tests.chaos.experiment import run_redis, run_sqlite

RUNS = {"sqlite": run_sqlite, "redis": run_redis}


# The gateway runs here, and asyncio drops a connection that it accepts while its server is closed:
# `Server._attach` fails in the constructor of the transport, which nobody closes then.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <(function _SelectorTransport.__del__|socket.socket)"
    ":pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("store", RUNS)
async def test_nothing_is_lost(tmp_path: Path, store: str) -> None:
    run: Callable[..., Awaitable[Books]] = RUNS[store]
    books = await run(tmp_path, kills=10, clients=16)
    assert books.problems() == [], books.report()
    assert len(books.accepted) > 100
    assert books.ended["completed"] > books.ended["failed"] > 0
    assert books.events["proxies killed"] == 10
    assert books.events["calls refused by the gateway"] > 0
