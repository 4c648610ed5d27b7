"""Messages and requests in the shapes of several tools, and JSON as it comes."""

import base64
import codecs
import io
import json

import numpy as np
import pytest
from PIL import Image

from keye_jax.errors import UserError, shorten
from keye_jax.processor.messages import MAX_DEPTH, check_messages, read_request
from keye_jax.processor.prompt import ChatTemplate
from tests.keye_jax.processor.conftest import refused


def picture(form="PNG", color="red"):
    file = io.BytesIO()
    Image.new("RGB", (60, 40), color).save(file, form)
    return file.getvalue()


PNG = picture()
BASE64 = base64.b64encode(PNG).decode()
URL = f"data:image/png;base64,{BASE64}"


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def ids(processor, *parts):
    return processor.plan(user(*parts)).prompt_ids


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": URL},
        {"type": "image", "image": {"url": URL}},
        {"type": "image", "url": URL},
        {"type": "image", "path": URL},
        {"type": "image", "source": URL},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BASE64}},
        {"type": "image", "source": {"type": "url", "url": URL}, "cache_control": {"type": "ephemeral"}},
        {"type": "image", "base64": BASE64},
        {"type": "image", "base64": URL},
        {"type": "image", "data": BASE64, "mime_type": "image/png"},
        {"type": "image", "data": PNG},
        {"type": "image", "value": URL},
        {"type": "image", "image": BASE64},
        {"type": "image", "image": None, "url": URL},
        {"type": "image", "image_url": {"url": URL}},
        {"type": "image_url", "image_url": URL},
        {"type": "image_url", "image_url": {"url": URL, "detail": "high"}, "uuid": "1"},
        {"type": "image_url", "image": URL},
        {"type": "input_image", "image_url": URL, "detail": "auto"},
        {"type": "file", "file": {"file_data": URL, "filename": "x"}},
        {"type": "file", "file": {"file_data": BASE64, "filename": "x.PNG"}},
        {"type": "input_file", "file_data": URL},
        {"image": URL},
        {"image_url": {"url": URL}},
        {"image_url": URL},
    ],
    ids=lambda part: shorten({key: part[key] if key == "type" else type(part[key]).__name__ for key in part}),
)
def test_forms_of_an_image(processor, part):
    expected = processor.process(processor.plan(user({"type": "image", "image": PNG})))
    inputs = processor.process(processor.plan(user(part)))
    np.testing.assert_array_equal(inputs.image_patches, expected.image_patches)
    np.testing.assert_array_equal(inputs.input_ids, expected.input_ids)


@pytest.mark.parametrize(
    "form",
    [
        lambda path, url, text: {"type": "video", "video": path},
        lambda path, url, text: {"type": "video", "path": path},
        lambda path, url, text: {"type": "video", "url": url},
        lambda path, url, text: {
            "type": "video",
            "source": {"type": "base64", "media_type": "video/mp4", "data": text},
        },
        lambda path, url, text: {"type": "video", "base64": text},
        lambda path, url, text: {"type": "video", "value": path},
        lambda path, url, text: {"type": "video", "video_url": {"url": url}},
        lambda path, url, text: {"type": "video_url", "video_url": url},
        lambda path, url, text: {"type": "input_video", "video_url": url},
        lambda path, url, text: {"type": "input_file", "file_url": path, "filename": "x.mp4"},
        lambda path, url, text: {"type": "file", "file": {"file_data": url}},
        lambda path, url, text: {"type": "file", "file": path},
        lambda path, url, text: {"video": path},
        lambda path, url, text: {"video_url": {"url": text}},
    ],
)
def test_forms_of_a_video(processor, clip, form):
    text = base64.b64encode(clip.read_bytes()).decode()
    made = processor.plan(user(form(str(clip), f"data:video/mp4;base64,{text}", text)))
    assert made.prompt_ids == processor.plan(user({"type": "video", "video": str(clip)})).prompt_ids
    assert made.videos[0].source.info.num_frames == 40


@pytest.mark.parametrize(
    "part",
    [
        "hello",
        {"type": "text", "text": "hello"},
        {"type": "input_text", "text": "hello"},
        {"type": "output_text", "text": "hello", "annotations": []},
        {"type": "refusal", "refusal": "hello"},
        {"type": "text", "value": "hello"},
        {"text": "hello"},
    ],
)
def test_forms_of_text(processor, part):
    assert ids(processor, part) == ids(processor, "hello")
    assert ids(processor, part, {"image": URL}) == ids(processor, "hello", {"image": URL})
    whole = {"role": "user", "content": "hello"}
    assert processor.plan([whole]).prompt_ids == ids(processor, part)


