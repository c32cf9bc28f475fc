"""Every error that this package raises, with the status and the code that a client sees.

    AsyncProxyError
    ├── ConfigError                 a command line or configuration that cannot be used (exit 2)
    ├── StartupError                a proxy that cannot start (exit 1)
    ├── IllegalTransition           a step of a job that the table in jobs.py forbids
    └── ApiError                    answered to a client, or recorded as the outcome of a job
        ├── InvalidJson                 400 invalid_json
        ├── InvalidForm                 400 invalid_form
        ├── MissingParameter            400 missing_required_parameter
        ├── InvalidType                 400 invalid_type
        ├── StreamingNotSupported       400 streaming_not_supported
        ├── InvalidRequest              400 invalid_request
        ├── InvalidApiKey               401 invalid_api_key
        ├── UnknownEndpoint             404 unknown_endpoint
        ├── JobNotFound                 404 job_not_found
        ├── ModelNotFound               404 model_not_found
        ├── MethodNotAllowed            405 method_not_allowed
        ├── RequestTimeout              408 request_timeout
        ├── RequestTooLarge             413 request_too_large
        ├── UnsupportedMediaType        415 unsupported_media_type
        ├── RangeNotSatisfiable         416 range_not_satisfiable
        ├── IdempotencyKeyReused        422 idempotency_key_reused
        ├── TooManyJobs                 429 too_many_jobs
        ├── InternalError               500 internal_error
        ├── Overloaded                  503 overloaded
        ├── StoreFull                   503 store_full
        ├── StoreUnavailable            503 store_unavailable
        ├── ShuttingDown                503 shutting_down
        ├── StillRunning                503 still_running
        └── CallError                   a call to an upstream that brought no usable response
            ├── Interrupted                 500 interrupted
            ├── UpstreamUnreachable         502 upstream_unreachable
            ├── InvalidUpstreamResponse     502 invalid_upstream_response
            ├── ResultTooLarge              502 result_too_large
            ├── UpstreamTimeout             504 upstream_timeout
            └── DeadlineExceeded            504 deadline_exceeded

A message says what was wrong and what would be right. No message holds a credential or an internal
address.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

__all__ = [
    "ApiError",
    "AsyncProxyError",
    "CallError",
    "ConfigError",
    "DeadlineExceeded",
    "IdempotencyKeyReused",
    "IllegalTransition",
    "InternalError",
    "Interrupted",
    "InvalidApiKey",
    "InvalidForm",
    "InvalidJson",
    "InvalidRequest",
    "InvalidType",
    "InvalidUpstreamResponse",
    "JobNotFound",
    "MethodNotAllowed",
    "MissingParameter",
    "ModelNotFound",
    "Overloaded",
    "RangeNotSatisfiable",
    "RequestTimeout",
    "RequestTooLarge",
    "ResultTooLarge",
    "ShuttingDown",
    "StartupError",
    "StillRunning",
    "StoreFull",
    "StoreUnavailable",
    "StreamingNotSupported",
    "TooManyJobs",
    "UnknownEndpoint",
    "UnsupportedMediaType",
    "UpstreamTimeout",
    "UpstreamUnreachable",
]


class AsyncProxyError(Exception):
    """The base of every error that this package raises."""


class ConfigError(AsyncProxyError):
    """A configuration that cannot be used.

    ``problems`` has one line per problem: the path of the key, its value, and what would be right.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class StartupError(AsyncProxyError):
    """The proxy cannot start: the port is taken, the store is out of reach."""


class IllegalTransition(AsyncProxyError):
    """A job was asked to make a step that its state does not allow. The job has not changed."""


class ApiError(AsyncProxyError):
    """An error with a status, a type and a code (the wire contract, section 8).

    ``headers`` are further response headers (``Retry-After``, ``Allow``).
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "server_error"
    close: bool = False
    """Whether the connection closes after the response: the rest of the request is still to come."""
    provider: str = ""
    """The name of the upstream, if it is known."""
    model: str = ""
    """The model that the request names, if it is known."""
    detail: str = ""
    """For the log only: unlike the message, it may name an address."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.headers = headers


class _InvalidRequestError(ApiError):
    type = "invalid_request_error"


class InvalidJson(_InvalidRequestError):
    status, code = 400, "invalid_json"


class InvalidForm(_InvalidRequestError):
    status, code = 400, "invalid_form"


class MissingParameter(_InvalidRequestError):
    status, code = 400, "missing_required_parameter"


class InvalidType(_InvalidRequestError):
    status, code = 400, "invalid_type"


