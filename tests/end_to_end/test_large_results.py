"""Results that stay in parts: what cannot be read, and the ranges that a broken download goes on with."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator

import aiohttp
import pytest

from asyncproxy.core.errors import StoreUnavailable
from asyncproxy.core.jobs import Outcome
from tests.conftest import Client
from tests.gateway import Gateway, answer, hang

SMALL, IN_PARTS = 1_000, 900_000


async def finished(proxy: Client, gateway: Gateway, body: bytes, **how: object) -> str:
    gateway.behaviour = answer(body, headers=[("Accept-Ranges", "none")], **how)  # type: ignore[arg-type]
    path = await proxy.submit()
    await proxy.outcome(path)
    return f"{path}/content"


def text(size: int) -> bytes:
    return b'{"a":"%b"}' % random.Random(1).randbytes(size // 2).hex().encode()


@pytest.mark.parametrize("size", [SMALL, IN_PARTS])
async def test_a_range_of_a_result_is_read(proxy: Client, gateway: Gateway, size: int) -> None:
    body = text(size)
    path = await finished(proxy, gateway, body)
    whole = await proxy.get(path)
    assert (whole.status, whole.body) == (200, body)
    assert whole.headers.getall("Accept-Ranges") == ["bytes"]
    last = len(body) - 1
    for asked, first, end in (
        ("0-0", 0, 0),
        (f"{size // 2}-", size // 2, last),
        (f"{size // 3}-{size // 2}", size // 3, size // 2),
        (f"1-{size * 9}", 1, last),
        ("-5", last - 4, last),
    ):
        part = await proxy.get(path, headers={"Range": f"bytes={asked}"})
        assert (part.status, part.body) == (206, body[first : end + 1])
        assert part.headers["Content-Range"] == f"bytes {first}-{end}/{len(body)}"
        assert part.headers["Content-Type"] == whole.headers["Content-Type"]
        assert part.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("size", [SMALL, IN_PARTS])
async def test_a_range_behind_the_end_is_refused(proxy: Client, gateway: Gateway, size: int) -> None:
    body = text(size)
    path = await finished(proxy, gateway, body)
    refused = await proxy.get(path, headers={"Range": f"bytes={len(body)}-"})
    assert (refused.status, refused.code) == (416, "range_not_satisfiable")
    assert refused.headers["Content-Range"] == f"bytes */{len(body)}"


async def test_what_has_no_ranges_is_whole(proxy: Client, gateway: Gateway) -> None:
    """An answer to ``HEAD``, one whose version the client names, another status, a job that is live."""
    first = {"Range": "bytes=0-0"}
    body = text(SMALL)
    path = await finished(proxy, gateway, body)
    head = await proxy.request("HEAD", path, headers=first)
    assert (head.status, head.headers["Content-Length"]) == (200, str(len(body)))
    assert (await proxy.get(path, headers={**first, "If-Range": '"x"'})).body == body
    assert (await proxy.get(path.removesuffix("/content"), headers=first)).status == 200
    failed = await proxy.get(await finished(proxy, gateway, body, status=400), headers=first)
    assert (failed.status, failed.body) == (400, body)
    gateway.behaviour = hang
    assert (await proxy.get(f"{await proxy.submit()}/content", headers=first)).status == 202


def break_off(proxy: Client, monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
    """Let the store be out of reach after so many parts of a result."""
    service = proxy.parts.service
    read = service.read

    async def reading(outcome: Outcome, start: int = 0) -> AsyncIterator[bytes]:
        left = after
        async for part in read(outcome, start):
            if not left:
                raise StoreUnavailable("The store is out of reach.")
            left -= 1
            yield part

    monkeypatch.setattr(service, "read", reading)


@pytest.mark.parametrize("below", ["", "/content"])
async def test_a_result_that_cannot_be_read_is_an_error(
    proxy: Client, gateway: Gateway, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    content = await finished(proxy, gateway, text(IN_PARTS))
    break_off(proxy, monkeypatch, after=0)
    refused = await proxy.get(content.removesuffix("/content") + below)
    assert (refused.status, refused.code) == (503, "store_unavailable")


@pytest.mark.parametrize("below", ["", "/content"])
async def test_a_result_that_breaks_off_is_not_taken_for_whole(
    proxy: Client, gateway: Gateway, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    content = await finished(proxy, gateway, text(IN_PARTS))
    break_off(proxy, monkeypatch, after=1)
    with pytest.raises(aiohttp.ClientError):
        await proxy.get(content.removesuffix("/content") + below)
