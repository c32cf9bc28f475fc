"""What is checked before a job exists: hostile bodies, content types and lifetimes."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from asyncproxy.core.endpoints import ENDPOINTS, Endpoint
from asyncproxy.core.errors import (
    ApiError,
    InvalidForm,
    InvalidJson,
    InvalidType,
    MissingParameter,
    StreamingNotSupported,
    UnsupportedMediaType,
)
from asyncproxy.wire import body_fields, preferences, submission
from asyncproxy.wire.steps import at_once
from asyncproxy.wire.submission import Submission, count_inputs

EMBEDDINGS = ENDPOINTS["embeddings"]
CHAT = ENDPOINTS["chat/completions"]
TRANSCRIPTIONS = ENDPOINTS["audio/transcriptions"]
SPEECH = ENDPOINTS["audio/speech"]


def with_extra(extra: bytes) -> bytes:
    return b'{"model":"m","input":"hello","extra":' + extra + b"}"


def check_json(endpoint: Endpoint, body: bytes) -> str:
    """The model that a JSON body is found to ask for."""
    return submission.check(endpoint, "application/json", body).model


def test_the_model_is_given_back() -> None:
    assert check_json(EMBEDDINGS, b'{"model":"m","input":"hello"}') == "m"
    assert check_json(CHAT, b' {"messages": [], "model" : "a/b:c" }\r\n') == "a/b:c"


MALFORMED = {
    "empty": b"",
    "white space": b" \r\n\t",
    "two byte order marks": b'\xef\xbb\xbf\xef\xbb\xbf{"model":"m","input":"x"}',
    "UTF-16": '{"model":"m","input":"x"}'.encode("utf-16-le"),
    "no JSON": b"model=m&input=x",
    "single quotes": b"{'model':'m','input':'x'}",
    "trailing comma": b'{"model":"m","input":"x",}',
    "trailing comma in an array": with_extra(b"[1,]"),
    "trailing text": b'{"model":"m","input":"x"} {}',
    "comment": b'{"model":"m","input":"x"/* */}',
    "name without quotes": b'{model:"m","input":"x"}',
    "control character": with_extra(b'"\x00"'),
    "line feed in a string": with_extra(b'"a\nb"'),
    "unknown escape": with_extra(b'"\\x41"'),
    "short escape": with_extra(b'"\\u00g0"'),
    "NaN": with_extra(b"NaN"),
    "nested NaN": with_extra(b'[{"a":NaN}]'),
    "Infinity": with_extra(b"Infinity"),
    "-Infinity": with_extra(b"-Infinity"),
    "NaN as the input": b'{"model":"m","input":NaN}',
    "leading zero": with_extra(b"01"),
    "plus": with_extra(b"+1"),
    "bare point": with_extra(b"1."),
    "True": with_extra(b"True"),
    "invalid UTF-8 in the model": b'{"model":"\xff","input":"x"}',
    "invalid UTF-8 in the input": b'{"model":"m","input":"\xff"}',
    "invalid UTF-8 in a skipped string": with_extra(b'["a",{"b":"\xc3"}]'),
    "invalid UTF-8 in a skipped name": b'{"model":"m","input":"x","\xc3\x28":1}',
    "overlong UTF-8": with_extra(b'"\xc0\xaf"'),
    "a surrogate in UTF-8": with_extra(b'"\xed\xa0\x80"'),
    "invalid UTF-8 outside of strings": b'{"model":"m","input":"x"\xff}',
    "half a surrogate pair, and control characters": b'{"model":"m","input":"\\ud83d \x01\x01"}',
    "half a surrogate pair, and garbage": b'{"model":"m","input":"\\ud83d",]',
    "array, and garbage": b"[1, 2",
    "a wrong type, and garbage": b'"text" x',
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_json_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidJson) as caught:
        check_json(EMBEDDINGS, body)
    assert caught.value.status == 400
    assert caught.value.code == "invalid_json"


def test_json_that_ends_early_is_refused_wherever_it_ends() -> None:
    body = '{"model": "m", "input": ["é", 1.5e3, {"a": [true, null]}], "x": "\\ud83d\\ude00"}'.encode()
    assert check_json(EMBEDDINGS, body) == "m"
    for end in range(len(body)):
        with pytest.raises(InvalidJson):
            check_json(EMBEDDINGS, body[:end])


DEEP = {
    "arrays": b"[" * 10_000 + b"]" * 10_000,
    "objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "never closed": b"[" * 10_000,
    "in an unknown field": with_extra(b"[" * 10_000 + b"]" * 10_000),
    "in the input": b'{"model":"m","input":' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "in the model": b'{"input":"x","model":' + b"[" * 10_000 + b"]" * 10_000 + b"}",
}


@pytest.mark.parametrize("body", DEEP.values(), ids=DEEP.keys())
def test_ten_thousand_nested_brackets_are_refused(body: bytes) -> None:
    with pytest.raises(InvalidJson):
        check_json(EMBEDDINGS, body)
    assert body_fields.model_of(body) is None


def test_no_depth_of_nesting_is_an_error_of_ours() -> None:
    """Two parsers look at a body with a nested ``model``: neither's limit may get out."""
    for depth in range(850, 1050):
        body = b'{"input":{"model":1},"model":"m","x":' + b"[" * depth + b"]" * depth + b"}"
        with contextlib.suppress(InvalidJson):
            assert check_json(EMBEDDINGS, body) == "m"


