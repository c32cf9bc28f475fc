"""Clients that do what a careful one does: a key for each submit, and the same again until it is answered."""

from __future__ import annotations

import asyncio
import json
import random
import uuid
from collections.abc import Sequence
from typing import Any

import aiohttp

from tests.chaos.books import Books
from tests.chaos.lab import answer_to

__all__ = ["Client"]

_PATH = "/v1/async/embeddings"

# What a client meets while proxies die under it.
_BROKEN = (aiohttp.ClientError, ConnectionError, asyncio.TimeoutError)


class Client:
    """One credential, one job at a time, any of the proxies."""

    def __init__(self, books: Books, proxies: Sequence[str], session: aiohttp.ClientSession) -> None:
        self._books = books
        self._proxies = proxies
        self._session = session
        self._headers = {"Authorization": f"Bearer sk-{uuid.uuid4()}"}
        self._done: list[str] = []
        self._all: list[str] = []

    async def work(self, stop: asyncio.Event) -> None:
        """Submit and fetch until ``stop``; now and then look again at what was fetched before."""
        while not stop.is_set():
            await self._job()
            if self._done and random.random() < 0.5:
                await self._look(random.choice(self._done))

    async def settle(self) -> None:
        """See each job to its end, and that no end has changed."""
        for job_id in self._all:
            if job_id not in self._books.outcomes:
                await self._fetch(job_id)
        for job_id in self._done:
            await self._look(job_id)

    async def _job(self) -> None:
        text = str(uuid.uuid4())
        job_id = await self._submit(text)
        self._books.accepted[job_id] = text
        self._all.append(job_id)
        if random.random() < 0.9:  # some are looked for at the end only
            await self._fetch(job_id)

    async def _submit(self, text: str) -> str:
        body = json.dumps({"model": "m", "input": text})
        headers = {"Content-Type": "application/json", "Idempotency-Key": text}
        while True:
            try:
                status, data = await self._ask("POST", _PATH, data=body, headers=headers)
            except _BROKEN:
                self._books.submits_again += 1
                await asyncio.sleep(random.uniform(0.02, 0.2))
                continue
            if status in (200, 202):
                return str(json.loads(data)["id"])
            await self._refused(data)

    async def _fetch(self, job_id: str) -> None:
        while True:
            try:
                status, data = await self._ask("GET", f"{_PATH}/{job_id}?wait=2")
            except _BROKEN:
                await asyncio.sleep(random.uniform(0.02, 0.2))
                continue
            if status == 404:
                self._books.lost.add(job_id)
                return
            if status == 200:
                self._ended(job_id, data)
                return
            if status != 202:
                await self._refused(data)

    async def _look(self, job_id: str) -> None:
        try:
            status, data = await self._ask("GET", f"{_PATH}/{job_id}")
        except _BROKEN:
            return
        if status == 404:
            self._books.lost.add(job_id)
        elif (status == 200 and data != self._books.outcomes[job_id]) or status == 202:
            self._books.changed.add(job_id)

    def _ended(self, job_id: str, data: bytes) -> None:
        self._books.outcomes[job_id] = data
        self._done.append(job_id)
        envelope = json.loads(data)
        status, body = answer_to(self._books.accepted[job_id])
        expected = json.loads(body)
        right = envelope["status_code"] == status and (
            envelope["result"] == expected
            if status == 200
            else envelope["error"]["error"] == expected["error"]
        )
        if not right:
            self._books.wrong.append(f"{job_id}: {data[:300]!r}")

    async def _refused(self, data: bytes) -> None:
        self._books.refused[json.loads(data)["error"]["code"]] += 1
        await asyncio.sleep(random.uniform(0.02, 0.2))

    async def _ask(self, method: str, path: str, **more: Any) -> tuple[int, bytes]:
        headers = {**self._headers, **more.pop("headers", {})}
        url = random.choice(self._proxies) + path
        async with self._session.request(method, url, headers=headers, **more) as response:
            return response.status, await response.read()
