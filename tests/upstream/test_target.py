"""Which upstream gets a request, and under which URL."""

from __future__ import annotations

import pytest

from asyncproxy.core.errors import ModelNotFound
from asyncproxy.upstream.model_routes import ModelRoutes
from asyncproxy.upstream.target import Target, loggable


def test_the_first_upstream_that_matches_gets_it() -> None:
    routes = ModelRoutes([("a", ["bge-*", "e5"]), ("b", ["bge-m3", "text-?"]), ("c", ["[xy]*"])])
    found = {model: routes.upstream_for(model) for model in ("bge-m3", "e5", "text-3", "x1", "y")}
    assert found == {"bge-m3": "a", "e5": "a", "text-3": "b", "x1": "c", "y": "c"}
    assert routes.first == "a"
    assert routes.needs_model


@pytest.mark.parametrize("model", ["", "E5", "e55", "text-33", "z", "bge", "e5\n", "a" * 1000])
def test_no_upstream_matches(model: str) -> None:
    routes = ModelRoutes([("a", ["bge-*", "e5"]), ("b", ["text-?"])])
    with pytest.raises(ModelNotFound) as caught:
        routes.upstream_for(model)
    assert caught.value.param == "model"
    assert len(caught.value.message) < 500


def test_a_star_takes_all_and_needs_no_look() -> None:
    routes = ModelRoutes([("a", ["x", "*"]), ("b", ["y"])])
    assert not routes.needs_model
    assert routes.upstream_for("y") == "a"


def test_what_is_remembered_of_models_is_bounded() -> None:
    routes = ModelRoutes([("a", ["m*"])])
    for number in range(5000):
        assert routes.upstream_for(f"m{number}") == "a"
    assert routes._find.cache_info().currsize <= 1024


def test_there_has_to_be_an_upstream() -> None:
    with pytest.raises(ValueError, match="at least one"):
        ModelRoutes([])


@pytest.mark.parametrize(
    ("base_url", "path", "url"),
    [
        ("http://h:4000/v1", "/v1/embeddings", "http://h:4000/v1/embeddings"),
        ("http://h:4000/v1/", "/v1/embeddings?a=%2F", "http://h:4000/v1/embeddings?a=%2F"),
        ("http://h", "/v1/embeddings", "http://h/v1/embeddings"),
        ("http://h/", "/v1/embeddings", "http://h/v1/embeddings"),
        ("https://h/openai/v9", "/v1/embeddings", "https://h/openai/v9/embeddings"),
        ("https://h/openai/v9", "/v1", "https://h/openai/v9"),
        ("https://h/openai/v9", "/v1?x", "https://h/openai/v9?x"),
        ("https://h/openai/v9", "/v1/", "https://h/openai/v9/"),
        ("https://h/openai/v9", "/v10/x", "https://h/v10/x"),
        ("https://h/openai/v9", "/health", "https://h/health"),
        ("https://h/openai/v9", "/V1/x", "https://h/V1/x"),
        ("http://[::1]:80/v1", "/v1/../x//y", "http://[::1]:80/v1/../x//y"),
        ("http://h", "/caf\udcc3\udca9", "http://h/caf%C3%A9"),
    ],
)
def test_urls(base_url: str, path: str, url: str) -> None:
    target = Target(base_url)
    assert target.origin + target.path(path) == url


@pytest.mark.parametrize(
    ("base_url", "given", "expected"),
    [
        ("http://h:4000/v1", "http://h:4000/v1/x?a=%2F#f", "/v1/x?a=%2F#f"),
        ("http://h:4000/v1", "HTTP://H:4000", "/"),
        ("http://h:4000/v1", "http://h:4000?a", "/?a"),
        ("http://h:4000/v1", "//h:4000/x", "/x"),
        ("http://h:4000/v1", "http://h:40001/x", "http://h:40001/x"),
        ("http://h:4000/v1", "http://h/x", "http://h/x"),
        ("http://h:4000/v1", "http://h:4000.example/x", "http://h:4000.example/x"),
        ("http://h:4000/v1", "http://h:4000@evil.example/x", "http://h:4000@evil.example/x"),
        ("http://h:4000/v1", "https://h:4000/x", "https://h:4000/x"),
        ("http://h", "http://h:80/x", "/x"),
        ("https://h:443/v1", "https://h/v1/x", "/v1/x"),
        ("https://h/openai/v9", "https://h/openai/v9/files/1", "/v1/files/1"),
        ("https://h/openai/v9", "https://h/openai/v99", "/openai/v99"),
        ("https://h/openai/v9", "https://h/openai/v9", "/v1"),
        ("http://user:pass@h/v1", "http://h/v1/x", "/v1/x"),
        ("http://[::1]:80/v1", "http://[::1]/v1/x", "/v1/x"),
        ("http://h", "/x", "/x"),
        ("http://h", "x", "x"),
        ("http://h", "", ""),
        # What would name another host, once our own name is gone from its front.
        ("http://h", "http://h//evil.example/x", "/.//evil.example/x"),
        ("http://h", "http://h/\\evil.example/x", "/./\\evil.example/x"),
        ("http://h/v9", "http://h/v9//x", "/v1//x"),
    ],
)
def test_a_location_at_the_upstreams_own_origin_is_a_path(
    base_url: str, given: str, expected: str
) -> None:
    headers = ((b"LOCATION", given.encode()), (b"X", given.encode()))
    assert Target(base_url).with_our_locations(headers) == (
        (b"LOCATION", expected.encode()),
        (b"X", given.encode()),
    )


def test_the_operators_host_is_an_origin_of_the_upstream_too() -> None:
    target = Target("https://10.0.0.1:8443/v1", "inner.example")
    for given in (
        "http://inner.example/v1/x",
        "https://inner.example/v1/x",
        "https://10.0.0.1:8443/v1/x",
    ):
        headers = ((b"Content-Location", given.encode()),)
        assert target.with_our_locations(headers) == ((b"Content-Location", b"/v1/x"),)


def test_what_is_logged_of_a_path_has_no_query() -> None:
    assert loggable("/v1/x?api_key=secret?") == "/v1/x"
