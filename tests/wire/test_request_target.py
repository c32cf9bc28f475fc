"""The target of a request line: what it stands for, and what is refused."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from asyncproxy.core.errors import InvalidRequest, MethodNotAllowed
from asyncproxy.wire.request_target import forwarded_prefix, resolved


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/v1/models?a=%2F", "/v1/models?a=%2F"),
        ("/v1/../v1/models", "/v1/models"),
        ("/v1/./models?x=../..", "/v1/models?x=../.."),
        ("/v1/x/%2e%2E/models", "/v1/models"),
        ("/v1/x/.%2e/models", "/v1/models"),
        ("/v1/x/..", "/v1/"),
        ("/v1/x/.", "/v1/x/"),
        ("/..a/.b/c../...", "/..a/.b/c../..."),
        ("/v1/files/a%2Fb", "/v1/files/a%2Fb"),
        ("/v1//models", "/v1//models"),
        ("/x/../-/metrics", "/-/metrics"),
        ("/a%252e%252e/b", "/a%252e%252e/b"),
        ("/?/../", "/?/../"),
        ("http://proxy/v1/models?a=1", "/v1/models?a=1"),
        ("http://proxy", "/"),
        ("http://proxy?a=1", "/?a=1"),
        ("HTTPS://user@proxy:1/x/../y", "/y"),
        ("/v1/caf\udcc3\udca9", "/v1/caf\udcc3\udca9"),
    ],
)
def test_a_target_is_one_path(target: str, path: str) -> None:
    assert resolved("GET", target) == path


@pytest.mark.parametrize(
    "target",
    [
        "*",
        "",
        "v1/models",
        "proxy:443",
        "/..",
        "/../x",
        "/v1/../../x",
        "/%2e%2e/x",
        "http://proxy/../x",
        "/v1/..%2f..%2fadmin",
        "/v1/..%5Cadmin",
        "/v1/..\\admin",
        "/v1/x%2f../y",
        "/v1/a%2F%2e%2e%2Fb",
    ],
)
def test_what_has_no_path_or_leaves_the_root_is_refused(target: str) -> None:
    with pytest.raises(InvalidRequest):
        resolved("OPTIONS", target)


def test_connect_is_for_a_forward_proxy() -> None:
    with pytest.raises(MethodNotAllowed) as refused:
        resolved("CONNECT", "example.com:443")
    assert refused.value.close


def steps(target: str) -> int:
    """Lines of Python that a target takes. Both regular expressions look at a letter once."""
    count = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        resolved("GET", target)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("piece", ["/a/..", "/.", "/%2e%2e.", "/a"])
def test_the_work_grows_with_the_target(piece: str) -> None:
    assert steps(piece * 2_000 + "/.") <= 3 * steps(piece * 1_000 + "/.")


@pytest.mark.parametrize(
    ("given", "prefix"),
    [
        (None, ""),
        ("", ""),
        ("/", ""),
        ("/ai", "/ai"),
        ("/ai/", "/ai"),
        ("/team-1/ai_2/v1.0~", "/team-1/ai_2/v1.0~"),
        ("ai", ""),
        ("//evil.example", ""),
        ("/ai//x", ""),
        ("/../x", ""),
        ("/ai/..", ""),
        ("/ai/.", ""),
        ("http://evil.example/ai", ""),
        ("/a, /b", ""),
        ("/a?x", ""),
        ("/a#x", ""),
        ("/\\evil", ""),
        ("/a%2f", ""),
        ("/" + "a" * 300, ""),
    ],
)
def test_a_forwarded_prefix_is_a_path_and_nothing_else(given: str | None, prefix: str) -> None:
    assert forwarded_prefix(given) == prefix