@pytest.mark.parametrize(
    "body", [b"[]", b'[{"model":"m","input":"x"}]', b'"m"', b"1", b"null", b"true"]
)
def test_json_that_is_not_an_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidType) as caught:
        check_json(EMBEDDINGS, body)
    assert caught.value.status == 400
    assert caught.value.code == "invalid_type"


@pytest.mark.parametrize("value", [None, b"null", b'""'])
def test_a_missing_or_empty_model_is_named(value: bytes | None) -> None:
    field = b"" if value is None else b'"model":' + value + b","
    with pytest.raises(MissingParameter) as caught:
        check_json(EMBEDDINGS, b"{" + field + b'"input":"x"}')
    assert caught.value.param == "model"
    assert caught.value.code == "missing_required_parameter"


@pytest.mark.parametrize("value", [b"1", b"0", b"false", b"true", b"[]", b'["m"]', b"{}", b"1.5"])
def test_a_model_that_is_not_a_string_is_named(value: bytes) -> None:
    with pytest.raises(InvalidType) as caught:
        check_json(EMBEDDINGS, b'{"input":"x","model":' + value + b"}")
    assert caught.value.param == "model"


@pytest.mark.parametrize("given_input", [None, b"null", b'""', b"[]", b"{}"])
def test_embeddings_need_an_input(given_input: bytes | None) -> None:
    field = b"" if given_input is None else b',"input":' + given_input
    body = b'{"model":"m"' + field + b"}"
    with pytest.raises(MissingParameter) as caught:
        check_json(EMBEDDINGS, body)
    assert caught.value.param == "input"
    assert check_json(CHAT, body) == "m"  # no other endpoint has to have one


def test_embeddings_of_a_conversation_need_no_input() -> None:
    """vLLM takes `messages` in its place."""
    for extra in (b"", b',"fallbacks":[]'):
        assert (
            check_json(EMBEDDINGS, b'{"model":"m","messages":[{"role":"user"}]' + extra + b"}") == "m"
        )
        assert check_json(EMBEDDINGS, b'{"model":"m","input":[],"messages":[1]' + extra + b"}") == "m"
        with pytest.raises(MissingParameter) as caught:
            check_json(EMBEDDINGS, b'{"model":"m","messages":[]' + extra + b"}")
        assert caught.value.param == "input"


@pytest.mark.parametrize("given_input", [b'"x"', b'[""]', b"[1,2]", b"0", b'{"a":1}', b"[[1],[2]]"])
def test_what_an_input_holds_is_for_the_upstream_to_judge(given_input: bytes) -> None:
    assert check_json(EMBEDDINGS, b'{"model":"m","input":' + given_input + b"}") == "m"


