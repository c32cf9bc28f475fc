"""The requests that the figures send, and the answers that their upstreams give."""

from __future__ import annotations

import json
from typing import Final

from benchmarks.load import Request

__all__ = ["ANSWER_3_MB", "ANSWER_30_KB", "CONNECTIONS", "GET", "HEADERS", "PASS", "SUBMIT"]

HEADERS: Final = {"Content-Type": "application/json", "Authorization": "Bearer benchmark"}

SUBMIT: Final = Request(
    "POST",
    "/v1/async/embeddings",
    json.dumps({"model": "text-embedding-3-small", "input": "The quick brown fox. " * 12}).encode(),
    HEADERS,
)
GET: Final = Request("GET", f"{SUBMIT.path}/00000000-0000-4000-8000-000000000000", headers=HEADERS)
PASS: Final = Request("POST", "/v1/embeddings", SUBMIT.body, HEADERS)

CONNECTIONS: Final = 64


def _embeddings(size_bytes: int) -> bytes:
    """The answer of an embeddings API, in exactly so many bytes."""
    head, tail = b'{"object":"list","model":"m","data":[{"index":0,"embedding":[', b"0.5]}]}"
    number = b"-0.012345678,"
    numbers = number * ((size_bytes - len(head) - len(tail)) // len(number))
    return head + numbers + b" " * (size_bytes - len(head) - len(numbers) - len(tail)) + tail


ANSWER_30_KB: Final = _embeddings(30_000)
ANSWER_3_MB: Final = _embeddings(3_000_000)