def test_text_of_a_tool_and_of_a_refusal(processor):
    said = [{"role": "assistant", "content": None, "refusal": "I cannot."}, *user("Why?")]
    assert processor.plan(said).prompt_ids == processor.plan([{**said[0], "content": "I cannot."}, said[1]]).prompt_ids
    answer = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "42"}]}
    assert processor.plan([answer]).num_tokens > 0


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            {"type": "input_audio", "input_audio": {}},
            r"content\[0\].type is 'input_audio'; it must be one of text, image",
        ),
        ({"type": "tool_result", "content": "x"}, "type is 'tool_result'"),
        ({"type": 3}, r"content\[0\].type is 3"),
        ({"type": ["text"]}, r"content\[0\].type is \['text'\]"),
        ({}, r"content\[0\].type is None"),
        ({"text": "a", "image": URL}, r"content\[0\].type is None"),
        (3, r"content\[0\] is 3; it must be a string or an object with type"),
        (None, r"content\[0\] is None"),
        (["a"], r"content\[0\] is \['a'\]"),
        ({"type": "image"}, r"content\[0\].image is missing"),
        ({"type": "input_image", "file_id": "f"}, r"content\[0\].image_url is missing"),
        ({"type": "image", "source": {"type": "file", "file_id": "f"}}, r"content\[0\].source.url is missing"),
        ({"type": "video_url", "video_url": {"url": None}}, r"content\[0\].video_url.url is missing"),
        (
            {"type": "image", "image": URL, "url": URL},
            r"content\[0\].url is given beside image; a part must have one source",
        ),
        ({"type": "image", "video": URL}, r"content\[0\].image is missing"),
        ({"type": "image", "base64": "$"}, r"content\[0\].base64 is .*must be valid base64"),
        ({"type": "image", "base64": 3}, r"content\[0\].base64 is 3; it must be a path, a URL"),
        ({"type": "image", "image": {"url": {"url": {"url": 3}}}}, r"image.url.url.url is 3"),
        (
            {"type": "image_url", "image_url": {"url": URL, "detail": "medium"}},
            "image_url.detail is 'medium'; it must be one of low",
        ),
        (
            {"type": "image_url", "image_url": URL, "detail": 3},
            r"content\[0\].detail is 3; it must be one of low, high, auto",
        ),
        ({"type": "image_url", "image_url": URL, "detail": ["low"]}, "detail is"),
        (
            {"type": "file", "file": {"file_data": "data:application/pdf;base64,AA"}},
            "a file must be an image or a video",
        ),
        ({"type": "file", "file": {"file_id": "f"}}, "a file must be an image or a video"),
        ({"type": "file"}, "a file must be an image or a video"),
        ({"type": "text", "text": 3}, r"content\[0\].text is 3; it must be a string"),
        ({"type": "refusal"}, r"content\[0\].text is None"),
        ({"type": "video", "video": [{"type": "image"}]}, r"video\[0\].image is missing"),
        ({"type": "video", "video": [{"image": URL, "max_pixels": 9}]}, r"video\[0\].max_pixels is not known"),
        ({"type": "video", "video": []}, "is an empty list"),
        ({"type": "video", "video": [["a"]]}, r"video\[0\] is \['a'\]"),
        ({"type": "video", "video": "http://h/a"}, "only with --allow-remote"),
    ],
)
def test_parts_that_are_refused(processor, part, message):
    refused(lambda: processor.plan(user(part)), message)


@pytest.mark.parametrize("name", ["image", "images", "video", "videos", "audio"])
def test_media_beside_the_content_are_refused(processor, name):
    message = {"role": "user", "content": "What?", name: [BASE64]}
    refused(lambda: processor.plan([message]), rf"messages\[0\].{name} is not known; .* must be parts of content")


def nested(depth, kind=list):
    value = "x"
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


@pytest.mark.parametrize("kind", [list, dict])
@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 100_000])
def test_deep_nesting(processor, kind, depth):
    deep = nested(depth, kind)
    tools = [{"type": "function", "function": {"name": "f", "parameters": deep}}]
    calls = [{"function": {"name": "f", "arguments": deep}}]
    for call in (
        lambda: processor.plan([deep]),
        lambda: processor.plan([{"role": deep, "content": "x"}]),
        lambda: processor.plan([{"role": "user", "content": deep}]),
        lambda: processor.plan(user(deep)),
        lambda: processor.plan(user({"type": deep})),
        lambda: processor.plan(user({"type": "image", "image": deep})),
        lambda: processor.plan(user({"type": "video", "video": [deep]})),
        lambda: processor.plan(user({"type": "video", "video": "x", "fps": deep})),
        lambda: processor.plan([{"role": "assistant", "tool_calls": calls}, *user("x")]),
        lambda: processor.plan(user("x"), tools=tools),
        lambda: processor.plan(user("x"), template_variables={"a": deep}),
        lambda: processor.plan(user("x"), chat_template_kwargs={"a": deep}),
    ):
        refused(call, f"is too deep; its lists and objects must be at most {MAX_DEPTH} levels deep")
    for call in (
        lambda: processor.plan(deep),
        lambda: processor.plan(user("x"), media_io_kwargs={"video": {"fps": deep}}),
        lambda: processor.plan(user("x"), mm_processor_kwargs={"fps": deep}),
    ):
        refused(call, " (is|are) ")