# What stands under a name of ours twice, spelled in ways that parsers read alike.
REPEATED = {
    "model": b'{"model":"m","input":"x","model":"other"}',
    "the same model": b'{"model":"m","input":"x","model":"m"}',
    "input": b'{"model":"m","input":"x","input":"y"}',
    "stream": b'{"model":"m","input":"x","stream":false,"stream":false}',
    "stream_format": b'{"model":"m","input":"x","stream_format":"a","stream_format":"a"}',
    "escaped letter": b'{"model":"m","input":"x","\\u006dodel":"other"}',
    "escaped letter first": b'{"mode\\u006c":"m","input":"x","model":"other"}',
    "escaped capital hex": b'{"model":"m","input":"x","m\\u006Fdel":"other"}',
    "all letters escaped": b'{"model":"m","input":"x","\\u006d\\u006f\\u0064\\u0065\\u006c":"other"}',
    "escaped stream": b'{"model":"m","input":"x","stream":false,"\\u0073\\u0074ream":false}',
    "escaped underscore": b'{"model":"m","input":"x","stream_format":"a","stream\\u005fformat":"a"}',
    "escaped input": b'{"model":"m","inp\\u0075t":"x","input":"y"}',
    "space around": b'{"model":"m","input":"x", "model"\t:"other"}',
    "far apart": b'{"model":"m","input":"' + b"x" * 100_000 + b'","model":"other"}',
}


@pytest.mark.parametrize("body", REPEATED.values(), ids=REPEATED.keys())
def test_a_field_of_ours_that_stands_there_twice_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidJson) as caught:
        check_json(EMBEDDINGS, body)
    assert caught.value.param in {"model", "input", "stream", "stream_format"}
    assert f"`{caught.value.param}`" in caught.value.message


HARMLESS = {
    "nested model": b'{"model":"m","input":"x","extra":{"model":"other"}}',
    "nested twice": b'{"model":"m","input":"x","extra":{"model":"a","model":"b"}}',
    "nested in an array": b'{"model":"m","input":[{"input":1,"model":2},{"input":1}]}',
    "nested stream": b'{"model":"m","input":"x","tools":[{"stream":true},{"stream":true}]}',
    "as a value": b'{"model":"m","input":"model","extra":["model","model","stream","stream"]}',
    "unknown field twice": b'{"model":"m","input":"x","extra":1,"extra":2}',
    "in a string": b'{"model":"m","input":"{\\"model\\":1,\\"model\\":2}"}',
    "other letter case": b'{"model":"m","input":"x","Model":"other","MODEL":"other"}',
    "escapes elsewhere": b'{"model":"m","input":"\\u006dodel \\u0061\\u005f\\u0075"}',
    "escaped once": b'{"\\u006dodel":"m","input":"x"}',
    "beside an escape": b'{"model":"m","input":"\\u0061","extra":{"\\u006dodel":1}}',
}


HARMLESS["in a name, behind an escaped quote"] = b'{"model":"m","input":"x","a \\"model":1}'
HARMLESS["in an input, before a colon"] = b'{"model":"m","input":"say \\"model\\": then \\"model\\":"}'


@pytest.mark.parametrize("body", HARMLESS.values(), ids=HARMLESS.keys())
def test_repetitions_that_cannot_mislead_pass(body: bytes) -> None:
    assert check_json(EMBEDDINGS, body) == "m"


def test_a_quote_in_a_name_does_not_hide_a_repetition() -> None:
    body = b'{"a \\"model":1,"model":"m","model":"other","input":"x"}'
    assert json.loads(body)["model"] == "other"
    with pytest.raises(InvalidJson) as caught:
        check_json(EMBEDDINGS, body)
    assert caught.value.param == "model"


def test_the_verdict_on_another_letter_case_does_not_depend_on_the_rest() -> None:
    """Names differ by their case (RFC 8259 compares them exactly), whatever else a body holds."""
    for extra in (b"1", b'"\\u0061"', b'{"model":1}'):
        body = b'{"model":"m","input":"x","Model":"other","extra":' + extra + b"}"
        assert check_json(EMBEDDINGS, body) == "m"


NAMES = ["model", "input", "stream", "a", 'a "model', '"model"', "model\\", "\\", 'x":"model', "model:"]


