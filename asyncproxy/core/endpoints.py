"""The endpoints that have an async form: the wire contract, section 2. Pure."""

from __future__ import annotations

from typing import Final

import msgspec

__all__ = ["ENDPOINTS", "Endpoint"]


class Endpoint(msgspec.Struct, frozen=True):
    """The rules of one endpoint."""

    name: str
    """The path under ``/v1/``."""
    request_type: str
    """Bifrost's name for a request to the endpoint."""
    needs_one_of: tuple[str, ...] = ()
    """A JSON body needs ``model`` and one of these fields. An error names the first of them."""
    parts: tuple[str, ...] = ()
    """A form needs ``model`` and each of these parts."""
    streams: bool = True
    """Whether ``stream`` and ``stream_format`` ask for a stream. False: they go upstream unread."""
    repeatable: bool = False
    """Whether equal requests get equal responses."""
    media: bool = False
    """Whether the response may be something other than JSON."""

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
        # vLLM takes `messages` in place of `input`, for models that embed a conversation.
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
