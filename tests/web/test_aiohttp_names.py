"""The names of aiohttp that are not in its documentation, and that the server side uses all the same.

Each may move in any release. Here each is named once, with the file that it is used in and what it buys. If one is gone,
the test that fails says what to look for. ``asyncproxy/upstream/exchange.py`` has the names of the client side.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp.http_parser
import pytest
from aiohttp import StreamReader, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_exceptions import BadHttpMethod, InvalidURLError
from aiohttp.http_writer import StreamWriter

from asyncproxy.web.wire_response import WireResponse

WEB = Path(__file__).parents[2] / "asyncproxy" / "web"


class Name(NamedTuple):
    of: Any
    name: str
    parameters: str | None
    """Of a method: those that we rely on, in their order."""
    file: str
    buys: str


NAMES = (
    Name(
        web.RequestHandler,
        "finish_response",
        "self request resp start_time",
        "connection",
        "memory: the body of a refused upload is dropped as it arrives",
    ),
    Name(
        web.RequestHandler,
        "handle_error",
        "self request status exc message",
        "connection",
        "our error shape for what is not HTTP, without the version of aiohttp",
    ),
    Name(
        web.RequestHandler,
        "data_received",
        "self data",
        "connection",
        "memory: the body of a refused upload is dropped as it arrives",
    ),
    Name(
        aiohttp.http_parser,
        "HttpRequestParser",
        None,
        "connection",
        "any method passes through: a request of an unknown one is read by a second parser",
    ),
    *(
        Name(web.RequestHandler, name, None, "connection", "any method: what the first parser refused")
        for name in ("_messages", "_current_request", "_parser")
    ),
    Name(BadHttpMethod, "__init__", None, "connection", "any method: which refusal it was"),
    Name(StreamReader, "_buffer", None, "connection", "whether there is anything to drop"),
    Name(
        web.Server,
        "connection_made",
        "self handler transport",
        "connection",
        "max_connections: the count of what is open",
    ),
    Name(
        web.Server,
        "connection_lost",
        "self handler exc",
        "connection",
        "max_connections: the count of what is open",
    ),
    Name(
        web.BaseRequest,
        "__init__",
        "self message payload protocol payload_writer task loop",
        "connection",
        "the end of a connection after a chunked request: its trailer is a field of the next request",
    ),
    Name(
        aiohttp.http_parser,
        "HttpRequestParserPy",
        None,
        "connection",
        "a warning where aiohttp's parser is the lax one",
    ),
    Name(InvalidURLError, "__init__", None, "connection", "a target is not quoted"),
    Name(
        AbstractStreamWriter,
        "output_size",
        None,
        "wire_response",
        "heads that are written by hand: a poll takes 20 µs in the process, with web.Response 30",
    ),
    Name(
        StreamWriter,
        "write",
        "self chunk",
        "wire_response",
        "the same: the writer takes bytes of a head and a body as they are",
    ),
)


def id_of(name: Name) -> str:
    return f"{name.of.__name__}.{name.name}"


@pytest.mark.parametrize("name", NAMES, ids=id_of)
def test_aiohttp_still_has_it(name: Name) -> None:
    there: Any = getattr(name.of, name.name, None)
    assert there is not None or name.name in getattr(name.of, "__annotations__", ()), name.buys
    if name.parameters is not None:
        assert list(inspect.signature(there).parameters)[: len(name.parameters.split())] == (
            name.parameters.split()
        ), name.buys


@pytest.mark.parametrize("name", NAMES, ids=id_of)
def test_one_file_uses_it(name: Name) -> None:
    word = name.of.__name__ if name.name == "__init__" else name.name
    assert re.search(rf"\b{word}\b", (WEB / f"{name.file}.py").read_text(encoding="utf-8"))


def test_no_other_file_reaches_into_aiohttp() -> None:
    """Neither by a private name, nor by one of its undocumented modules, nor by what a writer counts."""
    private = re.compile(
        r"\b(?:request|response|writer|protocol|content|message|payload|runner|server)\._[a-z]\w*"
        r"|\boutput_size\b|aiohttp\.web_\w+|aiohttp\.http_(?:parser|writer)"
    )
    for path in WEB.glob("*.py"):
        if path.stem not in ("connection", "wire_response"):
            assert private.findall(path.read_text(encoding="utf-8")) == [], path.name


def test_a_connection_asks_an_answer_for_no_more_than_it_has() -> None:
    """``finish_response`` and ``start`` take any object for an answer that has these."""
    source = inspect.getsource(web.RequestHandler)
    asked = set(re.findall(r"\bresp\.(\w+)", source))
    assert asked <= {"prepare", "write_eof", "keep_alive", "force_close"}
    assert asked <= set(dir(WireResponse(200, b"", b"")))