@st.composite
def spelled(draw: st.DrawFn, names: st.SearchStrategy[str]) -> str:
    """A string of JSON, with letters of it escaped at random."""
    letters = []
    for letter in draw(names):
        if draw(st.integers(0, 7)) == 0:
            code = f"\\u{ord(letter):04x}"
            letters.append(draw(st.sampled_from([code, "\\u" + code[2:].upper()])))
        else:
            letters.append(json.dumps(letter, ensure_ascii=False)[1:-1])
    return '"' + "".join(letters) + '"'


def objects(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    colon = st.sampled_from([":", " : ", "\n:"])
    pair = st.tuples(spelled(st.sampled_from(NAMES)), colon, values).map("".join)
    return st.lists(pair, max_size=4).map(lambda pairs: "{" + ",".join(pairs) + "}")


SPELLED_VALUES = st.recursive(
    st.sampled_from(["1", "null"]) | spelled(st.sampled_from(NAMES)),
    lambda inner: st.lists(inner, max_size=3).map(lambda v: "[" + ",".join(v) + "]") | objects(inner),
    max_leaves=6,
)


@given(objects(SPELLED_VALUES))
@settings(
    max_examples=200, deadline=None, report_multiple_bugs=False, phases=set(Phase) - {Phase.shrink}
)
def test_exactly_the_repetitions_that_a_parser_sees_are_refused(text: str) -> None:
    body = '{"model":"m","input":"x",' + text[1:] if len(text) > 2 else '{"model":"m","input":"x"}'
    names = [name for name, _ in json.loads(body, object_pairs_hook=list)]
    repeated = {
        name for name in names if name in ("model", "input", "stream") and names.count(name) > 1
    }
    try:
        found = check_json(EMBEDDINGS, body.encode())
    except InvalidJson as error:
        assert error.param in repeated
    else:
        assert not repeated
        assert found == "m"


def test_a_number_with_very_many_digits_is_for_the_upstream_to_judge() -> None:
    digits = b"1" * 10_000
    assert check_json(EMBEDDINGS, with_extra(digits)) == "m"
    # The same where the search for repetitions reads the body again.
    assert check_json(EMBEDDINGS, with_extra(b'[{"model":1},' + digits + b"]")) == "m"


def test_a_number_out_of_the_range_of_floats_is_for_the_upstream_to_judge() -> None:
    assert check_json(EMBEDDINGS, with_extra(b"[1e999,-1e999,1e-999]")) == "m"


@pytest.mark.parametrize(
    "text", [b"\\ud83d", b"\\uDE00", b"\\ud83d\\ud83d", b"\\ude00\\ud83d", b"x\\uD800x", b"\\ud83d\\n"]
)
def test_half_a_surrogate_pair_is_accepted(text: bytes) -> None:
    assert check_json(EMBEDDINGS, b'{"model":"m","input":"' + text + b'"}') == "m"
    assert check_json(EMBEDDINGS, with_extra(b'{"' + text + b'":"' + text + b'"}')) == "m"
    assert body_fields.model_of(with_extra(b'"' + text + b'"')) == "m"


def test_half_a_surrogate_pair_elsewhere_does_not_change_the_model() -> None:
    body = b'{"model":"\\ud83d\\ude00","input":"cut \\ud83d"}'
    assert check_json(EMBEDDINGS, body) == "\U0001f600"
    body = b'{"model":"a\\\\ud83d","input":"cut \\ud83d"}'
    assert check_json(EMBEDDINGS, body) == "a\\ud83d"


def test_a_stream_is_refused() -> None:
    for body in (b'{"model":"m","stream":true}', b'{"model":"m","stream":true,"fallbacks":[]}'):
        with pytest.raises(StreamingNotSupported) as caught:
            check_json(CHAT, body)
        assert caught.value.param == "stream"
        assert caught.value.code == "streaming_not_supported"
        assert CHAT.sync_path in caught.value.message


@pytest.mark.parametrize("name", ["embeddings", "rerank", "ocr"])
@pytest.mark.parametrize("field", [b'"stream":true', b'"stream_format":"sse"'])
def test_an_endpoint_that_cannot_stream_sends_it_on(name: str, field: bytes) -> None:
    body = b'{"model":"m","input":"x",' + field + b"}"
    assert submission.check(ENDPOINTS[name], "application/json", body) == Submission("m", body)


def test_a_byte_order_mark_is_left_out() -> None:
    body = b'{"model":"m","input":"x"}'
    for fields in (body, body[:-1] + b',"fallbacks":["n"]}'):
        asked = submission.check(EMBEDDINGS, "application/json", b"\xef\xbb\xbf" + fields)
        assert (asked.model, asked.body) == ("m", body)


def test_speech_as_server_sent_events_is_refused() -> None:
    with pytest.raises(StreamingNotSupported) as caught:
        check_json(SPEECH, b'{"model":"m","input":"x","stream_format":"sse"}')
    assert caught.value.param == "stream_format"


@pytest.mark.parametrize(
    "field", [b'"stream":false', b'"stream":null', b'"stream_format":"audio"', b'"stream_format":null']
)
def test_what_is_no_stream_passes(field: bytes) -> None:
    assert check_json(SPEECH, b'{"model":"m","input":"x",' + field + b"}") == "m"


def test_a_refusal_holds_nothing_of_the_body() -> None:
    secret = b"s3cret"
    for body in (
        b'{"model":"m","input":"' + secret,
        b'{"' + secret + b'":NaN}',
        b'["' + secret + b'"]',
        b'{"model":["' + secret + b'"]}',
        b'{"model":"' + secret + b'","model":"' + secret + b'","input":1}',
        b'{"model":"m","input":"","stream":true,"user":"' + secret + b'"}',
    ):
        with pytest.raises(ApiError) as caught:
            check_json(EMBEDDINGS, body)
        assert secret.decode() not in caught.value.message


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b'{"model":"m"}', "m"),
        (b'{"model":""}', ""),
        (b'{"model":1}', None),
        (b"{}", None),
        (b"[]", None),
        (b"", None),
        (b'{"model":"m"', None),
        (b'{"model":"\xff"}', None),
        (b'{"model":"m","x":"\xff"}', None),
    ],
)
def test_the_model_of_any_request_is_found_or_not_and_nothing_raised(
    body: bytes, found: str | None
) -> None:
    assert body_fields.model_of(body) == found


