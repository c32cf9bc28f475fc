"""How long one request holds up all others: ``python -m benchmarks.stalls [NAME…]``.

A proxy gets one body at a time, of up to 32 MiB and of every shape that was ever slow to read. Beside
it, ``/-/healthy`` is asked every 10 ms, until the answer to the body is there. A row has

- the longest wait for an answer of ``/-/healthy``, and how much processor time the loop of the proxy
  used in the wait that had most of it. On a machine with other work, only the latter says something;
- the time for the whole, and the most memory that the process took beyond what it had before;
- the status of the answer to the body. What takes longer than a minute is not waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.client
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import brotli

from benchmarks.servers import Server, parked, proxy

__all__ = ["BODIES"]

_SIZE: Final = 32 * 1024**2 - 1024
_EVERY_S: Final = 0.01
_LIMIT_S: Final = 60.0
_MIB: Final = 1024**2
_FORM: Final = "multipart/form-data; boundary="
_HEAD: Final = b'--%b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n'


class Body(NamedTuple):
    """How to make a body, and the header fields that it is sent with."""

    make: Callable[[], bytes]
    path: str = "embeddings"
    headers: tuple[tuple[str, str], ...] = ()


def _json(unit: bytes, before: bytes = b'{"model":"m","input":[', behind: bytes = b"1]}") -> Body:
    """``unit`` again and again, up to 32 MiB."""
    return Body(lambda: before + unit * ((_SIZE - len(before) - len(behind)) // len(unit)) + behind)


def _form(boundary: str, unit: bytes, before: bytes = b"") -> Body:
    first = before or _HEAD % (boundary.encode(), b"file")
    return Body(
        lambda: (
            first
            + unit * ((_SIZE - len(first)) // len(unit))
            + b"\r\n--"
            + boundary.encode()
            + b"--\r\n"
        ),
        "audio/transcriptions",
        (("Content-Type", f'{_FORM}"{boundary}"'),),
    )


def _packed(compress: Callable[[bytes], bytes], coding: str, plain: bytes) -> Body:
    return Body(lambda: compress(plain), headers=(("Content-Encoding", coding),))


def _texts(count: int) -> bytes:
    return b'{"model":"m","input":[' + b'"abc",' * count + b"1]}"


_TWO: Final = _HEAD % (b"b0undary", b"model") + b"m\r\n" + _HEAD % (b"b0undary", b"file")
_MEMBER: Final = b'{"model":"m","input":"x","a":{"model":1},'

BODIES: Final[dict[str, Body]] = {
    "84 KB, deep behind a nested model": Body(
        lambda: _MEMBER + b'"y":[' + b"[[[[[]]]],[[[[]]]]]," * 4200 + b"1]}"
    ),
    "chat of 2,000 nested messages with tools": Body(
        lambda: (
            b'{"model":"m","tools":[{"parameters":{"properties":{"model":{},"input":{}}}},{"input":1}],"messages":['
            + b'{"content":[{"type":"a","b":{"c":[1]}}]},' * 2000
            + b"1]}"
        ),
        "chat/completions",
    ),
    "texts": _json(b'"a text as people embed it, of some words",'),
    "floats": _json(b"-0.0123456789,"),
    "integers": _json(b"1,"),
    "one string": _json(b"x", b'{"model":"m","input":"', b'"}'),
    "one string of 4-byte characters": _json("\U0001f600".encode(), b'{"model":"m","input":"', b'"}'),
    "escaped letters": _json(b"\\u0061", b'{"model":"m","input":"', b'"}'),
    "half surrogate pairs": _json(b"\\ud83d", b'{"model":"m","input":"', b'"}'),
    "escaped quotes": _json(b'\\"', b'{"model":"m","input":"', b'"}'),
    "input of empty arrays": _json(b"[],"),
    "stream of empty arrays": _json(b"[],", b'{"model":"m","input":"x","stream":[', b"[]]}"),
    "model of empty arrays": _json(b"[],", b'{"input":"x","model":[', b"[]]}"),
    "fallbacks of many names": _json(b'"n",', b'{"model":"m","input":"x","fallbacks":[', b'"n"]}'),
    "fallbacks of many keys": _json(b'"abcdefgh":1,', b'{"model":"m","fallbacks":{', b'"a":1}}'),
    "fallbacks behind a large input": _json(b'"x",', behind=b'"x"],"fallbacks":["n"]}'),
    "a name of ours, nested": _json(b'{"model":1,"input":2},'),
    "very many members": _json(b'"a":1,', b'{"model":"m","input":1,', b'"b":2}'),
    "the same member": _json(b'"x":1,', b'{"model":"m","input":1,"a":{"model":1},', b'"b":2}'),
    "four deep": _json(b"[[[[]]]],", _MEMBER + b'"y":[', b"1]}"),
    "eight deep": _json(b"[[[[[[[[]]]]]]]],", _MEMBER + b'"y":[', b"1]}"),
    "deep objects": _json(b'{"a":{"a":{"a":{"a":{"a":1}}}}},', _MEMBER + b'"y":[', b"1]}"),
    "900 deep": _json(b"[" * 900 + b"]" * 900 + b",", _MEMBER + b'"y":[', b"1]}"),
    "brackets without an end": _json(b"[", behind=b""),
    "spaces": _json(b" "),
    "nothing but spaces": _json(b" ", b"", b""),
    "digits": _json(b"1"),
    "an array": _json(b"1,", b"[", b"1]"),
    "a text without an end": _json(b"x", b'{"model":"m","input":"', b""),
    "form with a large file": _form("b0undary", b"x", _TWO),
    "form of spaces": _form("b", b" ", b" "),
    "form of boundaries that are none": _form("boundary", b"\r\n--boundar"),
    "form with a boundary of one character": _form("b", b"\r\n--c"),
    "form of line feeds": _form("b", b"\r\n", b"\r\n"),
    "form of empty parts": _form("b", b'\r\n--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n'),
    "form with a boundary of 70": _form("b" * 70, b"\r\n--" + b"b" * 69),
    "gzip of zeros": _packed(gzip.compress, "gzip", bytes(_SIZE)),
    "gzip of JSON": _packed(gzip.compress, "gzip", _texts(4 * _MIB)),
    "deflate bomb": _packed(zlib.compress, "deflate", bytes(512 * _MIB)),
    "br bomb": _packed(brotli.compress, "br", bytes(512 * _MIB)),
    "gzip of many members": _packed(lambda body: gzip.compress(body) * 100_000, "gzip", b""),
    "with an Idempotency-Key": _json(b'"abcdefg",')._replace(headers=(("Idempotency-Key", "k"),)),
    "form with an Idempotency-Key": _form(
        "b0undary", b"\r\n--x", _TWO
    )._replace(headers=(("Content-Type", _FORM + "b0undary"), ("Idempotency-Key", "k"))),
}  # fmt: skip


def _used_s(server: Server) -> float:
    """Processor time that the first thread of a process, which runs the loop, has used."""
    text = Path(f"/proc/{server.process.pid}/schedstat").read_text(encoding="utf-8")
    return int(text.split()[0]) / 1e9


async def _waits(server: Server, done: asyncio.Event) -> tuple[float, float]:
    """The longest wait for ``/-/healthy`` until ``done``, and the most processor time in one, in s."""
    host, _, port = server.address.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    longest = busiest = 0.0
    while not done.is_set():
        begun, used_s = time.monotonic(), _used_s(server)
        writer.write(b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        await reader.readexactly(int(length or 0))
        wait = time.monotonic() - begun
        longest, busiest = max(longest, wait), max(busiest, _used_s(server) - used_s)
        await asyncio.sleep(max(0.0, _EVERY_S - wait))
    writer.close()
    return longest, busiest


def _send(address: str, body: bytes, row: Body) -> int:
    """The status of the answer to a submit. A job that it makes is deleted."""
    connection = http.client.HTTPConnection(address, timeout=_LIMIT_S)
    headers = {"Content-Type": "application/json", **dict(row.headers)}
    connection.request("POST", f"/v1/async/{row.path}", body, headers)
    answer = connection.getresponse()
    answer.read()
    location = answer.headers.get("Location")
    if location:
        connection.request("DELETE", location)
        connection.getresponse().read()
    connection.close()
    return answer.status


class _Row(NamedTuple):
    wait_s: float
    used_s: float
    total_s: float
    memory_bytes: int
    status: int


async def _measured(server: Server, body: bytes, row: Body) -> _Row | None:
    process = Path(f"/proc/{server.process.pid}")
    (process / "clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    before = server.rss_bytes()
    done = asyncio.Event()
    waits = asyncio.create_task(_waits(server, done))
    await asyncio.sleep(0.1)
    begun = time.monotonic()
    try:
        status = await asyncio.to_thread(_send, server.address, body, row) if body else 0
    except TimeoutError:
        waits.cancel()
        return None
    total_s = time.monotonic() - begun
    await asyncio.sleep(0.1)
    done.set()
    wait_s, used_s = await waits
    lines = (process / "status").read_text(encoding="utf-8").splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return _Row(wait_s, used_s, total_s, peak - before, status)


def _rows(names: list[str]) -> Iterator[tuple[str, Body]]:
    yield "nothing", Body(lambda: b"")
    yield from ((name, row) for name, row in BODIES.items() if not names or name in names)


def main(names: list[str]) -> None:
    """Print the table."""
    print("| body | MiB | longest wait, ms | work in a wait, ms | in all, s | memory, MiB | status |")
    print("| - | -: | -: | -: | -: | -: | - |")
    for name, row in _rows(names):
        body = row.make()
        # A process for each: what one leaves to the allocator is not the next one's.
        with tempfile.TemporaryDirectory() as folder, parked() as upstream:
            changes = {"store": {"max_bytes": "1GiB"}}
            with proxy(f"{upstream}/v1", core=None, folder=Path(folder), changes=changes) as server:
                seen = asyncio.run(_measured(server, body, row))
                if seen is None:  # it would not hear that it is to stop
                    server.process.kill()
                    server.process.wait()
        cells = [name, f"{len(body) / _MIB:.1f}"]
        if seen is None:
            cells += [f"> {_LIMIT_S * 1000:.0f}", "", f"> {_LIMIT_S:.0f}", "", ""]
        else:
            cells += [
                f"{seen.wait_s * 1000:.0f}",
                f"{seen.used_s * 1000:.0f}",
                f"{seen.total_s:.2f}",
                f"{seen.memory_bytes / _MIB:.0f}",
                str(seen.status or ""),
            ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    with contextlib.suppress(PermissionError):  # or the answers would wait for us, on a busy machine
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    main(sys.argv[1:])
