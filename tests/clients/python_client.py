"""Makes calls with a client as its users do, and prints what came of each as a line of JSON.

Run by the interpreter that has the clients, so it imports nothing of this project. The name of the
client is the argument; on stdin is a list of calls: ``way`` (``sync``, ``async`` or ``header``),
``base_url``, ``key``, ``model``, ``input``, ``retries`` (whether the client may) and ``timeout_s`` (of the
client itself; null: as it comes).
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urljoin

Call = dict[str, Any]
Vectors = list[list[float]]

# Below the timeout of the load balancer.
WAIT = {"wait": 1}


def vectors(body: Any) -> Vectors:
    return [entry["embedding"] for entry in body["data"]]


def openai_options(call: Call) -> dict[str, Any]:
    """What an OpenAI SDK, and what is built on it, is told beyond where to go."""
    options: dict[str, Any] = {} if call["retries"] else {"max_retries": 0}
    if call["timeout_s"] is not None:
        options["timeout"] = call["timeout_s"]
    return options


def is_live(job: Any) -> bool:
    return job["status"] in ("pending", "processing")


def openai_sync(call: Call) -> Vectors:
    import openai
    from openai.types import CreateEmbeddingResponse

    options = openai_options(call)
    request = {"model": call["model"], "input": call["input"]}
    with openai.OpenAI(base_url=call["base_url"], api_key=call["key"], **options) as client:
        if call["way"] == "sync":
            response = client.embeddings.create(**request)
            return [entry.embedding for entry in response.data]
        if call["way"] == "async":
            job: Any = client.post("/async/embeddings", cast_to=object, body=request)
        else:
            job = client.embeddings.with_raw_response.create(
                **request, encoding_format="float", extra_headers={"Prefer": "respond-async"}
            ).http_response.json()
        path = f"/async/embeddings/{job['id']}"
        while is_live(job):
            job = client.get(path, cast_to=object, options={"params": WAIT})
        response = client.get(path + "/content", cast_to=CreateEmbeddingResponse)
        return [entry.embedding for entry in response.data]


def openai_async(call: Call) -> Vectors:
    return asyncio.run(_openai_async(call))


async def _openai_async(call: Call) -> Vectors:
    import openai
    from openai.types import CreateEmbeddingResponse

    options = openai_options(call)
    request = {"model": call["model"], "input": call["input"]}
    async with openai.AsyncOpenAI(base_url=call["base_url"], api_key=call["key"], **options) as client:
        if call["way"] == "sync":
            response = await client.embeddings.create(**request)
            return [entry.embedding for entry in response.data]
        if call["way"] == "async":
            job: Any = await client.post("/async/embeddings", cast_to=object, body=request)
        else:
            accepted = await client.embeddings.with_raw_response.create(
                **request, encoding_format="float", extra_headers={"Prefer": "respond-async"}
            )
            job = accepted.http_response.json()
        path = f"/async/embeddings/{job['id']}"
        while is_live(job):
            job = await client.get(path, cast_to=object, options={"params": WAIT})
        response = await client.get(path + "/content", cast_to=CreateEmbeddingResponse)
        return [entry.embedding for entry in response.data]


def langchain(call: Call) -> Vectors:
    from langchain_openai import OpenAIEmbeddings

    options = openai_options(call)
    if call["way"] == "header":
        options["default_headers"] = {"Prefer": "respond-async, wait=1"}
    embeddings = OpenAIEmbeddings(
        model=call["model"],
        base_url=call["base_url"],
        api_key=call["key"],
        check_embedding_ctx_length=False,
        **options,
    )
    return list(embeddings.embed_documents(call["input"]))


def llamaindex(call: Call) -> Vectors:
    from llama_index.embeddings.openai import OpenAIEmbedding

    options = openai_options(call)
    if call["way"] == "header":
        options["default_headers"] = {"Prefer": "respond-async, wait=1"}
    embedding = OpenAIEmbedding(
        model_name=call["model"], api_base=call["base_url"], api_key=call["key"], **options
    )
    return list(embedding.get_text_embedding_batch(call["input"]))


def requests_(call: Call) -> Vectors:
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    with requests.Session() as session:
        session.headers["Authorization"] = f"Bearer {call['key']}"
        if call["retries"]:
            retry = Retry(total=2, allowed_methods=None, status_forcelist=[503], backoff_factor=0.5)
            session.mount(call["base_url"], HTTPAdapter(max_retries=retry))
        url, body = call["base_url"], {"model": call["model"], "input": call["input"]}
        if call["way"] == "sync":
            response = session.post(f"{url}/embeddings", json=body, timeout=call["timeout_s"])
        else:
            if call["way"] == "async":
                response = session.post(f"{url}/async/embeddings", json=body)
            else:
                prefer = {"Prefer": "respond-async"}
                response = session.post(f"{url}/embeddings", json=body, headers=prefer)
            response.raise_for_status()
            job = urljoin(url, response.headers["Location"])
            while response.status_code == 202:
                response = session.get(f"{job}/content", params=WAIT)
        response.raise_for_status()
        return vectors(response.json())


def httpx_(call: Call) -> Vectors:
    import httpx

    auth = {"Authorization": f"Bearer {call['key']}"}
    with httpx.Client(headers=auth, follow_redirects=True, timeout=call["timeout_s"] or 30) as client:
        url, body = call["base_url"], {"model": call["model"], "input": call["input"]}
        if call["way"] == "sync":
            response = _httpx_post(client, f"{url}/embeddings", body, 2 if call["retries"] else 0)
        else:
            if call["way"] == "async":
                response = client.post(f"{url}/async/embeddings", json=body)
            else:
                prefer = {"Prefer": "respond-async"}
                response = client.post(f"{url}/embeddings", json=body, headers=prefer)
            response.raise_for_status()
            job = urljoin(url, response.headers["Location"])
            while response.status_code == 202:
                response = client.get(f"{job}/content", params=WAIT)
        response.raise_for_status()
        return vectors(response.json())


def _httpx_post(client: Any, url: str, body: Any, retries: int) -> Any:
    """httpx repeats nothing but connecting: this is the loop that its users write."""
    import httpx

    for left in range(retries, -1, -1):
        try:
            response = client.post(url, json=body)
        except httpx.TransportError:
            if not left:
                raise
        else:
            if response.status_code != 503 or not left:
                return response
        time.sleep(1)
    raise AssertionError


class CurlError(Exception):
    """curl has ended with an exit code that is not 0."""

    def __init__(self, code: int, body: Any, status: int) -> None:
        super().__init__(f"exit code {code}")
        self.name = f"exit {code}"
        self.body = body
        self.status_code = status


def curl(call: Call) -> Vectors:
    url = call["base_url"]
    send = ["-d", json.dumps({"model": call["model"], "input": call["input"]})]
    if call["way"] == "sync":
        retry = ["--retry", "2", "--retry-all-errors"] if call["retries"] else []
        return vectors(json.loads(_curl(call, ["-L", *retry, f"{url}/embeddings", *send])[0]))
    if call["way"] == "async":
        _, location, _ = _curl(call, [f"{url}/async/embeddings", *send])
    else:
        _, location, _ = _curl(call, [f"{url}/embeddings", "-H", "Prefer: respond-async", *send])
    job, status = urljoin(url, location), 202
    while status == 202:
        body, _, status = _curl(call, [f"{job}/content?wait=1"])
    return vectors(json.loads(body))


def _curl(call: Call, arguments: list[str]) -> tuple[str, str, int]:
    """The body, ``Location`` and status."""
    written = "\n%header{location}\n%{http_code}"
    headers = ["-H", f"Authorization: Bearer {call['key']}", "-H", "Content-Type: application/json"]
    # --fail-with-body would print the bodies of the attempts before the last one too.
    fail = "--fail" if call["retries"] else "--fail-with-body"
    limit = str(call["timeout_s"] or 60)
    command = ["curl", "--silent", fail, "--max-time", limit, "-w", written, *headers, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    body, location, status = done.stdout.rsplit("\n", 2)
    if done.returncode:
        raise CurlError(done.returncode, body, int(status))
    return body, location, int(status)


CLIENTS: dict[str, Callable[[Call], Vectors]] = {
    "openai (sync)": openai_sync,
    "openai (async)": openai_async,
    "langchain-openai": langchain,
    "llama-index": llamaindex,
    "requests": requests_,
    "httpx": httpx_,
    "curl -L": curl,
}


def outcome(client: Callable[[Call], Vectors], call: Call) -> dict[str, Any]:
    """What a call has returned, or what it has raised, as far as clients look into it."""
    try:
        return {"vectors": client(call)}
    except Exception as error:  # noqa: BLE001 the exception is what is asked for
        response = getattr(error, "response", None)
        status = getattr(error, "status_code", getattr(response, "status_code", None))
        body = getattr(error, "body", None)
        if response is not None:
            body = response.text
        elif body is not None and not isinstance(body, str):
            body = json.dumps(body)
        name = getattr(error, "name", type(error).__name__)
        return {"raised": name, "status": status, "body": body or str(error)}


def main() -> None:
    client = CLIENTS[sys.argv[1]]
    for call in json.load(sys.stdin):
        print(json.dumps(outcome(client, call)), flush=True)  # noqa: T201 it is how it answers


if __name__ == "__main__":
    main()
