"""What each client is asked to do, and what is right."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.clients.upstream import vector

__all__ = ["CASES", "CLIENTS", "Case", "Client", "Seen", "wrong"]

INPUT = ["cat", "kitten", "revenue"]
VECTORS = [vector(text) for text in INPUT]

_SDK = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    429: "RateLimitError",
    500: "InternalServerError",
    504: "InternalServerError",
}
STATUSES = (400, 401, 404, 429, 500)


@dataclass(frozen=True)
class Client:
    """``raises`` is the name of the exception for a status. ``own_paths``: it can ask for any path."""

    name: str
    raises: Callable[[int], str]
    own_paths: bool = True


CLIENTS = (
    Client("openai (sync)", _SDK.__getitem__),
    Client("openai (async)", _SDK.__getitem__),
    Client("openai (npm)", _SDK.__getitem__),
    Client("langchain-openai", _SDK.__getitem__, own_paths=False),
    Client("llama-index", _SDK.__getitem__, own_paths=False),
    Client("requests", lambda _: "HTTPError"),
    Client("httpx", lambda _: "HTTPStatusError"),
    Client("curl -L", lambda _: "exit 22"),
)


@dataclass(frozen=True)
class Case:
    """One call. ``status``: it is refused with it. ``cut_s``: connections break after so long.

    ``timeout_s`` is the client's own.
    """

    name: str
    path: str = "/v1/relay"
    way: str = "sync"
    model: str = "slow"
    status: int | None = None
    by_upstream: bool = True
    retries: bool = False
    cut_s: float | None = None
    few_hops: bool = False
    timeout_s: float | None = None


CASES = (
    Case("pass", path="/v1", model="quick"),
    # The call that has made the load balancer cut it: what the rest is for.
    Case("pass, slow", path="/v1", status=504, by_upstream=False),
    Case("async", path="/v1", way="async"),
    Case("header", path="/v1", way="header"),
    Case("relay"),
    *(Case(str(status), model=f"slow-{status}", status=status) for status in STATUSES),
    Case("cut", retries=True, cut_s=0.5),  # in the POST
    Case("cut, hop", retries=True, cut_s=2.5),  # in a redirect that is held
    Case("last hop", retries=True, few_hops=True),
    Case("timeout", retries=True, timeout_s=3),  # longer than it is held, shorter than the call
)


@dataclass(frozen=True)
class Seen:
    """What came of a case: through the proxy, and directly if that was asked for."""

    outcome: dict[str, Any]
    calls: int
    direct: dict[str, Any] | None = None
    cut: int = 0


def wrong(client: Client, case: Case, seen: Seen) -> str | None:
    """What is wrong with it, or None."""
    outcome = seen.outcome
    if case.status is None:
        if outcome.get("vectors") != VECTORS:
            return f"no vectors: {_short(outcome)}"
    else:
        expected = {"raised": client.raises(case.status), "status": case.status}
        if {name: outcome.get(name) for name in expected} != expected:
            return f"not {expected['raised']}: {_short(outcome)}"
        if case.by_upstream and outcome != seen.direct:
            return f"{_short(outcome)}, but directly {_short(seen.direct)}"
    if seen.calls != 1:
        return f"{seen.calls} calls upstream"
    if case.cut_s is not None and not seen.cut:
        return "nothing was cut"
    return None


def _short(outcome: dict[str, Any] | None) -> str:
    return json.dumps(outcome)[:300]
