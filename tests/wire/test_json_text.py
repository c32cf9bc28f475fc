"""JSON text or not: the same verdict as the json module, with no NaN and no guessed encodings."""

from __future__ import annotations

import json
from typing import Any, NoReturn

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from asyncproxy.wire import json_text

ANY = msgspec.json.Decoder()
NUMBER = msgspec.json.Decoder(int)


def refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def is_json(text: bytes) -> bool:
    """What the json module says, kept to RFC 8259: UTF-8 without a mark, and no NaN."""
    try:
        json.loads(text.decode(), parse_constant=refuse, parse_int=str, parse_float=str)
    except ValueError:  # UnicodeDecodeError and JSONDecodeError too
        return False
    return True


def accepts(text: bytes) -> bool:
    try:
        json_text.check(text)
    except json_text.InvalidText:
        return False
    return True


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()  # NaN and infinities too
    | st.text(st.characters(codec="utf-8"))
    | st.text(st.characters(categories=["Cs"]) | st.characters(max_codepoint=127), max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)

PRINTED = st.builds(
    lambda value, ascii_only, indent: json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode(
        "utf-8", "surrogatepass"
    ),
    VALUES,
    st.booleans(),
    st.sampled_from([None, 1]),
)

INSERTS = st.binary(max_size=3) | st.sampled_from(
    b'" \\ \\u \\ud83d , : [ } NaN 0 - . e \xc3 \xef\xbb\xbf \x00 \x0c // true \xed\xa0\x80'.split(b" ")
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """JSON text with a few pieces cut out, put in or moved."""
    text = draw(PRINTED)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 4)))
        text = text[:start] + draw(INSERTS) + text[end:]
    return text


@given(PRINTED)
@settings(max_examples=100, deadline=None)
def test_it_agrees_with_the_json_module_on_what_that_prints(text: bytes) -> None:
    assert accepts(text) == is_json(text)


@given(mutated() | st.binary(max_size=8))
@example(b"")
@example(b" ")
@example(b"\xef\xbb\xbf{}")
@example(b"-")
@example(b"-0")
@example(b"01")
@example(b"1e999")
@example(b"1E+1")
@example(b'"\x7f"')
@example(b'"\xff"')
@example(b'{"a":1,"a":2}')
@example(b"[1,]")
@example(b'{"a":1,}')
@example(b'"\\ud83d" x')
@example(b'["\\ud83d", "\x01\x01"]')
@example(b'["\\ud83d", "\x01"]')
@example(b'["\\ud83d"\x01\x01]')
@example(b'["\\ud83d\\ude00", "\\ude00\\ud83d", "\\\\ud83d"]')
@example(b'"\\ud83d\xff"')
@settings(max_examples=300, deadline=None)
def test_it_agrees_with_the_json_module_on_broken_texts(text: bytes) -> None:
    assert accepts(text) == is_json(text)


@given(st.lists(st.sampled_from([b"\\ud83d", b"\\ude00", b"\\", b"\\\\", b"u", b"d83d", b'"', b"a"])))
@settings(max_examples=200, deadline=None)
def test_it_agrees_with_the_json_module_on_escapes(pieces: list[bytes]) -> None:
    text = b'"' + b"".join(pieces) + b'"'
    assert accepts(text) == is_json(text)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=12,
    )
)
@settings(max_examples=150, deadline=None)
def test_it_decodes_what_the_json_module_prints(value: Any) -> None:
    assert json_text.parse(json.dumps(value).encode(), ANY) == value


def test_half_a_surrogate_pair_is_read_as_a_replacement_character() -> None:
    assert json_text.parse(b'"a\\ud83d"', ANY) == "a\ufffd"
    assert json_text.parse(b'"a\\uDE00b"', ANY) == "a\ufffdb"


def test_a_whole_pair_beside_half_a_pair_keeps_its_meaning() -> None:
    assert json_text.parse(b'["\\ud83d\\ude00","\\ud83d"]', ANY) == ["\U0001f600", "\ufffd"]


def test_an_escaped_backslash_before_half_a_pair_is_no_escape() -> None:
    assert json_text.parse(b'["\\\\ud83d","\\ud83d"]', ANY) == ["\\ud83d", "\ufffd"]


ESCAPES = [b"\\ud83d", b"\\ude00", b"\\uD8", b"\\\\", b"\\n", b"\\u0041", b"d83d", b"a", b'"', b"\\"]