def test_the_body_is_sent_as_it_came() -> None:
    body = b' { "input" : [1.0, 1e2, "\\u00e9"],"x":1,"x":2, "model":"m" } '
    assert submission.check(EMBEDDINGS, "application/json", body) == Submission("m", body)


def test_fallbacks_are_taken_out_and_all_else_stays() -> None:
    body = b'{"model":"m","fallbacks":["n","o"],"input":[1.0,1e2,{"fallbacks":[1]}]}'
    asked = submission.check(EMBEDDINGS, "application/json", body)
    assert asked.model == "m"
    assert asked.fallbacks == ("n", "o")
    assert asked.body == b'{"model":"m","input":[1.0,1e2,{"fallbacks":[1]}]}'


def test_fallbacks_may_stand_beside_half_a_surrogate_pair() -> None:
    body = b'{"model":"m","fallbacks":["n"],"input":"cut \\ud83d"}'
    asked = submission.check(EMBEDDINGS, "application/json", body)
    assert asked.body == b'{"model":"m","input":"cut \\ud83d"}'


@pytest.mark.parametrize(
    ("body", "sent"),
    [
        (b'{"fallbacks":["n"] , "model":"m"}', b'{"model":"m"}'),
        (b'{ "model":"m" , "fallbacks":["n"] }', b'{ "model":"m" }'),
        (b'{"a":1 , "fallbacks":["n"],\n"model":"m"}', b'{"a":1,\n"model":"m"}'),
        (b'{"a":1,"a":2,"fall\\u0062acks":["n"],"model":"m"}', b'{"a":1,"a":2,"model":"m"}'),
    ],
)
def test_fallbacks_are_cut_out_with_one_comma(body: bytes, sent: bytes) -> None:
    assert submission.check(CHAT, "application/json", body) == Submission("m", sent, ("n",))