class StreamingNotSupported(_InvalidRequestError):
    status, code = 400, "streaming_not_supported"


class InvalidRequest(_InvalidRequestError):
    """A request that is not valid HTTP, or that cannot be forwarded as it is."""

    status, code = 400, "invalid_request"
    close = True


class InvalidApiKey(_InvalidRequestError):
    status, code = 401, "invalid_api_key"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers=(("WWW-Authenticate", 'Bearer realm="asyncproxy"'),))


class UnknownEndpoint(_InvalidRequestError):
    status, code = 404, "unknown_endpoint"


class JobNotFound(_InvalidRequestError):
    status, code = 404, "job_not_found"


class ModelNotFound(_InvalidRequestError):
    status, code = 404, "model_not_found"


class MethodNotAllowed(_InvalidRequestError):
    status, code = 405, "method_not_allowed"

    def __init__(self, message: str, *, allow: str) -> None:
        super().__init__(message, headers=(("Allow", allow),))


class RequestTimeout(_InvalidRequestError):
    status, code = 408, "request_timeout"
    close = True


class RequestTooLarge(_InvalidRequestError):
    status, code = 413, "request_too_large"
    close = True


class UnsupportedMediaType(_InvalidRequestError):
    status, code = 415, "unsupported_media_type"


class RangeNotSatisfiable(_InvalidRequestError):
    status, code = 416, "range_not_satisfiable"

    def __init__(self, size: int) -> None:
        super().__init__(
            f"The result has {size} bytes, and none of them is in this range.",
            headers=(("Content-Range", f"bytes */{size}"),),
        )


class IdempotencyKeyReused(_InvalidRequestError):
    status, code = 422, "idempotency_key_reused"

    def __init__(self) -> None:
        super().__init__(
            "This Idempotency-Key was used with another request. Use a new key for a new request."
        )


class _RetryLaterError(ApiError):
    """Nothing has changed, and the same request may succeed after ``retry_after_s``."""

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message, headers=(("Retry-After", str(retry_after_s)),))
        self._retry_after_s = retry_after_s

    def postpone(self, retry_after_s: float) -> None:
        """Ask for a retry in ``retry_after_s`` at the earliest."""
        self._retry_after_s = max(self._retry_after_s, math.ceil(retry_after_s))
        self.headers = (("Retry-After", str(self._retry_after_s)),)


class TooManyJobs(_RetryLaterError):
    """The credential already has ``limit`` live jobs."""

    status, code, type = 429, "too_many_jobs", "rate_limit_error"

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"This credential has {limit} jobs that are not done. Wait for some of them.",
            retry_after_s=5,
        )


class InternalError(ApiError):
    status, code = 500, "internal_error"


class Overloaded(_RetryLaterError):
    """More requests at once than the proxy takes. Without a ``message``: too many live jobs."""

    status, code = 503, "overloaded"

    def __init__(
        self,
        message: str = "Too many jobs are waiting. Try again later.",
        *,
        retry_after_s: int = 5,
    ) -> None:
        super().__init__(message, retry_after_s=retry_after_s)


class StoreFull(_RetryLaterError):
    """The store has no room. ``detail`` says why, for the log."""

    status, code = 503, "store_full"

    def __init__(self, detail: str = "") -> None:
        super().__init__("The store is full. Try again later.", retry_after_s=5)
        self.detail = detail


class StoreUnavailable(_RetryLaterError):
    """The store is out of reach, or does not work as it should. ``detail`` says why, for the log."""

    status, code = 503, "store_unavailable"


class ShuttingDown(_RetryLaterError):
    status, code = 503, "shutting_down"


class StillRunning(_RetryLaterError):
    status, code = 503, "still_running"


class CallError(ApiError):
    """A call to an upstream that brought no usable response."""


class Interrupted(CallError):
    status, code = 500, "interrupted"


class UpstreamUnreachable(CallError):
    """The call brought no response."""

    status, code = 502, "upstream_unreachable"
    delivered: bool = True
    """Whether any of the request may have reached the upstream, and may have broken it.

    False if no connection was made: refused, not accepted, no such name, no route, TLS failed.
    """


class InvalidUpstreamResponse(CallError):
    status, code = 502, "invalid_upstream_response"


class ResultTooLarge(CallError):
    status, code = 502, "result_too_large"


class UpstreamTimeout(CallError):
    status, code = 504, "upstream_timeout"


class DeadlineExceeded(CallError):
    status, code = 504, "deadline_exceeded"