@given(st.lists(st.sampled_from(ESCAPES), max_size=14).map(b"".join), st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_half_a_pair_is_found_wherever_the_windows_end(text: bytes, window: int) -> None:
    whole = json_text.without_half_pairs(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_text, "_WINDOW", window)
        assert json_text.without_half_pairs(text) == whole


def test_text_of_another_type_than_the_decoder_s_is_told_from_text_that_is_not_json() -> None:
    with pytest.raises(msgspec.ValidationError):
        json_text.parse(b'["a"]', NUMBER)
    for text in (b'["a"', b'["a"] x', b'["\xff"]', b"[" * 10_000, b"[NaN]"):
        with pytest.raises(json_text.InvalidText):
            json_text.parse(text, NUMBER)


@pytest.mark.parametrize("depth", [10_000, 1_000_000])
def test_deep_nesting_is_refused_and_not_fatal(depth: int) -> None:
    for text in (b"[" * depth + b"]" * depth, b"[" * depth, b'{"a":' * depth):
        with pytest.raises(json_text.InvalidText, match="nested too deeply"):
            json_text.check(text)


def test_the_message_says_where_and_holds_none_of_the_text() -> None:
    with pytest.raises(json_text.InvalidText, match="byte 11") as caught:
        json_text.check(b'["s3cret", s3cret]')
    assert "s3c" not in str(caught.value)
    with pytest.raises(json_text.InvalidText, match="invalid UTF-8 at byte 3"):
        json_text.check(b'["a\xff"]')
    with pytest.raises(json_text.InvalidText, match="empty"):
        json_text.check(b" \n")


def arrived(text: bytes, piece_bytes: int, step_bytes: int) -> tuple[bool, int]:
    """Whether a text that came in pieces was found to be JSON meanwhile, and in how many steps."""
    arriving = json_text.Arriving(step_bytes)
    steps = 0
    for start in range(0, len(text), piece_bytes):
        if arriving.add(text[start : start + piece_bytes]):
            arriving.step()
            steps += 1
    return arriving.end(), steps


@given(st.one_of(PRINTED, mutated()), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=400, deadline=None)
@example(b"[,1,2,3,4]", 2, 1)
@example(b'{,"a":1}', 2, 1)
@example(b"1,2,3,4", 2, 1)
@example(b"[1,2,,3,4,5]", 3, 2)
@example(b"[1,2,3,4,5,]", 3, 2)
@example(b'{"a":1,2,"b":3,"c":4}', 5, 2)
@example(b'["a":1,"b":2,"c":3]', 5, 2)
@example(b'[["a,b","[",3],{"c":"}"},4]', 4, 2)
@example(b'{"a":"b,"":0,"c":1}', 6, 2)
@example(b'["\\",",1,2]', 3, 2)
@example(b"[1,2,3},4,5,6]", 3, 2)
@example(b"[1,2,3]]", 3, 2)
def test_what_is_found_to_be_json_as_it_arrives_is_json(
    text: bytes, piece_bytes: int, step_bytes: int
) -> None:
    valid = True
    try:
        json_text.check(text)
    except json_text.InvalidText:
        valid = False
    found, _ = arrived(text, piece_bytes, step_bytes)
    assert valid or not found


@pytest.mark.parametrize(
    "value",
    [
        {"data": [{"index": n, "embedding": [0.5, -0.25, 1e-9] * 10} for n in range(100)]},
        {
            "data": [{"index": n, "embedding": "AAAAPwAAgD4=" * 10} for n in range(100)],
            "usage": {"a": 1},
        },
        [[n, [n]] for n in range(1000)],
    ],
)
def test_what_an_embeddings_api_answers_is_checked_as_it_arrives(value: Any) -> None:
    text = json.dumps(value).encode()
    found, steps = arrived(text, 250, 500)
    assert found
    assert steps >= len(text) // 750 - 1


def test_strings_larger_than_a_piece_do_not_keep_it_from_being_checked() -> None:
    text = json.dumps(["x" * 900] * 50).encode()
    found, steps = arrived(text, 250, 500)
    assert found
    assert steps > 10


def test_a_text_without_a_comma_is_not_searched_again_and_again() -> None:
    found, steps = arrived(b'["' + b"x" * 100_000 + b'",1,2,3]', 100, 200)
    assert not found  # its one comma came after all steps
    assert steps < 20


@pytest.mark.parametrize(
    "text", [b'["a,b,c,d,e,f,g,h"]', b'["\\"", [1,2,3,4,5,6,7,8]]', bytes(range(256))]
)
def test_what_cannot_be_told_in_steps_is_left_open(text: bytes) -> None:
    assert arrived(text, 4, 8)[0] is False


def test_a_small_text_is_left_to_the_check() -> None:
    assert arrived(b"[1,2,3,4,5]", 3, 100) == (False, 0)