def test_a_list_inside_itself(processor):
    knot = []
    knot.append(knot)
    refused(lambda: processor.plan(user({"type": "image", "image": {"url": knot}})), "is too deep")


LONG = 10**5000


@pytest.mark.parametrize(
    "value", [LONG, nested(100_000), {"a": LONG}, "x" * 10**7, np.zeros((9, 9)), "a\nb\u2028c"], ids=range(6)
)
def test_values_in_messages_are_short_and_one_line(value):
    assert len(shorten(value)) <= 80
    assert len(shorten(value).splitlines()) == 1


WRONG = [10**400, LONG, float("nan"), float("inf"), True, None, [], {}, "x", b"x", 1e-308]


@pytest.mark.parametrize("value", WRONG, ids=range(len(WRONG)))
def test_values_of_the_wrong_kind(processor, value):
    """Wherever they stand, the answer is a plan or one line."""
    for messages in (
        value,
        [value],
        [{"role": value, "content": "x"}],
        [{"role": "user", "content": value}],
        user(value),
        user({"type": value}),
        user({"type": "text", "text": value}),
        user({"type": "image", "image": value}),
        user({"type": "image", "source": {"data": value, "media_type": value}}),
        user({"type": "video", "video": [value]}),
        user({"type": "file", "file": value}),
        [{"role": "user", "content": "x", "name": value, "tool_calls": value}],
        [{"role": "assistant", "content": "x", "tool_calls": [value]}],
        [{"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": {"a": value}}}]}],
    ):
        try:
            processor.plan(messages)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 400


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
MESSAGES = [{"role": "user", "content": "naïve 中文 🙂"}]


class TestTemplate:
    def test_tools_that_the_template_leaves_out_are_refused(self, processor):
        template = ChatTemplate("{{ messages[0].content }}", {})
        refused(lambda: template.render(user("x"), tools=TOOLS), r"tools holds 1 function\(s\), but the chat template")
        assert processor.plan(user("x"), tools=[]).prompt_ids == processor.plan(user("x")).prompt_ids

    def test_tools_that_it_takes(self):
        source = "{% if tools %}{{ tools | tojson }}{% endif %}{{ messages[0].content }}"
        rendered = ChatTemplate(source, {}).render(user("x"), tools=TOOLS)
        assert "".join(text for text, _ in rendered.pieces) == json.dumps(TOOLS) + "x"
        assert ChatTemplate("{{ tools[0].function.name }}{{ messages[0].content }}", {}).render(user("x"), tools=TOOLS)

    @pytest.mark.parametrize("tools", [3, "look", {"name": "look"}, [3], [{}], [{"function": {"name": 3}}], [None]])
    def test_tools_of_another_shape(self, processor, tools):
        refused(lambda: processor.plan(user("x"), tools=tools), r"tools(\[0\])? is ")

    def test_variables(self, processor):
        refused(lambda: processor.plan(user("x"), chat_template_kwargs=[1]), r"chat_template_kwargs is \[1\]")
        refused(lambda: processor.plan(user("x"), template_variables="x"), "template_variables is 'x'")
        for name in ("messages", "tools", "add_generation_prompt", "_placeholders", 3):
            refused(
                lambda name=name: processor.plan(user("x"), chat_template_kwargs={name: 1}),
                rf"chat_template_kwargs.{name} is not known",
            )
        assert processor.plan(user("x"), chat_template_kwargs={"enable_thinking": False, "big": 10**5000})

    @pytest.mark.parametrize(
        "source",
        [
            "{{ 1 // 0 }}",
            "{{ messages[0].content / 2 }}",
            "{{ range(10**9) | list }}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{{ messages[9].content.x }}",
            "{{ messages[0].content.__class__ }}",
            "{{ big }}",
            "{{ big | tojson }}",
            "{{ {(1, 2): 3} | tojson }}",
            "{{ messages.append(1) }}",
            "{{ '%d' | format('x') }}",
            "{{ raise_exception('a\nb') }}",
            "{% include 'x' %}",
            "{{ nothing() }}",
            "{{ 'x'.encode('y') }}",
            "{{ strftime_now('\ud83d') }}",
        ],
    )
    def test_what_goes_wrong_inside_is_one_line(self, source):
        template = ChatTemplate(source, {})
        refused(lambda: template.render(user("x"), variables={"big": 10**5000}), "the chat template ")

    def test_a_template_that_is_too_deep(self):
        refused(
            lambda: ChatTemplate("{{ " + "(" * 10**5 + "1" + ")" * 10**5 + " }}", {}), "the chat template is not valid"
        )