@pytest.mark.parametrize("value", ["null", '"n"', "1", "{}", "[1]", '[""]', '["n", null]', '[["n"]]'])
def test_fallbacks_that_are_not_a_list_of_models_are_named(value: str) -> None:
    with pytest.raises(InvalidType) as caught:
        check_json(EMBEDDINGS, b'{"model":"m","input":"x","fallbacks":' + value.encode() + b"}")
    assert caught.value.param == "fallbacks"


def test_there_are_at_most_ten_fallbacks() -> None:
    ten = [f"n{i}" for i in range(10)]
    body = json.dumps({"model": "m", "fallbacks": ten, "input": "x"}).encode()
    assert submission.check(EMBEDDINGS, "application/json", body).fallbacks == tuple(ten)
    body = json.dumps({"model": "m", "fallbacks": [*ten, "one more"], "input": "x"}).encode()
    with pytest.raises(InvalidType):
        check_json(EMBEDDINGS, body)


def test_another_model_takes_the_place_of_the_first_and_all_else_stays() -> None:
    body = b'{"input":[1.0,1e2,"\\u00e9"],"model":"m","x":{"model":"m"}}'
    assert at_once(body_fields.with_model(body, "n")) == body.replace(b'"model":"m"', b'"model":"n"', 1)


def test_a_model_name_has_512_characters_at_the_most() -> None:
    assert check_json(CHAT, json.dumps({"model": "é" * 512}).encode()) == "é" * 512
    with pytest.raises(InvalidType) as caught:
        check_json(CHAT, json.dumps({"model": "é" * 513}).encode())
    assert caught.value.param == "model"


FORM = "multipart/form-data; boundary=b"


def form(**parts: str) -> bytes:
    texts = [
        f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in parts.items()
    ]
    return "".join([*texts, "--b--\r\n"]).encode()


def test_a_form_gives_its_model_and_is_sent_as_it_came() -> None:
    body = form(model="m", file="bytes", stream="false")
    asked = submission.check(TRANSCRIPTIONS, FORM, body)
    assert (asked.model, asked.body, asked.fallbacks) == ("m", body, None)


def test_what_tells_a_form_from_others_is_not_its_boundary() -> None:
    def contents(boundary: str, body: bytes) -> list[bytes]:
        kind = f"multipart/form-data; boundary={boundary}"
        return [body[a:b] for a, b in submission.check(TRANSCRIPTIONS, kind, body).contents]

    body = form(model="m", file="x--b")
    other = body.replace(b"--b", b"--other").replace(b"x--other", b"x--b")
    assert contents("b", body) == contents("other", other)
    assert contents("b", body) != contents("b", body.replace(b"m\r\n", b"n\r\n"))


@pytest.mark.parametrize("endpoint", ["images/edits", "images/variations"])
@pytest.mark.parametrize("part", ["image", "image[]"])
def test_images_need_an_image(endpoint: str, part: str) -> None:
    of = ENDPOINTS[endpoint]
    assert submission.check(of, FORM, form(model="m", **{part: "x"})).model == "m"
    with pytest.raises(MissingParameter) as caught:
        submission.check(of, FORM, form(model="m"))
    assert caught.value.param == "image"


def test_a_form_without_what_it_needs_is_refused() -> None:
    for param, body in {
        "file": form(model="m"),
        "model": form(file="x"),
    }.items():
        with pytest.raises(MissingParameter) as caught:
            submission.check(TRANSCRIPTIONS, FORM, body)
        assert caught.value.param == param
    with pytest.raises(MissingParameter):
        submission.check(TRANSCRIPTIONS, FORM, form(model="", file="x"))


@pytest.mark.parametrize("value", ["true", "True", " TRUE ", "1"])
def test_a_form_that_asks_for_a_stream_is_refused(value: str) -> None:
    with pytest.raises(StreamingNotSupported):
        submission.check(TRANSCRIPTIONS, FORM, form(model="m", file="x", stream=value))


