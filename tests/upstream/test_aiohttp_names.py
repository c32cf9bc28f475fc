"""What `upstream/exchange.py` uses of aiohttp that is private or in no documentation.

A release of aiohttp that moves one of these names fails here, by name, and not in some request.
"""

from __future__ import annotations

import asyncio
import inspect
import re
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import StreamReader
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from aiohttp.http import HttpProcessingError, RawResponseMessage, StreamWriter
from yarl import URL

import asyncproxy

PACKAGE = Path(asyncproxy.__file__).parent

# Name, and what it buys.
NAMES: dict[str, tuple[Any, str]] = {
    "BaseConnector.connect": (aiohttp.BaseConnector, "a connection of the pool, without a session"),
    "Connection.protocol": (Connection, "the parser and the queue of responses"),
    "Connection.transport": (Connection, "one write for a small request"),
    "Connection.release": (Connection, "the connection goes back to the pool"),
    "Connection.close": (Connection, "the connection is not used again"),
    "ResponseHandler.set_response_params": (ResponseHandler, "a parser for the next response"),
    "ResponseHandler.read": (ResponseHandler, "the head of the next response"),
    "ResponseHandler.should_close": (ResponseHandler, "whether something came unasked"),
    "ResponseHandler.set_exception": (ResponseHandler, "the reader of a body hears that it broke"),
    "ResponseHandler.set_parser": (ResponseHandler, "the bytes after a 101 (tunnels)"),
    "StreamReader.set_exception": (StreamReader, "as ResponseHandler.set_exception"),
    "StreamReader.exception": (StreamReader, "as ResponseHandler.set_exception"),
    "StreamReader.feed_data": (StreamReader, "the bytes after a 101, with its limits"),
    "StreamReader.feed_eof": (StreamReader, "the end of a tunnel"),
    "StreamReader.is_eof": (StreamReader, "a response that came whole is one write to the client"),
    "StreamReader.at_eof": (StreamReader, "as StreamReader.is_eof"),
    "StreamReader.read_nowait": (StreamReader, "as StreamReader.is_eof"),
    "StreamWriter.write": (StreamWriter, "a large or streamed body, as the transport takes it"),
    "StreamWriter.enable_chunking": (StreamWriter, "a streamed body of unknown length"),
    "StreamWriter.write_eof": (StreamWriter, "as StreamWriter.enable_chunking"),
}

PARAMETERS = {
    ResponseHandler.set_response_params: {
        "skip_payload",
        "read_until_eof",
        "auto_decompress",
        "read_bufsize",
        "max_line_size",
        "max_field_size",
        "max_headers",
    },
    ResponseHandler.set_parser: {"parser", "payload"},
    ResponseHandler.set_exception: {"exc", "exc_cause"},
    StreamWriter.write: {"chunk", "LIMIT"},
    StreamReader.__init__: {"protocol", "limit", "loop"},
    aiohttp.BaseConnector.connect: {"req", "traces", "timeout"},
    aiohttp.ClientRequest.__init__: {"method", "url", "loop"},
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_there(name: str) -> None:
    where, _ = NAMES[name]
    assert hasattr(where, name.partition(".")[2])


@pytest.mark.parametrize("function", PARAMETERS, ids=lambda function: function.__qualname__)
def test_a_function_takes_what_it_is_given(function: Any) -> None:
    assert PARAMETERS[function] <= set(inspect.signature(function).parameters)


async def test_a_connector_makes_its_protocols_with_a_factory_of_its_own() -> None:
    """``BaseConnector._factory``: the only way to our own kind of connection."""
    async with aiohttp.TCPConnector() as connector:
        assert isinstance(connector._factory(), ResponseHandler)


async def test_a_request_is_what_a_connector_knows_a_connection_by() -> None:
    request = aiohttp.ClientRequest("GET", URL("http://gateway:4000"), loop=asyncio.get_running_loop())
    assert (request.connection_key.host, request.connection_key.port) == ("gateway", 4000)
    assert request.headers["Host"] == "gateway:4000"


def test_the_head_of_a_response() -> None:
    assert {"code", "reason", "headers", "raw_headers"} <= set(dir(RawResponseMessage))
    assert HttpProcessingError(message="why").message == "why"


def test_no_other_file_knows_them() -> None:
    """Of aiohttp's client, the others have its documented exceptions at most."""
    private = re.compile(
        r"aiohttp\.(client_proto|client_reqrep|connector)|ResponseHandler|HttpResponseParser"
    )
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).as_posix() != "upstream/exchange.py":
            assert not private.search(path.read_text(encoding="utf-8")), path
