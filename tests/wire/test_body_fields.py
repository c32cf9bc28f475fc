"""Our fields in a body: found however they are spelled, and changed without touching any other byte."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncproxy.wire import body_fields, json_scan
from asyncproxy.wire.body_fields import Repeated
from asyncproxy.wire.json_text import InvalidText
from asyncproxy.wire.steps import at_once
from tests.growth import lines_run_in

JSON = "application/json"
FORM = 'multipart/form-data; boundary="b"'


def values(body: bytes) -> dict[str, bytes]:
    return {name: body[slice(*place.value)] for name, place in at_once(body_fields.find(body)).items()}


def stripped(body: bytes, prefix: str = "openai/", content_type: str = JSON) -> bytes:
    return at_once(body_fields.without_model_prefix(content_type, body, prefix))


def test_fields_are_found_however_they_are_spelled() -> None:
    body = b'{"a":{"model":1},"m\\u006fdel" : "m" ,"\\u0069\\u006E\\u0070\\u0075\\u0074":[1],"Model":2}'
    assert values(body) == {"model": b'"m"', "input": b"[1]"}
    with pytest.raises(Repeated) as caught:
        values(body[:-1] + b',"model":"n"}')
    assert caught.value.name == "model"
    assert values(b'{"messages":1,"messages":2}') == {"messages": b"2"}
    assert values(b'{"' + b"\\u0061" * 1000 + b'":1}') == {}


MEMBERS = st.lists(
    st.sampled_from([b'"a":1', b'"model":"m"', b'"fallbacks":["n", "o"]', b'"input" : [{}]', b'"":""']),
    min_size=1,
    max_size=5,
    unique=True,
)
SPACE = st.sampled_from([b"", b" ", b"\n "])


@given(MEMBERS, SPACE, SPACE, SPACE)
@settings(max_examples=150, deadline=None)
def test_what_is_cut_out_leaves_an_object_without_it(
    members: list[bytes], before: bytes, behind: bytes, between: bytes
) -> None:
    body = b"{" + before + (behind + b"," + between).join(members) + behind + b"}"
    for name, place in at_once(body_fields.find(body)).items():
        start, end = place.member
        rest = json.loads(body[:start] + body[end:])
        whole = json.loads(body)
        del whole[name]
        assert rest == whole


@pytest.mark.parametrize(
    ("body", "sent"),
    [
        (b'{"model":"openai/a","input":"openai/a"}', b'{"model":"a","input":"openai/a"}'),
        (b'{ "x":{"model":"openai/b"}, "model" : "openai\\/a" }', b'{ "x":{"model":"openai/b"}, "model" : "a" }'),
        (b'{"mod\\u0065l":"openai/openai/a"}', b'{"mod\\u0065l":"openai/a"}'),
        (b'{"model":"openai/\\u00e9\\""}', '{"model":"é\\""}'.encode()),
        (b'{"model":"a"}', None),
        (b'{"model":"openai/"}', None),
        (b'{"model":"OpenAI/a"}', None),
        (b'{"model":"x","y":' + b"[" * 2000 + b"]" * 2000 + b"}", None),
        (b'{"y":' + b"[" * 2000 + b"]" * 2000 + b',"model":"openai/a"}', None),
    ],
)  # fmt: skip
def test_a_prefix_is_taken_off_the_model_and_all_else_stays(body: bytes, sent: bytes | None) -> None:
    assert stripped(body) == (body if sent is None else sent)


def test_a_prefix_is_taken_off_the_model_of_a_form() -> None:
    def form(model: str) -> bytes:
        parts = (("file", "openai/x"), ("model", model), ("prompt", "openai/"))
        head = '--b\r\nContent-Disposition: form-data; name="{}"\r\n\r\n{}\r\n'
        return "".join([*(head.format(*part) for part in parts), "--b--\r\n"]).encode()

    assert stripped(form("openai/é"), content_type=FORM) == form("é")
    assert stripped(form("é/openai/a"), "é/", content_type=FORM) == form("openai/a")
    for model in ("a", "openai/", ""):
        assert stripped(form(model), content_type=FORM) == form(model)


def test_what_stands_behind_the_model_is_not_read_to_change_it() -> None:
    steps = []
    for size in (10_000, 20_000):
        body = b'{"model":"openai/a","input":' + b"[" + b"[[[[[1]]]]]," * size + b"1]}"
        with lines_run_in(json_scan) as count:
            assert stripped(body).startswith(b'{"model":"a","input":[[')
            assert at_once(body_fields.with_model(body, "b")).startswith(b'{"model":"b","input":[[')
        steps.append(count())
    assert steps[0] == steps[1]


def test_a_body_without_a_model_has_none_to_change() -> None:
    with pytest.raises(InvalidText):
        at_once(body_fields.with_model(b'{"input":"x"}', "m"))


def test_a_byte_order_mark_hides_no_model() -> None:
    assert body_fields.model_of(b'\xef\xbb\xbf{"model":"m"}') == "m"