class TestJson:
    @pytest.mark.parametrize(
        "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
    )
    def test_encodings(self, encoding):
        text = json.dumps(MESSAGES, ensure_ascii=False)
        assert read_request(text.encode(encoding), "file") == {"messages": MESSAGES}
        for bom, name in ((codecs.BOM_UTF16_BE, "utf-16-be"), (codecs.BOM_UTF32_LE, "utf-32-le")):
            assert read_request(bom + text.encode(name), "file") == {"messages": MESSAGES}

    def test_a_request_body(self):
        body = {
            **{"model": "keye", "temperature": 0.5, "stream": True, "messages": MESSAGES, "tools": None},
            "media_io_kwargs": {"video": {"fps": 1}},
            "extra_body": {
                "chat_template_kwargs": {"enable_thinking": False},
                "mm_processor_kwargs": {"max_pixels": 9},
            },
        }
        assert read_request(json.dumps(body).encode(), "file") == {
            "messages": MESSAGES,
            "media_io_kwargs": {"video": {"fps": 1}},
            "chat_template_kwargs": {"enable_thinking": False},
            "mm_processor_kwargs": {"max_pixels": 9},
        }

    def test_the_last_of_two_equal_keys_counts(self, processor):
        content = b'{"messages": [], "messages": [{"role": "user", "role": "system", "content": "x"}]}'
        assert read_request(content, "file") == {"messages": [{"role": "system", "content": "x"}]}

    def test_half_a_surrogate_pair(self, processor):
        for text in ('"a\\ud83d"', '"a\\udc00b"'):
            request = read_request(f'[{{"role": "user", "content": {text}}}]'.encode(), "file")
            assert processor.plan(**request).num_tokens > 0

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "must hold messages, but it is empty"),
            (b" \n", "must hold messages, but it is empty"),
            ("\n".encode("utf-16-le"), "must hold messages, but it is empty"),
            (codecs.BOM_UTF8, "it must be JSON"),
            (b"[" * 100_000 + b"]" * 100_000, f"must be at most {MAX_DEPTH} levels deep"),
            (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, f"must be at most {MAX_DEPTH} levels deep"),
            (b"[" * 100_000, f"must be at most {MAX_DEPTH} levels deep|must be JSON"),
            (b"[" + b"1" * 5001 + b"]", "a number has 5,001 digits"),
            (b'[{"role": "user"', "it must be JSON"),
            (b'{"role": "user", "content": "a"}\n{"role": "user"}', "it must be JSON"),
            (b"\xff\xff\xff\xff", "it must be JSON"),
            (b'["\xff"]', "it must be JSON"),
            (b"hello", "it must be JSON"),
            (b"\x89PNG\r\n\x1a\n\0\0", "it must be JSON"),
            (b"NaN", "must hold a list of messages"),
            (b"3", "must hold a list of messages"),
            (b"[]", "must hold a list of messages"),
            (b"{}", "must hold a list of messages"),
            (b'{"messages": {}}', "must hold a list of messages"),
            (b'{"messages": null, "extra_body": 3}', "must hold a list of messages"),
        ],
    )
    def test_what_is_no_request(self, content, message):
        refused(lambda: read_request(content, "--messages is 'x'"), f"^--messages is 'x'; .*{message}")

    @pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "1" * 400, "1e-308", "-1", "0"])
    def test_numbers_that_are_no_numbers_of_frames(self, processor, clip, value):
        part = f'{{"type": "video", "video": {json.dumps(str(clip))}, "max_frames": {value}}}'
        request = read_request(f'[{{"role": "user", "content": [{part}]}}]'.encode(), "file")
        refused(
            lambda: processor.plan(**request), r"messages\[0\].content\[0\].max_frames is .*; it must be a positive"
        )


def test_messages_are_what_templates_expect():
    messages = [
        {"role": "developer", "content": "a"},
        {"role": "user", "content": ["b", {"image": URL}, {"text": "c"}]},
    ]
    checked, media = check_messages(messages)
    assert checked == [
        {"role": "system", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "image"}, {"type": "text", "text": "c"}]},
    ]
    assert [(part.kind, part.source, part.field) for part in media] == [("image", URL, "messages[1].content[1].image")]
