"""The OpenAPI description, against the routes, the errors and the answers that a proxy really has."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import requests
import schemathesis
import yaml
from aiohttp import web
from schemathesis import Case, checks

import asyncproxy
from asyncproxy.app import compose
from asyncproxy.config.load import load_config
from asyncproxy.core.endpoints import ENDPOINTS
from asyncproxy.version import __version__
from asyncproxy.web.admin import describe
from asyncproxy.web.server import listening
from tests import gateway as gateways
from tests.conftest import EMBED, Start
from tests.core.test_errors import API_ERRORS
from tests.gateway import Received, answer

ROOT = Path(__file__).parents[2]
METHODS = {"get", "head", "post", "put", "patch", "delete", "options", "trace"}


def paths_of(*names: str) -> set[str]:
    """The paths of endpoints, as they stand in the description."""
    return {
        f"/v1/{twin}{name}{rest}"
        for name in names
        for twin, rests in {
            "": [""],
            "async/": ["", "/{id}", "/{id}/content"],
            "relay/": ["", "/{id}"],
        }.items()
        for rest in rests
    }


DESCRIPTION = describe(paths_of(*ENDPOINTS))


def resolved(node: Any) -> Any:
    """What a node of the description stands for, if it is a reference."""
    while "$ref" in node:
        target: Any = DESCRIPTION
        for step in node["$ref"].removeprefix("#/").split("/"):
            target = target[step]
        node = target
    return node


def references(node: Any) -> Iterator[str]:
    """All references below a node."""
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def described(description: dict[str, Any]) -> set[tuple[str, str]]:
    """Methods and paths, as in ``("GET", "/-/ready")``."""
    return {
        (method.upper(), path)
        for path, item in description["paths"].items()
        for method in METHODS & resolved(item).keys()
    }


def routes(app: web.Application) -> set[tuple[str, str]]:
    """Methods and paths that the routes of an application have."""
    return {
        (route.method, route.resource.canonical)
        for route in app.router.routes()
        if route.resource is not None
    }


def config(**jobs: Any) -> asyncproxy.config.model.Config:
    return load_config({"upstreams": [{"base_url": "http://127.0.0.1:1/v1"}], "jobs": jobs})


# The description itself.


def keys_of(node: Any) -> Iterator[str]:
    """All keys below a node."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(key, str):
            yield key
        if isinstance(value, dict | list):
            yield from keys_of(value)


def test_no_key_is_half_a_sentence() -> None:
    """An unquoted comma in a `{description: …}` ends it, and what follows is a key."""
    text = (ROOT / "openapi.yaml").read_text(encoding="utf-8")
    for description in (DESCRIPTION, yaml.safe_load(text)):
        assert not [key for key in keys_of(description) if " " in key]


def test_each_operation_has_an_id_of_its_own_that_is_a_name() -> None:
    ids = [
        operation["operationId"]
        for item in DESCRIPTION["paths"].values()
        for method, operation in item.items()
        if method in METHODS
    ]
    assert len(ids) == len(set(ids)) > 90
    assert all(name.isidentifier() for name in ids)
    assert {"submit_embeddings", "poll_chat_completions", "relay_ocr", "healthy"} <= set(ids)


def test_it_is_openapi_3_1() -> None:
    assert DESCRIPTION["openapi"] == "3.1.0"
    schemathesis.openapi.from_dict(DESCRIPTION, config=schemathesis.Config()).validate()


def test_every_component_is_used_and_every_reference_leads_somewhere() -> None:
    used = set(references(DESCRIPTION))
    there = {
        f"#/components/{kind}/{name}"
        for kind, components in DESCRIPTION["components"].items()
        if kind != "securitySchemes"
        for name in components
    }
    assert used == there - {"#/components/schemas/Media"}  # which is named in prose
    schemes = {name for requirement in DESCRIPTION["security"] for name in requirement}
    assert schemes == DESCRIPTION["components"]["securitySchemes"].keys()


