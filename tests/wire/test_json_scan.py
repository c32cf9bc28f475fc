"""Where members and items stand: compared with the json module of Python, at every size of a window."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from asyncproxy.wire import json_scan
from asyncproxy.wire.json_scan import NotAnObject
from asyncproxy.wire.json_text import InvalidText
from tests.growth import lines_run_in

# How far a match looks. The smallest one still holds an escape, and the longest literal with what follows.
WINDOWS = st.sampled_from([8, 9, 13, 40, 64 * 1024])


@contextmanager
def windows_of(size: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_scan, "_WINDOW", size)
        yield


def members(text: bytes) -> list[tuple[bytes, bytes]]:
    spans = (span for span in json_scan.members(text) if span is not None)
    return [(text[a:b], text[c:d]) for a, b, c, d in spans]


def items(text: bytes, start: int = 0) -> tuple[list[bytes], int]:
    """The items of an array, and where it ends."""
    walk = json_scan.spans(text, start)
    found: list[bytes] = []
    while True:
        try:
            span = next(walk)
        except StopIteration as end:
            return found, end.value
        if span is not None:
            assert span[0] == span[1]
            found.append(text[span[2] : span[3]])


def refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def expected(text: bytes) -> list[tuple[str, Any]] | None:
    """The members of the object that the json module reads, or None where it reads none."""
    try:
        found = json.loads(text.decode(), parse_constant=refuse, object_pairs_hook=tuple)
    except ValueError:
        return None
    # An empty object is an empty tuple too, and an array is a list.
    return list(found) if isinstance(found, tuple) else None


def read(text: bytes) -> list[tuple[str, Any]] | None:
    """The same, by the scanner: each name and each value is decoded where it was said to stand."""
    try:
        found = members(text)
    except (InvalidText, NotAnObject):
        return None
    return [(json.loads(name), json.loads(value, object_pairs_hook=tuple)) for name, value in found]


SPACE = st.sampled_from(["", "", "", " ", "\n\t\r "])
NUMBERS = st.sampled_from(["0", "-0", "12", "1.5", "-1e9", "1E-2", "0.10e+3"])
STRINGS = st.lists(
    st.sampled_from(
        ["a", "é", "\U0001f600", '\\"', "\\\\", "\\u0061", "\\ud83d", "\\n", "[", "}", ",", ":"]
    ),
    max_size=6,
).map(lambda parts: '"' + "".join(parts) + '"')
SCALARS = NUMBERS | STRINGS | st.sampled_from(["true", "false", "null"])


def spaced(*parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(*(piece for part in parts for piece in (SPACE, part)), SPACE).map("".join)


def arrays(value: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(spaced(value), max_size=4).flatmap(
        lambda parts: SPACE.map(lambda space: "[" + (",".join(parts) or space) + "]")
    )


def objects(value: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    member = spaced(STRINGS, st.just(":"), value)
    return st.lists(member, max_size=4).flatmap(
        lambda parts: SPACE.map(lambda space: "{" + (",".join(parts) or space) + "}")
    )


VALUES = st.recursive(SCALARS, lambda inner: arrays(inner) | objects(inner), max_leaves=25)


@st.composite
def deep(draw: st.DrawFn) -> str:
    """A value that is nested more deeply than any match takes at once."""
    value = draw(VALUES)
    for _ in range(draw(st.integers(0, 9))):
        before, behind = draw(arrays(SCALARS)), draw(objects(SCALARS))
        value = draw(
            st.sampled_from(
                [
                    f"[{value}]",
                    f"[{before},{value}]",
                    f"[{value} , {behind}]",
                    f'{{"a":{value}}}',
                    f'{{"a" : {before},"b":{value}}}',
                    f'{{"b":{value},"c":{behind} }}',
                ]
            )
        )
    return value


TEXTS = spaced(objects(VALUES | deep())).map(str.encode)

INSERTS = st.sampled_from(
    b'" \\ \\u \\ud8 , : [ ] { } [] {} ,] ,} 0 - . e 1 x tru NaN \xc3 \xa9 \xff \x00 \x0c // :1 ""'.split(
        b" "
    )
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    text = draw(TEXTS)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 3)))
        text = text[:start] + draw(INSERTS | st.just(b"")) + text[end:]
    return text


@given(TEXTS, WINDOWS)
@settings(max_examples=50, deadline=None)
def test_every_member_is_found_where_it_stands(text: bytes, window: int) -> None:
    with windows_of(window):
        found = read(text)
    assert found is not None
    assert found == expected(text)


@given(mutated(), WINDOWS)
@settings(max_examples=80, deadline=None)
@example(b'{"a":1,}', 8)
@example(b'{,"a":1}', 8)
@example(b'{"a" 1}', 8)
@example(b'{"a"::1}', 8)
@example(b'{"a":}', 8)
@example(b'{"a":[1,]}', 8)
@example(b'{"a":[,1]}', 8)
@example(b'{"a":[1 2]}', 8)
@example(b'{"a":[1}', 8)
@example(b'{"a":[[[[[1}]]]]}', 8)
@example(b'{"a":[[[[[1]]]]]]}', 8)
@example(b'{"a":{"b":{"c":{"d":{"e":1}}}}', 8)
@example(b'{"a":{"b":{"c":{"d":{"e":1,}}}}}', 8)
@example(b'{"a":[[[[[1],]]]]}', 8)
@example(b'{"a":01}', 8)
@example(b'{"a":-}', 8)
@example(b'{"a":1.}', 8)
@example(b'{"a":1e}', 8)
@example(b'{"a":12x}', 8)
@example(b'{"a":truex}', 8)
@example(b'{"a":"\\x"}', 8)
@example(b'{"a":"\n"}', 8)
@example(b'{"a":"\\ud83"}', 8)
@example(b'{"a":1}x', 8)
@example(b'{"a":1} {}', 8)
@example(b'{"a":1', 8)
@example(b'{"a"', 8)
@example(b"{", 8)
@example(b"", 8)
@example(b" ", 8)
@example(b"\xef\xbb\xbf{}", 8)
@example(b'{"a":"\xff"}', 8)
@example(b'{"\xc3(":1}', 8)
@example(b'{"a":\x0c1}', 8)
@example(b'{"\\ud83d":"\\ude00"}', 8)
def test_it_agrees_with_the_json_module_on_broken_texts(text: bytes, window: int) -> None:
    with windows_of(window):
        found = read(text)
    assert found == expected(text)


@given(st.lists(VALUES | deep(), max_size=6), st.text(max_size=3), WINDOWS)
@settings(max_examples=40, deadline=None)
def test_every_item_is_found_where_it_stands(values: list[str], before: str, window: int) -> None:
    texts = [value.encode() for value in values]
    array = b"[" + b" ,\n".join(texts) + b"]"
    start = len(before.encode())
    with windows_of(window):
        found, end = items(before.encode() + array + b", and so on", start)
    assert found == texts
    assert end == start + len(array)


def test_only_an_object_has_members() -> None:
    for text in (b"[]", b'"a"', b"1", b"null", b" x"):
        with pytest.raises(NotAnObject):
            members(text)
    with pytest.raises(InvalidText):
        items(b'"a"')


def test_a_message_says_where_and_holds_none_of_the_text() -> None:
    for text, match in (
        (b'{"a":s3cret}', "no value at byte 5"),
        (b'{"a":[[[[[s3cret]]]]]}', "no value at byte 10"),
        (b'{"a":1 "s3cret":2}', "no comma or closing bracket at byte 7"),
        (b'{"a":"\xff"}', "invalid UTF-8 at byte 6"),
        (b'{"a":"s3cret', "no value|it ends too early"),
        (b"  ", "it is empty"),
    ):
        with pytest.raises(InvalidText, match=match) as caught:
            members(text)
        assert "s3c" not in str(caught.value)


def test_nesting_has_a_limit() -> None:
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}"), (b'[1,{"a":', b"}]")):
        for depth in (300, 499):
            text = b'{"a":' + opening * depth + b"1" + closing * depth + b"}"
            assert len(members(text)) == 1
        with pytest.raises(InvalidText, match="nested too deeply"):
            members(b'{"a":' + opening * 100_000)


def test_a_number_has_a_limit() -> None:
    assert len(members(b'{"a":' + b"1" * 250_000 + b"}")) == 1
    with pytest.raises(InvalidText):
        members(b'{"a":' + b"1" * 300_000 + b"}")


KIB = 1024


def hostile(size: int) -> Iterator[tuple[str, bytes]]:
    """Bodies of about ``size`` bytes: deep, flat, endless, cut off."""
    for name, unit in {
        "numbers": b"1,",
        "strings": b'"a",',
        "escapes": b'"\\u0061",',
        "empty": b"[],{},",
        "four deep": b"[[[[]]]],",
        "eight deep": b"[[[[[[[[1]]]]]]]],",
        "deep objects": b'{"a":{"a":{"a":{"a":{"a":1}}}}},',
        "deep, and wide": b"[1,[1,[1,[1,[1,[1,[1]]]]]]],",
        "steps down": b"[[[[[1],1],1],1],1],",
        "900 deep": b"[" * 900 + b"]" * 900 + b",",
        "spaced": b"[ [ [ [ [ 1 ] ] ] ] ] , ",
    }.items():
        repeated = unit * (size // len(unit))
        yield name, b'{"a":[' + repeated + b"1]}"
        yield name + ", without an end", b'{"a":[' + repeated
    yield "members", b"{" + b'"a":1,' * (size // 6) + b'"b":1}'
    yield "one string", b'{"a":"' + b"x" * size + b'"}'
    yield "one name", b'{"' + b"\\n" * (size // 2) + b'":1}'
    yield "a string without an end", b'{"a":"' + b"x" * size
    yield "spaces", b"{" + b" " * size + b"}"
    yield "spaces between", b'{"a"' + b" " * size + b":[[[[[" + b" " * size + b"1]]]]]}"
    yield "quotes", b'{"a":' + b'"' * size
    yield "brackets", b'{"a":' + b"[" * size
    yield "colons", b'{"a"' + b":" * size


SMALL, LARGE = dict(hostile(8 * KIB)), dict(hostile(16 * KIB))


@pytest.mark.parametrize("window", [40, 64 * KIB])
@pytest.mark.parametrize("name", SMALL)
def test_the_walk_grows_with_the_text_whatever_it_is(name: str, window: int) -> None:
    steps = []
    for text in (SMALL[name], LARGE[name]):
        with windows_of(window), lines_run_in(json_scan) as count, suppress(InvalidText):
            members(text)
        steps.append(count())
    assert steps[1] <= 3 * steps[0] + 100
    assert steps[1] <= 20 * len(LARGE[name])


HUGE = dict(hostile(1024 * KIB))


@pytest.mark.parametrize("name", HUGE)
def test_a_pause_is_due_before_much_was_done(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As counted in rounds, and in bytes that were passed."""
    walks: list[json_scan._Walk] = []
    rounds = 0

    class Counted(json_scan._Walk):
        __slots__ = ()

        def __init__(self, text: bytes, start: int) -> None:
            super().__init__(text, start)
            walks.append(self)

        def round(self) -> json_scan.Span | None:
            nonlocal rounds
            rounds += 1
            return super().round()

    monkeypatch.setattr(json_scan, "_Walk", Counted)
    pauses = 0
    passed, done = 0, 0
    with suppress(InvalidText):
        for span in json_scan.spans(HUGE[name]):
            if span is None:
                pauses += 1
                assert rounds - done <= 1024
                assert walks[0].at - passed <= 64 * KIB + 256 * KIB
                passed, done = walks[0].at, rounds
    assert rounds - done <= 1024
    assert pauses >= len(walks) * walks[0].at // (256 * KIB)
