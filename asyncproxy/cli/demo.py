"""``asyncproxy demo``: a real embedding model on this machine, behind the proxy.

The model is WordLlama's, 256 dimensions, carried in its wheel: nothing is downloaded at run time. It
is served as a gateway would be: an OpenAI-compatible ``/v1/embeddings`` and ``/v1/models``.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shlex
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, Protocol

from aiohttp import web

from asyncproxy.config.model import Config
from asyncproxy.core.errors import ConfigError

try:
    import numpy as np
    import wordllama
except ImportError as error:  # pragma: no cover
    raise ConfigError(
        [f"the demo needs the extra `demo` ({error.name} is missing): pip install 'asyncproxy[demo]'"]
    ) from None

__all__ = ["MODEL", "build_model_app", "run"]

MODEL: Final = "wordllama-256"

# The sizes that the model was trained to be cut to (Matryoshka representation learning).
_DIMENSIONS: Final = (64, 128, 256)

_MAX_INPUTS: Final = 2048


class _Embedder(Protocol):
    """The model: ``embed`` takes n texts and returns an array of n rows, 256 columns, float32."""

    def embed(self, texts: list[str]) -> Any: ...

    def count_tokens(self, texts: list[str]) -> int: ...


class _WordLlama:
    def __init__(self) -> None:
        self._model = wordllama.WordLlama.load(
            cache_dir=Path(wordllama.__file__).parent, disable_download=True
        )

    def embed(self, texts: list[str]) -> Any:
        return self._model.embed(texts)

    def count_tokens(self, texts: list[str]) -> int:
        return sum(int(sum(encoding.attention_mask)) for encoding in self._model.tokenize(texts))


class _BadRequest(Exception):
    def __init__(self, message: str, param: str | None = None, *, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.status = status


def build_model_app(embedder: _Embedder | None = None, *, delay_s: float = 0.0) -> web.Application:
    """An OpenAI-compatible embeddings gateway. ``delay_s`` makes each answer wait so long."""
    model = embedder or _WordLlama()

    async def embeddings(request: web.Request) -> web.Response:
        try:
            texts, size, encoding = _parse(await request.read())
        except _BadRequest as error:
            return _error(error)
        await asyncio.sleep(delay_s)
        return web.json_response(await asyncio.to_thread(_embed, model, texts, size, encoding))

    async def models(_request: web.Request) -> web.Response:
        entry = {"id": MODEL, "object": "model", "created": 1700000000, "owned_by": "wordllama"}
        return web.json_response({"object": "list", "data": [entry]})

    app = web.Application(client_max_size=32 * 1024**2)
    app.router.add_post("/v1/embeddings", embeddings)
    app.router.add_get("/v1/models", models)
    return app


def _parse(body: bytes) -> tuple[list[str], int, str]:
    try:
        data = json.loads(body)
    except ValueError:
        raise _BadRequest("The body is not valid JSON.") from None
    if not isinstance(data, dict):
        raise _BadRequest("The body must be a JSON object.")
    if data.get("model") != MODEL:
        raise _BadRequest(
            f"Unknown model {str(data.get('model'))[:100]!r}. This demo serves {MODEL!r}.",
            "model",
            status=404,
        )
    given = data.get("input")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise _BadRequest("`input` must be a string or a list of strings.", "input")
    if len(texts) > _MAX_INPUTS or not all(texts):
        raise _BadRequest(f"`input` takes 1 to {_MAX_INPUTS} strings, none empty.", "input")
    size = data.get("dimensions", _DIMENSIONS[-1])
    if size not in _DIMENSIONS:
        raise _BadRequest(f"`dimensions` must be one of {_DIMENSIONS}.", "dimensions")
    encoding = data.get("encoding_format", "float")
    if encoding not in ("float", "base64"):
        raise _BadRequest("`encoding_format` must be float or base64.", "encoding_format")
    return texts, size, encoding


def _embed(model: _Embedder, texts: list[str], size: int, encoding: str) -> dict[str, Any]:
    vectors = np.asarray(model.embed(texts), dtype="<f4")[:, :size]
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors / np.where(lengths == 0, 1, lengths)
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(vector.tobytes()).decode()
            if encoding == "base64"
            else vector.tolist(),
        }
        for index, vector in enumerate(vectors)
    ]
    tokens = model.count_tokens(texts)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": MODEL, "usage": usage}


def _error(error: _BadRequest) -> web.Response:
    body = {
        "message": str(error),
        "type": "invalid_request_error",
        "param": error.param,
        "code": "model_not_found" if error.status == 404 else None,
    }
    return web.json_response({"error": body}, status=error.status)


@asynccontextmanager
async def _listening(app: web.Application) -> AsyncIterator[str]:
    """Serve the model for the length of a ``with``. Yields its URL."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def run(
    config: Config,
    delay_s: float,
    serve: Callable[..., Awaitable[None]],
) -> None:
    """Load the model, serve a proxy in front of it, and print what to try."""
    print("loading the model …", flush=True)
    app = await asyncio.to_thread(build_model_app, delay_s=delay_s)
    async with _listening(app) as model_url:
        upstream = config.upstreams[0].model_copy(
            update={"name": "demo", "base_url": f"{model_url}/v1"}
        )
        await serve(
            config.model_copy(update={"upstreams": [upstream]}),
            announce=lambda url: print(_next_steps(url, model_url), flush=True),
        )


def _next_steps(url: str, model_url: str) -> str:
    python = shlex.quote(sys.executable)
    return f"""
asyncproxy listens on {url}, in front of a real embedding model on {model_url}/v1.
In another terminal:

# Submit: a job comes back at once, and its id is kept.
ID=$(curl -s {url}/v1/async/embeddings -H 'content-type: application/json' \\
  -d '{{"model": "{MODEL}", "input": ["cat", "kitten", "revenue"]}}' | tee /dev/stderr | cut -d'"' -f4)

# Poll, until it is completed.
curl -si {url}/v1/async/embeddings/$ID

# Both with the official openai client, and the result in the type that it knows:
{python} - <<'EOF'
import math, time
from openai import OpenAI
from openai.types import CreateEmbeddingResponse

client = OpenAI(base_url="{url}/v1", api_key="demo")
request = {{"model": "{MODEL}", "input": ["cat", "kitten", "revenue"]}}
job = client.post("/async/embeddings", cast_to=object, body=request)
print("submitted:", job)
while job["status"] in ("pending", "processing"):
    time.sleep(0.5)
    job = client.get(f"/async/embeddings/{{job['id']}}", cast_to=object)
result = client.get(f"/async/embeddings/{{job['id']}}/content", cast_to=CreateEmbeddingResponse)
cat, kitten, revenue = (item.embedding for item in result.data)
cosine = lambda a, b: sum(x * y for x, y in zip(a, b)) / math.hypot(*a) / math.hypot(*b)
print(f"cat ~ kitten: {{cosine(cat, kitten):.3f}}   cat ~ revenue: {{cosine(cat, revenue):.3f}}")
EOF

Press Ctrl-C to stop.
"""
