"""The endpoints that have an async twin: the wire contract, section 2. Pure."""

from __future__ import annotations

from typing import Final

import msgspec

__all__ = ["ENDPOINTS", "Endpoint"]


class Endpoint(msgspec.Struct, frozen=True):
    """``name`` is the path under ``/v1/``, ``request_type`` what Bifrost calls a request to it.

    ``required`` names the fields that a JSON body needs beside ``model``.
    """

    name: str
    request_type: str
    required: tuple[str, ...] = ()

    @property
    def sync_path(self) -> str:
        return f"/v1/{self.name}"

    @property
    def async_path(self) -> str:
        return f"/v1/async/{self.name}"


ENDPOINTS: Final = {
    endpoint.name: endpoint
    for endpoint in (
        Endpoint("embeddings", "embedding", required=("input",)),
        Endpoint("completions", "text_completion"),
        Endpoint("chat/completions", "chat_completion"),
        Endpoint("responses", "responses"),
        Endpoint("rerank", "rerank"),
        Endpoint("audio/speech", "speech"),
        Endpoint("audio/transcriptions", "transcription"),
        Endpoint("images/generations", "image_generation"),
        Endpoint("images/edits", "image_edit"),
        Endpoint("images/variations", "image_variation"),
        Endpoint("ocr", "ocr"),
    )
}
