"""The fields of a multipart form: read as they are written, refused when they are not a form."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncproxy.wire import multipart
from asyncproxy.wire.multipart import Field
from asyncproxy.wire.steps import at_once
from tests.growth import lines_run_in

TYPE = "multipart/form-data; boundary=xyz"


def form(*parts: bytes, end: bytes = b"--xyz--\r\n") -> bytes:
    return b"".join(b"--xyz\r\n" + part + b"\r\n" for part in parts) + end


def field(name: str, value: bytes, filename: str | None = None) -> bytes:
    extra = f'; filename="{filename}"' if filename is not None else ""
    return f'Content-Disposition: form-data; name="{name}"{extra}\r\n\r\n'.encode() + value


def parse(content_type: str, body: bytes) -> list[Field]:
    return at_once(multipart.parse(content_type, body))


def read(content_type: str, body: bytes) -> list[tuple[str, str, str | None]]:
    """The parts of a form without their places."""
    return [(part.name, part.value, part.filename) for part in parse(content_type, body)]


def test_fields_and_files_in_their_order() -> None:
    body = form(field("model", b"m"), field("file", b"\x00\xff\r\n--x", "a.mp3"), field("model", b"n"))
    assert read(TYPE, body) == [
        ("model", "m", None),
        ("file", "\x00\ufffd\r\n--x", "a.mp3"),
        ("model", "n", None),
    ]


def test_a_part_says_where_it_stands() -> None:
    first, second = field("model", b"m"), field("file", b"\r\n\r\n", "a.mp3")
    body = form(first, second)
    one, two = parse(TYPE, body)
    assert (body[one.content : one.end], body[two.content : two.end]) == (b"m", b"\r\n\r\n")
    assert (body[one.start : one.end], body[two.start : two.end]) == (b"\r\n" + first, b"\r\n" + second)


def test_the_last_line_may_lack_its_end() -> None:
    assert read(TYPE, form(field("a", b"b"), end=b"--xyz--")) == [("a", "b", None)]


def test_what_stands_behind_the_last_boundary_is_no_part_of_it() -> None:
    body = form(field("a", b"b"), end=b"--xyz--\r\nan epilogue\r\n--xyz\r\n")
    assert read(TYPE, body) == [("a", "b", None)]


def test_an_empty_line_may_stand_first() -> None:
    assert read(TYPE, b"\r\n" + form(field("a", b"b"))) == [("a", "b", None)]


@pytest.mark.parametrize(
    ("disposition", "name", "filename"),
    [
        (b'form-data; name="a"; filename="x;y.mp3"', "a", "x;y.mp3"),
        (b"form-data; name=a", "a", None),
        (b"FORM-DATA ;  Name = a ; filename=two words.mp3 ", "a", "two words.mp3"),
        (b'form-data; name="say \\"a\\""; filename="C:\\\\x"', 'say "a"', "C:\\x"),
        (b'form-data; name="a"; filename="\xc3\xa9"; filename*=UTF-8\'\'%65', "a", "é"),
        (b'form-data; name="a";', "a", None),
        (b'form-data; name=""', "", None),
        (b'form-data; name="a"; filename="C:\\"', "a", "C:\\"),
        (b'form-data; name="a\\\\"', "a\\", None),
    ],
)
def test_names_as_clients_write_them(disposition: bytes, name: str, filename: str | None) -> None:
    body = form(b"Content-Disposition: " + disposition + b"\r\nContent-Type: text/plain\r\n\r\nb")
    assert read(TYPE, body) == [(name, "b", filename)]


@pytest.mark.parametrize(
    "head",
    [
        b'Content-Disposition: form-data; name="a"; name="b"',
        b'Content-Disposition: form-data; name="a"\r\nContent-Disposition: form-data; name="b"',
        b'Content-Disposition: form-data; name="a',
        b'Content-Disposition: form-data; name="a"b',
        b'Content-Disposition: form-data; name="a\\"; filename="b"',
        b'Content-Disposition: form-data; name=a"b',
        b'Content-Disposition: form-data, name="a"',
        b'Content-Disposition: form-data;\r\n name="a"',
        b'Content-Disposition: form-data; name="a"\nX: y',
        b'Content-Disposition : form-data; name="a"',
        b'Content-Disposition: form-data; name="a"\r\nno field',
        b'X\0: y\r\nContent-Disposition: form-data; name="a"',
    ],
)
def test_what_two_parsers_could_read_in_two_ways_is_refused(head: bytes) -> None:
    with pytest.raises(multipart.InvalidForm):
        parse(TYPE, form(head + b"\r\n\r\nb"))


def test_a_part_cannot_begin_with_the_boundary() -> None:
    """Some parsers look at lines: to them, the part would be empty, and another one would begin."""
    with pytest.raises(multipart.InvalidForm):
        parse(TYPE, form(field("a", b"--xyz\r\n" + field("model", b"m"))))


@pytest.mark.parametrize("behind", [b" \r\n", b"\n", b"x\r\n", b"-\r\n", b"\r", b""])
def test_a_boundary_is_a_line_of_its_own(behind: bytes) -> None:
    first = b"--xyz\r\n" + field("a", b"b") + b"\r\n"
    with pytest.raises(multipart.InvalidForm):
        parse(TYPE, first + b"--xyz" + behind + field("model", b"m") + b"\r\n--xyz--\r\n")


def test_only_the_beginning_of_a_value_is_kept() -> None:
    (part,) = parse(TYPE, form(field("file", b"x" * 1_000_000, "a")))
    assert part.value == "x" * 4096


@pytest.mark.parametrize(
    "content_type", [TYPE, 'multipart/form-data; boundary="xyz"', TYPE + "; charset=utf-8"]
)
def test_the_boundary_may_be_quoted(content_type: str) -> None:
    assert read(content_type, form(field("a", b"b"))) == [("a", "b", None)]


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
        (TYPE + ";" * 1024, form(field("a", b"b"))),
        (TYPE + "; boundary=b", form(field("a", b"b"))),
        (TYPE + "z" * 200, form(field("a", b"b")).replace(b"xyz", b"xyz" + b"z" * 200)),
        (TYPE, form(field("a" * 8192, b"b"))),
    ],
)
def test_what_is_no_form(content_type: str, body: bytes) -> None:
    with pytest.raises(multipart.InvalidForm) as caught:
        parse(content_type, body)
    assert "b0" not in str(caught.value)


@given(body=st.binary(max_size=200), content_type=st.sampled_from([TYPE, "multipart/form-data", "x"]))
def test_whatever_comes_is_a_form_or_is_refused(body: bytes, content_type: str) -> None:
    try:
        parse(content_type, b"--xyz\r\n" + body)
    except multipart.InvalidForm as error:
        assert str(error)


@given(
    names=st.lists(st.text("abcdefg_[]", min_size=1, max_size=8), min_size=1, max_size=5),
    value=st.binary(),
)
def test_what_is_written_is_read(names: list[str], value: bytes) -> None:
    if b"--xyz" in value:
        return
    parts = parse(TYPE, form(*(field(name, value) for name in names)))
    assert [part.name for part in parts] == names
    assert {part.value for part in parts} == {value[:4096].decode("utf-8", "replace")}


MIB = 1024 * 1024
HEAD = b"Content-Disposition: form-data; name=a\r\n\r\n"

# A mebibyte of what is nearly a boundary, or a form without an end.
HOSTILE = {
    "spaces": (" ", b" " * MIB),
    "one character, in each line": ("b", b"--b\r\n" + HEAD + b"\r\n--c" * (MIB // 5)),
    "all but the last character": (
        "b" * 70,
        b"--" + b"b" * 70 + b"\r\n" + HEAD + b"\r\n--" + b"b" * MIB,
    ),
    "half boundaries": ("xyz", b"--xyz\r\n" + HEAD + b"\r\n--xy" * (MIB // 6)),
    "line feeds": ("xyz", b"\r\n" * (MIB // 2)),
    "empty parts": ("b", (b"--b\r\n" + HEAD + b"\r\n") * (MIB // 50)),
    "a head of short lines": ("b", b"--b\r\n" + b"a:\r\n" * (MIB // 4)),
    "semicolons": (
        "b",
        (b"--b\r\nContent-Disposition: " + b";" * 8000 + b"\r\n\r\n\r\n") * (MIB // 8050),
    ),
    "escapes": ("b", b'--b\r\nContent-Disposition: form-data; name="' + b"\\a" * 4000 + b"\r\n\r\n"),
    "a large file": ("xyz", form(field("file", bytes(MIB), "a"))),
}


@pytest.mark.parametrize(("boundary", "body"), HOSTILE.values(), ids=HOSTILE.keys())
def test_the_work_grows_with_the_bytes_whatever_they_are(boundary: str, body: bytes) -> None:
    content_type = f'multipart/form-data; boundary="{boundary}"'
    steps = []
    for text in (body[: len(body) // 2], body):
        with lines_run_in(multipart) as count, contextlib.suppress(multipart.InvalidForm):
            parse(content_type, text)
        steps.append(count())
    assert steps[1] <= 3 * steps[0]
    assert steps[1] < 100_000
