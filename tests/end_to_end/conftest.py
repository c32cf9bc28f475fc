"""The wire is the same whatever the store: what is seen of it is tested over each."""

from __future__ import annotations

import pytest

STORES = ("memory", "sqlite", "redis")

# Modules whose tests are about the process or its memory, or never touch a job, and so run once.
ONCE = {"test_load", "test_pass_through", "test_process", "test_workers"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    module = metafunc.module.__name__.rpartition(".")[2]
    if "store_section" in metafunc.fixturenames and module not in ONCE:
        metafunc.parametrize("store_section", STORES, indirect=True)