def test_a_form_with_two_models_is_refused() -> None:
    body = form(model="m").removesuffix(b"--b--\r\n") + form(model="n", file="x")
    with pytest.raises(InvalidForm) as caught:
        submission.check(TRANSCRIPTIONS, FORM, body)
    assert caught.value.param == "model"


@pytest.mark.parametrize("cut", [1, 5, 30, 60, 90])
def test_a_form_that_ends_early_is_refused(cut: int) -> None:
    body = form(model="m", file="x").removesuffix(b"--\r\n")
    with pytest.raises(InvalidForm):
        submission.check(TRANSCRIPTIONS, FORM, body[: len(body) - cut])


@pytest.mark.parametrize(
    ("query", "prefer", "seconds"),
    [
        (None, None, None),
        ("5", None, 5),
        ("0", None, 0),
        ("1.5", None, 1.5),
        ("100", None, 60),
        ("9" * 9, None, 60),
        (None, "wait=7", 7),
        (None, "respond-async, wait=7", 7),
        (None, 'Wait = "7"; x=1, respond-async', 7),
        (None, "wait=3, wait=9", 3),
        ("5", "wait=7", 5),
        ("rubbish", "wait=7", 7),
        ("rubbish", None, None),
        ("-1", None, None),
        ("", None, None),
        ("nan", None, None),
        ("inf", None, None),
        ("1e3", None, None),
        ("٣", None, None),
        (None, "wait", None),
        (None, "wait=soon", None),
        (None, "waiting=7", None),
    ],
)
def test_how_long_a_client_is_ready_to_wait(
    query: str | None, prefer: str | None, seconds: float | None
) -> None:
    assert preferences.wait(query, prefer, max_s=60) == seconds


@given(st.text(max_size=20), st.text(max_size=20))
@settings(max_examples=150, deadline=None)
def test_rubbish_in_wait_is_as_if_it_were_absent(query: str, prefer: str) -> None:
    seconds = preferences.wait(query, prefer, max_s=60)
    assert seconds is None or 0 <= seconds <= 60
    assert preferences.wait(query, f"wait={prefer}", max_s=0) in (None, 0)


def test_preferences_are_read_as_rfc_7240_says() -> None:
    assert preferences.preferences('Respond-Async, wait=10, foo="bar"; a=b, wait=20,') == {
        "respond-async": "",
        "wait": "10",
        "foo": "bar",
    }


@pytest.mark.parametrize(
    ("prefer", "names"),
    [
        ('foo="a, respond-async, b"', {"foo"}),
        ('foo; bar="x, respond-async", wait=3', {"foo", "wait"}),
        ('foo="a\\", respond-async, \\"b", bar', {"foo", "bar"}),
        ('foo="a, respond-async', set()),
        ('foo=""a, respond-async', set()),
        (",, ,respond-async,,", {"respond-async"}),
    ],
)
def test_what_stands_in_quotes_is_no_preference(prefer: str, names: set[str]) -> None:
    assert set(preferences.preferences(prefer)) == names


@pytest.mark.parametrize(
    "content_type", ["", "text/plain", "json", "; charset=utf-8", "multipart/mixed"]
)
def test_whatever_is_no_form_is_read_as_json(content_type: str) -> None:
    for body in (b'{"model":"m"}', b'{"model":"m","fallbacks":[]}'):
        assert submission.check(CHAT, content_type, body).model == "m"
    with pytest.raises(InvalidJson):
        submission.check(CHAT, content_type, form(model="m"))


@pytest.mark.parametrize(
    ("encoding", "found"),
    [
        (None, ()),
        ("", ()),
        (" Identity ", ()),
        ("gzip", ("gzip",)),
        ("identity, GZip", ("gzip",)),
        ("deflate, br", ("deflate", "br")),
        ("zstd", ("zstd",)),
    ],
)
def test_content_codings_are_read(encoding: str | None, found: tuple[str, ...]) -> None:
    assert submission.codings(encoding) == found


