"""The endpoints that have an async twin: the wire contract, section 2. Pure."""

from __future__ import annotations

from typing import Final

import msgspec

__all__ = ["ENDPOINTS", "Endpoint"]


class Endpoint(msgspec.Struct, frozen=True):
    """What is particular about one endpoint."""

    name: str
    """The path under ``/v1/``."""
    request_type: str
    """What Bifrost calls a request to it."""
    needs_one_of: tuple[str, ...] = ()
    """Fields of which a JSON body needs one beside ``model``. An error names the first."""
    parts: tuple[str, ...] = ()
    """Parts that a form needs beside ``model``."""
    streams: bool = True
    """Whether ``stream`` and ``stream_format`` ask for a stream. Elsewhere they are sent on."""
    repeatable: bool = False
    """Equal requests have equal answers."""
    media: bool = False
    """The answer may be something other than JSON."""

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
        # `messages` in place of `input` is vLLM's, for models that embed a conversation.
        Endpoint(
            "embeddings",
            "embedding",
            needs_one_of=("input", "messages"),
            streams=False,
            repeatable=True,
        ),
        Endpoint("completions", "text_completion"),
        Endpoint("chat/completions", "chat_completion"),
        Endpoint("responses", "responses"),
        Endpoint("rerank", "rerank", streams=False, repeatable=True),
        Endpoint("audio/speech", "speech", media=True),
        Endpoint("audio/transcriptions", "transcription", parts=("file",), media=True),
        Endpoint("images/generations", "image_generation"),
        Endpoint("images/edits", "image_edit", parts=("image",)),
        Endpoint("images/variations", "image_variation", parts=("image",)),
        Endpoint("ocr", "ocr", streams=False, repeatable=True),
    )
}