def test_the_file_at_the_root_is_the_one_in_the_package() -> None:
    link = ROOT / "openapi.yaml"
    assert link.is_symlink()
    assert str(link.readlink()) == "asyncproxy/web/openapi.yaml"
    assert f"\n  version: {__version__}\n" in link.read_text(encoding="utf-8")


def test_every_route_is_described_and_every_path_exists() -> None:
    ours = {
        (route.method, route.path) for route in compose(config()).table.routes if route.method != "*"
    }
    assert described(DESCRIPTION) == ours


def test_what_is_not_described_is_refused_or_passed_on() -> None:
    anything = {route.path for route in compose(config()).table.routes if route.method == "*"}
    beside = anything - {
        path for path in DESCRIPTION["paths"] if path.startswith(("/v1/async/", "/v1/relay/", "/-/"))
    }
    assert beside == {"/v1/async", "/v1/async/{rest}", "/-/{rest}", "/v1/relay/{rest}", "/{rest}"}


def test_every_code_is_described_with_its_status() -> None:
    cases = [case["properties"] for case in DESCRIPTION["components"]["schemas"]["Error"]["anyOf"]]
    codes = [
        (case["status_code"]["const"], code)
        for case in cases
        for code in case["error"]["properties"]["code"]["enum"]
    ]
    assert sorted(codes) == sorted((kind.status, kind.code) for kind in API_ERRORS)


def test_every_status_of_an_error_is_an_answer_of_some_path() -> None:
    answered = {
        status
        for path in DESCRIPTION["paths"].values()
        for method, operation in resolved(path).items()
        if method in METHODS
        for status in operation["responses"]
    }
    statuses = {str(kind.status) for kind in API_ERRORS}
    assert statuses - answered == {"405"}  # which is for methods that are not described


# The page.


async def test_it_is_served(start: Start) -> None:
    proxy = await start()
    page = await proxy.get("/-/openapi.json")
    assert (page.status, page.headers["Content-Type"]) == (200, "application/json")
    assert page.json() == DESCRIPTION
    assert page.json()["info"]["version"] == __version__
    assert (await proxy.request("HEAD", "/-/openapi.json")).headers["Content-Length"] == str(
        len(page.body)
    )
    assert (await proxy.post("/-/openapi.json")).headers["Allow"] == "GET, HEAD"


async def test_it_is_served_without_a_key(start: Start) -> None:
    proxy = await start(auth={"keys": ["k1"]})
    assert (await proxy.get("/-/openapi.json")).status == 200


async def test_the_page_describes_the_endpoints_that_there_are(start: Start) -> None:
    proxy = await start(jobs={"endpoints": ["ocr"]})
    page = (await proxy.get("/-/openapi.json")).json()
    pages = {"/-/healthy", "/-/ready", "/-/metrics", "/-/openapi.json"}
    assert page["paths"].keys() == paths_of("ocr") | pages


async def test_in_a_host_application_the_page_describes_what_was_added(
    aiohttp_client: Any,
) -> None:
    app = web.Application()
    asyncproxy.setup(app, config())
    added = {(method, path) for method, path in routes(app) if method != "*"}
    client = await aiohttp_client(app)
    page = await (await client.get("/-/openapi.json")).json()
    assert described(page) == added


UNKNOWN = "7f6e1c80-6f0e-4a57-9d2b-3c1f4f6f2d11"

# The answers. A proxy runs in a thread, and is asked whatever the description lets one ask.

# One of each kind: JSON with a needed field, a path with a slash, a form, an answer that is no JSON.
FUZZED = ("embeddings", "chat/completions", "images/edits", "audio/speech")

schema = schemathesis.openapi.from_dict(
    describe(paths_of(*FUZZED)),
    config=schemathesis.Config.from_dict(
        {
            "seed": 1,
            "generation": {"deterministic": True, "max-examples": 8, "database": "none"},
            # 422: two requests that are fine, under one Idempotency-Key that came up twice.
            "checks": {"positive_data_acceptance": {"expected-statuses": ["2xx", "303", "404", "422"]}},
            "phases": {"stateful": {"enabled": False}},
            "operations": [
                {
                    # Here the gateway is the judge: what cannot be a job, by its method, body or content
                    # type, passes through to it, and the one behind this proxy takes everything.
                    "include-path-regex": r"^/v1/(?!async/)",
                    "checks": {
                        "unsupported_method": {"enabled": False},
                        "negative_data_rejection": {"enabled": False},
                    },
                },
            ],
        }
    ),
)