@pytest.mark.parametrize("encoding", ["snappy", "gzip, snappy", "gzip, gzip, gzip", "gzip;q=1"])
def test_an_unknown_content_coding_is_refused(encoding: str) -> None:
    with pytest.raises(UnsupportedMediaType) as caught:
        submission.codings(encoding)
    assert caught.value.status == 415
    (header,) = caught.value.headers
    assert header == ("Accept-Encoding", "gzip, x-gzip, deflate, br, zstd")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, 3600),
        ("", 3600),
        ("soon", 3600),
        ("0", 3600),
        ("000", 3600),
        ("0000000000", 3600),
        ("-5", 3600),
        ("1e3", 3600),
        ("0x10", 3600),
        ("٣٠", 3600),
        ("²", 3600),
        ("nan", 3600),
        ("1", 1),
        ("060", 60),
        ("0000000060", 60),
        pytest.param("0" * 5000, 3600, id="very many zeros"),
        pytest.param("0" * 5000 + "60", 60, id="very many leading zeros"),
        ("86400", 86400),
        ("86401", 86400),
        ("9" * 9, 86400),
        ("9" * 10, 86400),
        ("9" * 10_000, 86400),
    ],
)
def test_the_lifetime_of_a_result(value: str | None, seconds: int) -> None:
    assert preferences.ttl(value, default_s=3600, max_s=86400) == seconds


@given(st.text(max_size=12) | st.integers().map(str))
@settings(max_examples=200, deadline=None)
def test_a_lifetime_is_never_out_of_bounds(value: str) -> None:
    assert 1 <= preferences.ttl(value, default_s=60, max_s=100) <= 100


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


@given(
    others=st.dictionaries(st.text(max_size=8), JSON_VALUES, max_size=4),
    name=st.text(min_size=1, max_size=100),
    given_input=st.text(min_size=1) | st.lists(st.text() | st.integers(), min_size=1),
    ensure_ascii=st.booleans(),
    indent=st.sampled_from([None, 2]),
)
@example(others={"\ud83d": "\ude00"}, name="m", given_input="\ud83d", ensure_ascii=True, indent=None)
@settings(max_examples=200, deadline=None)
def test_every_object_with_a_model_and_an_input_is_accepted(
    others: dict[str, Any], name: str, given_input: Any, *, ensure_ascii: bool, indent: int | None
) -> None:
    fields = {**others, "model": name, "input": given_input}
    for of_ours in ("stream", "stream_format", "fallbacks"):
        fields.pop(of_ours, None)
    body = json.dumps(fields, ensure_ascii=ensure_ascii, indent=indent).encode("utf-8", "replace")
    assert submission.check(EMBEDDINGS, "application/json", body) == Submission(name, body)
    assert body_fields.model_of(body) == name


PIECES = st.sampled_from(
    [
        *b'"model" "input" "stream" { } [ ] : , " \\ true null 1 - e9 \\ud83d \\u006d NaN m'.split(
            b" "
        ),
        b"\xff",
        b"\xc3",
        b"\x00",
        b" ",
    ]
)


@given(st.binary(max_size=64) | st.lists(PIECES, max_size=20).map(b"".join))
@settings(max_examples=400, deadline=None)
def test_random_bytes_raise_nothing_but_errors_for_the_client(body: bytes) -> None:
    for content_type in ("application/json", "multipart/form-data; boundary=m"):
        try:
            asked = submission.check(EMBEDDINGS, content_type, body)
        except ApiError as error:
            assert error.status == 400
        else:
            assert asked.model
    body_fields.model_of(body)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"model":"m","input":"a text"}', 1),
        (b'{"model":"m","input":["a"]}', 1),
        (b'{"model":"m","input": [ "a", "b", "c" ] }', 3),
        (b'{"model":"m","input":[1,2,3]}', 1),
        (b'{"model":"m","input":[[1,2],[3]]}', 2),
        (b'{"model":"m","input":{"text":"a"}}', 1),
        (b'{"model":"m","messages":[]}', None),
        (b"--x\r\n", None),
        (b"", None),
        (b'{"model":"m","input":"' + b"x" * 70_000 + b'"}', None),
    ],
)
def test_inputs_are_counted_where_that_is_cheap(body: bytes, expected: int | None) -> None:
    assert count_inputs("embeddings", body) == expected
    assert count_inputs("responses", body) is None
