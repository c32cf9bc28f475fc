"""The exception tree: what is drawn, what the wire contract lists, and what the classes are."""

from __future__ import annotations

import re

from asyncproxy.core import errors
from asyncproxy.core.errors import (
    ApiError,
    AsyncProxyError,
    CallError,
    ConfigError,
    IdempotencyKeyReused,
    InvalidApiKey,
    MethodNotAllowed,
    Overloaded,
    RangeNotSatisfiable,
    ShuttingDown,
    StillRunning,
    StoreFull,
    StoreUnavailable,
    TooManyJobs,
)

# The wire contract, section 8.
CONTRACT = {
    "InvalidJson": (400, "invalid_json"),
    "InvalidForm": (400, "invalid_form"),
    "MissingParameter": (400, "missing_required_parameter"),
    "InvalidType": (400, "invalid_type"),
    "StreamingNotSupported": (400, "streaming_not_supported"),
    "InvalidApiKey": (401, "invalid_api_key"),
    "UnknownEndpoint": (404, "unknown_endpoint"),
    "MethodNotAllowed": (405, "method_not_allowed"),
    "JobNotFound": (404, "job_not_found"),
    "RequestTimeout": (408, "request_timeout"),
    "RequestTooLarge": (413, "request_too_large"),
    "UnsupportedMediaType": (415, "unsupported_media_type"),
    "IdempotencyKeyReused": (422, "idempotency_key_reused"),
    "TooManyJobs": (429, "too_many_jobs"),
    "StillRunning": (503, "still_running"),
    "Overloaded": (503, "overloaded"),
    "StoreFull": (503, "store_full"),
    "ShuttingDown": (503, "shutting_down"),
    "UpstreamUnreachable": (502, "upstream_unreachable"),
    "UpstreamTimeout": (504, "upstream_timeout"),
    "InvalidUpstreamResponse": (502, "invalid_upstream_response"),
    "ResultTooLarge": (502, "result_too_large"),
    "DeadlineExceeded": (504, "deadline_exceeded"),
    "Interrupted": (500, "interrupted"),
    # The operator's contract, "Which upstream".
    "ModelNotFound": (404, "model_not_found"),
}

# On no page of the contract: what is not HTTP or cannot be sent on, an error of our own, an upgrade.
BESIDE = {
    "InvalidRequest": (400, "invalid_request"),
    "InternalError": (500, "internal_error"),
    "RangeNotSatisfiable": (416, "range_not_satisfiable"),
    "StoreUnavailable": (503, "store_unavailable"),
}

# A class that groups others is no error of its own.
GROUPS = {"ApiError", "CallError"}


def public(kind: type) -> bool:
    return not kind.__name__.startswith("_")


def classes(kind: type[AsyncProxyError] = AsyncProxyError) -> list[type[AsyncProxyError]]:
    """``kind`` and all below it, in this package."""
    below = [c for sub in kind.__subclasses__() for c in classes(sub)]
    return [kind, *below] if kind.__module__ == errors.__name__ else below


def public_parent(kind: type) -> str | None:
    """The nearest base that has a name of its own in the tree."""
    above = [c for c in kind.__mro__[1:] if issubclass(c, AsyncProxyError) and public(c)]
    return above[0].__name__ if above else None


def build(kind: type[ApiError]) -> ApiError:
    if issubclass(kind, MethodNotAllowed):
        return kind("what was wrong", allow="GET, DELETE")
    if issubclass(kind, TooManyJobs):
        return kind(3)
    if issubclass(kind, IdempotencyKeyReused | StoreFull):
        return kind()
    return kind("what was wrong")


API_ERRORS = sorted(
    (
        c
        for c in classes(ApiError)
        if issubclass(c, ApiError) and public(c) and c.__name__ not in GROUPS
    ),
    key=lambda c: c.__name__,
)


def test_each_error_has_the_status_and_the_code_of_the_contract() -> None:
    assert {kind.__name__: (kind.status, kind.code) for kind in API_ERRORS} == {**CONTRACT, **BESIDE}