async def behave(request: Received, writer: asyncio.StreamWriter) -> None:
    """Answer at once: speech with sound, a job by what its model is called."""
    if b"fails" in request.body:
        await answer({"error": {"message": "no"}}, status=418)(request, writer)
    elif b"breaks" in request.body:
        await answer(b"{", content_type="application/json")(request, writer)
    elif b"hangs" in request.body:
        await gateways.hang(request, writer)
    elif request.target.startswith("/v1/audio/speech"):
        await answer(b"\x00\xff", content_type="audio/mpeg")(request, writer)
    else:
        await answer({"fine": True})(request, writer)


async def serve(started: Queue[tuple[str, Callable[[], object]]]) -> None:
    """A gateway and a proxy, from when ``started`` gets its URL until it is told to stop."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    async with gateways.running() as gateway:
        gateway.behaviour = behave
        one = {"base_url": f"{gateway.url}/v1", "retry": {"attempts": 1}}
        jobs = {"endpoints": list(FUZZED), "relay_hold": "50ms"}
        proxy = compose(load_config({"upstreams": [one], "shutdown_grace": "0s", "jobs": jobs}))
        async with proxy.running(), listening(proxy.table, "127.0.0.1", 0) as url:
            started.put((url, partial(loop.call_soon_threadsafe, stop.set)))
            await stop.wait()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A proxy in a thread of its own, since schemathesis calls it and waits."""
    started: Queue[tuple[str, Callable[[], object]]] = Queue()
    thread = threading.Thread(target=lambda: asyncio.run(serve(started)), daemon=True)
    thread.start()
    url, stop = started.get(timeout=60)
    yield url
    stop()
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        yield session


@schema.parametrize()
def test_whatever_is_asked_the_answer_is_as_described(
    case: Case[Any], url: str, session: requests.Session
) -> None:
    # A form's values are text: what schemathesis takes for one of a wrong type is none on the wire.
    excluded: list[Any] = []
    if case.media_type == "multipart/form-data":
        excluded.append(checks.negative_data_rejection)
    response = case.call_and_validate(
        base_url=url, session=session, excluded_checks=excluded, allow_redirects=False
    )
    if case.method == case.operation.method.upper():
        # Where any answer of a gateway may come through, "default" describes it. This gateway says 200.
        assert str(response.status_code) in case.operation.definition.raw["responses"]


@dataclass
class Asked:
    """Calls operations of the description with a real job."""

    endpoint: str
    url: str
    session: requests.Session
    id: str = ""

    def __call__(self, method: str, path: str, **values: Any) -> Any:
        """The answer, after a check that it is as described."""
        if "{id}" in path:
            values["path_parameters"] = {"id": self.id}
        case = schema[path.replace("{endpoint}", self.endpoint)][method].Case(**values)
        # A job that failed for a reason of ours is answered with a 5xx, on purpose.
        excluded: list[Any] = [checks.not_a_server_error]
        return case.call_and_validate(
            base_url=self.url, session=self.session, excluded_checks=excluded, allow_redirects=False
        )

    def submit(self, body: Any, **values: Any) -> Any:
        response = self(
            "POST", "/v1/async/{endpoint}", body=body, media_type="application/json", **values
        )
        self.id = response.json()["id"]
        return response

    def statuses(self) -> dict[str, int]:
        """How this job is answered by all that can be asked of it; nothing is left of it then."""
        job, relayed = "/v1/async/{endpoint}/{id}", "/v1/relay/{endpoint}/{id}"
        wait: dict[str, Any] = {"query": {"wait": "0.01"}}
        by_id: dict[str, Any] = {"headers": {"x-bf-async-id": self.id}, "body": {}}
        return {
            "poll": self("GET", job, **wait).status_code,
            "poll, HEAD": self("HEAD", job).status_code,
            "content": self("GET", f"{job}/content", **wait).status_code,
            "content, HEAD": self("HEAD", f"{job}/content").status_code,
            "by header": self(
                "POST", "/v1/{endpoint}", media_type="application/json", **by_id
            ).status_code,
            "relay": self("GET", relayed, query={"hop": "1"}).status_code,
            "relay, POST": self("POST", relayed).status_code,
            "relay, last": self("GET", relayed, query={"hop": "99"}).status_code,
            "delete": self("DELETE", job).status_code,
            "gone": self("GET", job).status_code,
        }


