"""The fields of a multipart form: read as they are written, refused when they are not a form."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncproxy.wire import multipart

TYPE = "multipart/form-data; boundary=xyz"


def form(*parts: bytes, end: bytes = b"--xyz--\r\n") -> bytes:
    return b"".join(b"--xyz\r\n" + part + b"\r\n" for part in parts) + end


def field(name: str, value: bytes, filename: str | None = None) -> bytes:
    extra = f'; filename="{filename}"' if filename is not None else ""
    return f'Content-Disposition: form-data; name="{name}"{extra}\r\n\r\n'.encode() + value


def test_fields_and_files_in_their_order() -> None:
    body = form(field("model", b"m"), field("file", b"\x00\xff\r\n--x", "a.mp3"), field("model", b"n"))
    assert multipart.parse(TYPE, body) == [
        multipart.Field("model", "m", None),
        multipart.Field("file", "\x00\ufffd\r\n--x", "a.mp3"),
        multipart.Field("model", "n", None),
    ]


def test_the_last_line_may_lack_its_end() -> None:
    assert multipart.parse(TYPE, form(field("a", b"b"), end=b"--xyz--")) == [
        multipart.Field("a", "b", None)
    ]


def test_only_the_beginning_of_a_value_is_kept() -> None:
    (part,) = multipart.parse(TYPE, form(field("file", b"x" * 1_000_000, "a")))
    assert part.value == "x" * 4096


@pytest.mark.parametrize(
    "content_type", [TYPE, 'multipart/form-data; boundary="xyz"', TYPE + "; charset=utf-8"]
)
def test_the_boundary_may_be_quoted(content_type: str) -> None:
    assert multipart.parse(content_type, form(field("a", b"b"))) == [multipart.Field("a", "b", None)]


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", form(field("a", b"b"))),
        ("multipart/form-data; boundary=", form(field("a", b"b"))),
        (TYPE, b""),
        (TYPE, b"no form"),
        (TYPE, form(field("a", b"b"), end=b"")),
        (TYPE, form(field("a", b"b"), end=b"--xyz")),
        (TYPE, form(b"Content-Disposition: attachment; name=a\r\n\r\nb")),
        (TYPE, form(b"Content-Disposition: form-data\r\n\r\nb")),
        (TYPE, form(b"X: y\r\n\r\nb")),
        (TYPE, form(b"no header")),
        (TYPE, form(*[field("a", b"")] * 1001)),
        (TYPE.replace("xyz", "other"), form(field("a", b"b"))),
    ],
)
def test_what_is_no_form(content_type: str, body: bytes) -> None:
    with pytest.raises(multipart.InvalidForm) as caught:
        multipart.parse(content_type, body)
    assert "b0" not in str(caught.value)


@given(body=st.binary(max_size=200), content_type=st.sampled_from([TYPE, "multipart/form-data", "x"]))
def test_whatever_comes_is_a_form_or_is_refused(body: bytes, content_type: str) -> None:
    try:
        multipart.parse(content_type, b"--xyz\r\n" + body)
    except multipart.InvalidForm as error:
        assert str(error)


@given(
    names=st.lists(st.text("abcdefg_[]", min_size=1, max_size=8), min_size=1, max_size=5),
    value=st.binary(),
)
def test_what_is_written_is_read(names: list[str], value: bytes) -> None:
    if b"--xyz" in value:
        return
    parts = multipart.parse(TYPE, form(*(field(name, value) for name in names)))
    assert [part.name for part in parts] == names
    assert {part.value for part in parts} == {value[:4096].decode("utf-8", "replace")}