def test_no_two_errors_share_a_code() -> None:
    codes = [kind.code for kind in API_ERRORS]
    assert len(codes) == len(set(codes))


def test_the_type_says_whose_fault_it_is() -> None:
    for kind in API_ERRORS:
        fault = "invalid_request_error" if kind.status < 500 else "server_error"
        assert kind.type == ("rate_limit_error" if kind is TooManyJobs else fault), kind


def test_the_tree_in_the_docstring_is_the_real_one() -> None:
    drawn: dict[str, tuple[str | None, tuple[int, str] | None]] = {}
    open_at: dict[int, str] = {}
    for line in (errors.__doc__ or "").splitlines():
        match = re.fullmatch(r"    ([ │├└─]*)([A-Z]\w+)(?: +(\d{3}) (\w+)| +.+)?", line)
        if match is None:
            continue
        depth = len(match[1]) // 4
        name = match[2]
        answered = (int(match[3]), match[4]) if match[3] else None
        assert name not in drawn, f"{name} is drawn twice"
        drawn[name] = (open_at[depth - 1] if depth else None, answered)
        open_at[depth] = name

    real: dict[str, tuple[str | None, tuple[int, str] | None]] = {}
    for kind in filter(public, classes()):
        leaf = issubclass(kind, ApiError) and kind.__name__ not in GROUPS
        answered = (kind.status, kind.code) if leaf and issubclass(kind, ApiError) else None
        real[kind.__name__] = (public_parent(kind), answered)
    assert drawn == real


def test_the_module_exports_the_tree_and_nothing_else() -> None:
    assert sorted(errors.__all__) == sorted(kind.__name__ for kind in classes() if public(kind))


def test_outcomes_of_calls_are_told_from_refusals() -> None:
    ours = {kind.__name__ for kind in API_ERRORS if issubclass(kind, CallError)}
    assert ours == {
        "Interrupted",
        "UpstreamUnreachable",
        "InvalidUpstreamResponse",
        "ResultTooLarge",
        "UpstreamTimeout",
        "DeadlineExceeded",
    }


def test_headers_come_with_the_errors_that_need_them_and_with_no_others() -> None:
    names = {kind: {name for name, _ in build(kind).headers} for kind in API_ERRORS}
    assert {kind: found for kind, found in names.items() if found} == {
        InvalidApiKey: {"WWW-Authenticate"},
        MethodNotAllowed: {"Allow"},
        RangeNotSatisfiable: {"Content-Range"},
        TooManyJobs: {"Retry-After"},
        Overloaded: {"Retry-After"},
        StoreFull: {"Retry-After"},
        StoreUnavailable: {"Retry-After"},
        ShuttingDown: {"Retry-After"},
        StillRunning: {"Retry-After"},
    }


def test_the_values_of_these_headers() -> None:
    assert TooManyJobs(3).headers == (("Retry-After", "5"),)
    assert Overloaded("…", retry_after_s=7).headers == (("Retry-After", "7"),)
    assert MethodNotAllowed("…", allow="GET, DELETE").headers == (("Allow", "GET, DELETE"),)
    assert InvalidApiKey("…").headers == (("WWW-Authenticate", 'Bearer realm="asyncproxy"'),)


def test_the_message_is_what_str_says() -> None:
    for error in map(build, API_ERRORS):
        assert str(error) == error.message != ""
        assert error.param is None
        assert (error.provider, error.model) == ("", "")


def test_a_connection_is_closed_where_the_rest_of_the_request_is_still_to_come() -> None:
    closing = {kind.__name__ for kind in API_ERRORS if build(kind).close}
    assert closing == {"InvalidRequest", "RequestTimeout", "RequestTooLarge"}


def test_an_error_names_its_param_and_headers() -> None:
    error = ApiError("no", param="model", headers=(("X-A", "1"),))
    assert (error.param, error.headers) == ("model", (("X-A", "1"),))


def test_a_config_error_has_one_line_for_each_problem() -> None:
    error = ConfigError(["a: wrong", "b: wrong too"])
    assert error.problems == ("a: wrong", "b: wrong too")
    assert str(error) == "a: wrong\nb: wrong too"