def expected(*, poll: int, content: int, by_header: int, relay: int, last: int) -> dict[str, int]:
    return {
        "poll": poll,
        "poll, HEAD": poll,
        "content": content,
        "content, HEAD": content,
        "by header": by_header,
        "relay": relay,
        "relay, POST": relay,
        "relay, last": last,
        "delete": 204,
        "gone": 404,
    }


@pytest.mark.parametrize("endpoint", FUZZED)
@pytest.mark.parametrize(
    ("model", "statuses"),
    [
        ("works", expected(poll=200, content=200, by_header=200, relay=200, last=200)),
        ("fails", expected(poll=200, content=418, by_header=418, relay=418, last=418)),
        ("breaks", expected(poll=200, content=502, by_header=502, relay=502, last=502)),
        ("hangs", expected(poll=202, content=202, by_header=200, relay=303, last=503)),
    ],
)
@pytest.mark.parametrize("more", [{}, {"fallbacks": []}], ids=["", "with fallbacks"])
def test_answers_about_a_real_job_are_as_described(
    endpoint: str,
    model: str,
    more: dict[str, Any],
    statuses: dict[str, int],
    url: str,
    session: requests.Session,
) -> None:
    asked = Asked(endpoint, url, session)
    headers = {"Idempotency-Key": f"{endpoint} {model} {more}"}
    body = {**EMBED, "model": model, **more}
    assert asked.submit(body, headers=headers).status_code == 202
    if model != "hangs":
        asked("GET", "/v1/async/{endpoint}/{id}", query={"wait": "20"})
    assert asked.submit(body, headers=headers).status_code == (202 if model == "hangs" else 200)
    assert asked.statuses() == statuses


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"x-bf-async": "true"}, 200),
        ({"Prefer": "respond-async"}, 202),
        ({"Prefer": "respond-async, wait=0.01"}, 202),
        ({"x-bf-async-id": "no such job"}, 404),
    ],
)
def test_answers_to_the_header_form_are_as_described(
    headers: dict[str, str], status: int, url: str, session: requests.Session
) -> None:
    body: Any = {"body": {**EMBED, "model": "hangs"}, "media_type": "application/json"}
    response = Asked("embeddings", url, session)("POST", "/v1/{endpoint}", headers=headers, **body)
    assert response.status_code == status
    if status != 404:
        assert response.json().keys() == {"id", "status", "created_at"}


def test_a_relayed_call_that_takes_long_is_redirected_as_described(
    url: str, session: requests.Session
) -> None:
    body: Any = {"body": {**EMBED, "model": "hangs"}, "media_type": "application/json"}
    response = Asked("embeddings", url, session)("POST", "/v1/relay/{endpoint}", **body)
    assert response.status_code == 303


async def test_without_a_key_each_path_answers_as_described(start: Start) -> None:
    proxy = await start(auth={"keys": ["k1"]}, jobs={"endpoints": list(FUZZED)})

    def ask_all() -> set[int]:
        statuses = set()
        for method, path in described(schema.raw_schema):
            if path.startswith("/-/"):
                continue
            values: dict[str, Any] = {"path_parameters": {"id": UNKNOWN}}
            if "{id}" not in path:
                values = {"body": EMBED, "media_type": "application/json"}
            case = schema[path][method].Case(**values)
            statuses.add(case.call_and_validate(base_url=proxy.url).status_code)
        return statuses

    assert await asyncio.to_thread(ask_all) == {401}
