"""The endpoints that have an async twin: the wire contract, section 2. Pure."""

from __future__ import annotations

from typing import Final

import msgspec

__all__ = ["ENDPOINTS", "Endpoint"]


class Endpoint(msgspec.Struct, frozen=True):
    """``name`` is the path under ``/v1/``, ``request_type`` what Bifrost calls a request to it.

    ``required`` names the fields that a JSON body needs beside ``model``, ``parts`` those that a form
    needs. ``repeatable``: equal requests have equal answers. ``media``: the answer may be something
    other than JSON.
    """

    name: str
    request_type: str
    required: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    repeatable: bool = False
    media: bool = False

    @property
    def sync_path(self) -> str:
        return f"/v1/{self.name}"

    @property
    def async_path(self) -> str:
        return f"/v1/async/{self.name}"

    @property
    def relay_path(self) -> str:
        return f"/v1/relay/{self.name}"


ENDPOINTS: Final = {
    endpoint.name: endpoint
    for endpoint in (
        Endpoint("embeddings", "embedding", required=("input",), repeatable=True),
        Endpoint("completions", "text_completion"),
        Endpoint("chat/completions", "chat_completion"),
        Endpoint("responses", "responses"),
        Endpoint("rerank", "rerank", repeatable=True),
        Endpoint("audio/speech", "speech", media=True),
        Endpoint("audio/transcriptions", "transcription", parts=("file",), media=True),
        Endpoint("images/generations", "image_generation"),
        Endpoint("images/edits", "image_edit", parts=("image",)),
        Endpoint("images/variations", "image_variation", parts=("image",)),
        Endpoint("ocr", "ocr", repeatable=True),
    )
}
