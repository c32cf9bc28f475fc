"""The wire is the same whatever the store, so it is tested over each; and nothing secret is written.

Invariant 5 is held over every test here: no credential is in any line that a proxy writes. All that is
logged at any level, and all that a process writes, is searched for every credential that a proxy or a
gateway has got during the test.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from multidict import CIMultiDict

from asyncproxy.observe.logs import _JsonFormatter, _TextFormatter
from asyncproxy.wire import credentials
from tests import gateway as gateways

__all__ = ["Watch"]

STORES = ("memory", "sqlite", "redis")

# Modules whose tests are about the process, its memory or its log, or about what is refused before a store has
# it, and so run once. A single test for which that is so is marked `one_store`.
ONCE = {
    "test_bad_input",
    "test_cors",
    "test_load",
    "test_logs",
    "test_openai_client",
    "test_pass_through",
    "test_process",
    "test_targets",
    "test_websockets",
    "test_workers",
}

FIND = credentials.find

# Shorter ones would be found in any line.
SHORTEST = 6


class Watch(logging.Handler):
    """What was written during a test, and the credentials that must not be in it."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.written: list[str] = []
        self.secrets: set[str] = set()
        self.credentials: set[str] = set()
        self._formatters = (_TextFormatter(), _JsonFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        self.written += [formatter.format(record) for formatter in self._formatters]

    def saw(self, headers: Iterable[tuple[str, str]], target: str = "") -> None:
        headers = list(headers)
        found = credentials.secrets(headers, target.partition("?")[2])
        self.secrets |= {secret for secret in found if len(secret) >= SHORTEST}
        named = FIND(CIMultiDict(headers))
        self.credentials |= {named[1]} if named else set()

    def check(self) -> None:
        """Fail if a credential is in what was written."""
        short = [credential for credential in self.credentials if len(credential) < SHORTEST]
        assert not short, f"credentials of {SHORTEST} letters at least can be told from text: {short}"
        output = "\n".join(self.written)
        leaked = [secret for secret in self.secrets if secret in output]
        assert not leaked, f"{leaked} in the log"


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture(autouse=True)
def _no_credential_is_logged(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    find, communicate = FIND, asyncio.subprocess.Process.communicate
    received = gateways.Received

    def seen_by_the_proxy(headers: Any) -> Any:
        watch.saw(headers.items())
        return find(headers)

    def seen_by_the_gateway(
        method: str, target: str, headers: list[tuple[str, str]], body: bytes
    ) -> gateways.Received:
        watch.saw(headers, target)
        return received(method, target, headers, body)

    async def written_by_a_process(process: asyncio.subprocess.Process) -> Any:
        out, err = await communicate(process)
        watch.written += [data.decode() for data in (out, err) if data]
        return out, err

    monkeypatch.setattr(credentials, "find", seen_by_the_proxy)
    monkeypatch.setattr(gateways, "Received", seen_by_the_gateway)
    monkeypatch.setattr(asyncio.subprocess.Process, "communicate", written_by_a_process)
    loggers = (logging.getLogger(), logging.getLogger("asyncproxy"))
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
    for handler in loggers[0].handlers:
        handler.setLevel(logging.WARNING)  # those of pytest keep what they get
    loggers[0].addHandler(watch)
    yield
    loggers[0].removeHandler(watch)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    watch.check()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    module = metafunc.module.__name__.rpartition(".")[2]
    once = module in ONCE or metafunc.definition.get_closest_marker("one_store") is not None
    if "store_section" in metafunc.fixturenames and not once:
        metafunc.parametrize("store_section", STORES, indirect=True)
