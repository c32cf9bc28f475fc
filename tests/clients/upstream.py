"""A gateway as the client pages and ``make clients`` need it: slow, deterministic, and able to refuse."""

from __future__ import annotations

import asyncio
import base64
import re
import struct
from collections import Counter

from tests.gateway import Received, answer

__all__ = ["Upstream", "vector"]


def vector(text: str) -> list[float]:
    """The vector of a text: numbers that single precision holds, so Base64 and JSON say the same."""
    return [len(text) / 8, ord(text[-1]) / 128, -0.5]


class Upstream:
    """Answers after ``delay_s``; models that begin with ``quick`` at once.

    A model that ends in a status is refused with it: ``slow-429``. ``calls`` counts by credential.
    """

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self.calls: Counter[str] = Counter()

    async def __call__(self, request: Received, writer: asyncio.StreamWriter) -> None:
        self.calls[request.header("Authorization") or ""] += 1
        data = request.json()
        model = data["model"]
        if not model.startswith("quick"):
            await asyncio.sleep(self._delay_s)
        if refused := re.search(r"-(\d{3})$", model):
            status = int(refused[1])
            message = f"The model says {status}."
            error = {"message": message, "type": "t", "code": f"code_{status}", "param": None}
            await answer({"error": error}, status=status)(request, writer)
            return
        texts = [data["input"]] if isinstance(data["input"], str) else data["input"]
        packed = data.get("encoding_format") == "base64"
        entries = [
            {"object": "embedding", "index": i, "embedding": _packed(text) if packed else vector(text)}
            for i, text in enumerate(texts)
        ]
        usage = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
        body = {"object": "list", "data": entries, "model": model, "usage": usage}
        await answer(body)(request, writer)


def _packed(text: str) -> str:
    return base64.b64encode(struct.pack("<3f", *vector(text))).decode()
