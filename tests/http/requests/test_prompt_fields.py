"""Fields of a prompt over HTTP: arguments of the chat template, truncation, special tokens and stop strings."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient

from runtime.text_model import TextModel
from serve.app import create_app
from serve.fields.ignored import KNOWN
from tests.support.byte_tokenizer import EOS
from tests.support.fake_text_model import EOS_ID, NAME, fake_text_model

Json = dict[str, Any]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CAPACITY = 256
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}{% if enable_thinking is false %}calm {% endif %}{{ tone }}assistant: {% endif %}"
)
TURNS: list[Json] = [{"role": "user", "content": "hi"}]
THOUGHT: list[Json] = [*TURNS, {"role": "assistant", "content": "yo", "reasoning_content": "hm"}, *TURNS]


@pytest.fixture(scope="module")
def model() -> Iterator[TextModel]:
    model = fake_text_model(capacity=CAPACITY, template=TEMPLATE)
    model.start()
    yield model
    model.close()


@pytest.fixture(scope="module")
def client(model: TextModel) -> FlaskClient:
    return create_app(model).test_client()


def rendered(client: FlaskClient, **fields: Any) -> str:
    """The prompt that a conversation becomes."""
    answer = client.post("/tokenize", json={"messages": TURNS, **fields})
    assert answer.status_code == 200, answer.text
    tokens = answer.get_json()["tokens"]
    return str(client.post("/detokenize", json={"tokens": tokens}).get_json()["prompt"])


def chat(client: FlaskClient, **fields: Any) -> Any:
    return client.post(CHAT, json={"model": NAME, "messages": TURNS, "max_tokens": 2, **fields})


@pytest.mark.parametrize(
    ("fields", "prompt", "ignored"),
    [
        ({}, "user: hi\nassistant: ", None),
        ({"enable_thinking": False}, "user: hi\ncalm assistant: ", None),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "user: hi\ncalm assistant: ", None),
        ({"reasoning_effort": "none"}, "user: hi\ncalm assistant: ", None),
        ({"reasoning_effort": "low"}, "user: hi\nassistant: ", "reasoning_effort"),
        ({"chat_template_kwargs": {"tone": "kind ", "x": [1]}}, "user: hi\nkind assistant: ", "chat_template_kwargs.x"),
        ({"add_generation_prompt": True}, "user: hi\nassistant: ", None),
        ({"add_generation_prompt": False}, "user: hi\n", None),
        ({"continue_final_message": True}, "user: hi", None),
        ({"continue_final_message": True, "add_generation_prompt": False}, "user: hi", None),
        ({"messages": THOUGHT}, "user: hi\nassistant: (hm)yo\nuser: hi\nassistant: ", None),
    ],
)
def test_template_arguments_reach_the_template_or_are_named_as_ignored(
    client: FlaskClient, fields: Json, prompt: str, ignored: str | None
) -> None:
    assert rendered(client, **fields) == prompt
    answer = chat(client, **fields)
    assert answer.status_code == 200, answer.text
    assert answer.get_json()["usage"]["prompt_tokens"] == len(prompt)
    assert answer.headers.get("X-Headrace-Ignored") == ignored


@pytest.mark.parametrize("reasoning", ["hm", {"effort": "low"}, ""])
@pytest.mark.parametrize("role", ["assistant", "user"])
def test_reasoning_that_is_no_text_of_an_assistant_is_without_effect(
    client: FlaskClient, reasoning: Any, role: str
) -> None:
    answer = chat(client, messages=[*TURNS, {"role": role, "content": "yo", "reasoning": reasoning}, *TURNS])
    is_read = role == "assistant" and isinstance(reasoning, str)
    assert answer.headers.get("X-Headrace-Ignored") == (None if is_read else "messages[].reasoning")


def test_fields_that_the_template_does_not_read_are_named_in_the_header() -> None:
    model = fake_text_model()
    model.start()
    answer = chat(create_app(model).test_client(), messages=THOUGHT, enable_thinking=True, reasoning_effort="none")
    names = ("enable_thinking", "reasoning_effort", "messages[].reasoning_content")
    assert answer.headers["X-Headrace-Ignored"] == ", ".join(names) and KNOWN.issuperset(names)
    model.close()


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "messages cannot be set"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs", "chat_template cannot be set"),
        ({"chat_template_kwargs": {"eos_token": "x"}}, "chat_template_kwargs", "eos_token cannot be set"),
        ({"chat_template_kwargs": {"a": "\ud800"}}, "chat_template_kwargs", "surrogates"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs", "an object"),
        ({"chat_template_kwargs": {f"v{idx}": 1 for idx in range(65)}}, "chat_template_kwargs", "65 names"),
        ({"enable_thinking": "yes"}, "enable_thinking", "true or false"),
        (
            {"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}},
            "enable_thinking",
            "one of them",
        ),
        ({"reasoning_effort": "x" * 33}, "reasoning_effort", "32"),
        ({"reasoning_effort": ""}, "reasoning_effort", "1 to 32 characters"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message", "set one"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "at least 1"),
        ({"min_tokens": -1}, "min_tokens", "at least 0"),
        ({"min_tokens": 3}, "min_tokens", "2 tokens at most"),
        ({"typical_p": 0}, "typical_p", "greater than 0"),
        ({"repeat_penalty": 1.1, "repetition_penalty": 1.2}, "repeat_penalty", "differ"),
        ({"repeat_penalty": 11}, "repetition_penalty", "at most 10"),
        ({"prediction": "x"}, "prediction", "an object"),
        ({"prediction": {"type": "other", "content": "x"}}, "prediction.type", "content"),
        ({"prediction": {"type": "content"}}, "prediction.content", "required"),
        ({"prediction": {"type": "content", "content": [{"type": "text"}]}}, "prediction.content[0].text", "required"),
        ({"guided_json": 3}, "guided_json", "JSON schema"),
        ({"guided_choice": []}, "guided_choice", "1 to 5000 strings"),
        ({"guided_regex": "("}, "guided_regex", "cannot be"),
        ({"grammar": 'root ::= "a', "max_tokens": 4}, "grammar", "cannot be read"),
        ({"guided_regex": "a", "grammar": 'root ::= "a"'}, "grammar", "guided_regex"),
        ({"json_schema": {}, "response_format": {"type": "json_object"}}, "json_schema", "response_format"),
        ({"n_predict": 0}, "n_predict", "at least 1"),
    ],
)
def test_a_refusal_names_its_field(client: FlaskClient, fields: Json, param: str, words: str) -> None:
    answer = client.post(
        CHAT,
        data=json.dumps({"model": NAME, "messages": TURNS, "max_tokens": 2, **fields}),
        content_type="application/json",
    )
    error = answer.get_json()["error"]
    assert answer.status_code == 400 and error["param"] == param and words in error["message"], error


def complete(client: FlaskClient, prompt: Any, **fields: Any) -> Json:
    answer = client.post(COMPLETIONS, json={"model": NAME, "prompt": prompt, "max_tokens": 4, **fields})
    assert answer.status_code == 200, answer.text
    found: Json = answer.get_json()
    return found


@pytest.mark.parametrize(
    ("num_kept", "max_tokens", "prompt_len"),
    [(5, 4, 5), (1, 4, 1), (300, 4, 200), (-1, 4, 200), (-1, 100, 156), (-1, -1, 200), (-1, 255, 1), (-1, 256, 1)],
)
def test_the_end_of_a_prompt_is_kept(client: FlaskClient, num_kept: int, max_tokens: int, prompt_len: int) -> None:
    prompt = "".join(chr(97 + idx % 26) for idx in range(200))
    body = {"model": NAME, "prompt": prompt, "max_tokens": max_tokens, "truncate_prompt_tokens": num_kept, "seed": 1}
    answer = client.post(COMPLETIONS, json=body)
    if prompt_len + max_tokens > CAPACITY:
        assert answer.status_code == 400 and "1 in the prompt, 256 for the answer" in answer.text
        return
    found = answer.get_json()
    assert found["usage"]["prompt_tokens"] == prompt_len
    expected = complete(client, prompt[-prompt_len:], max_tokens=max_tokens, seed=1)
    assert found["choices"] == expected["choices"]


def test_a_prompt_that_is_cut_may_be_longer_than_the_context_but_not_without_end(client: FlaskClient) -> None:
    for num_chars, status in ((5_000, 200), (50_000, 400)):
        text, cut = "x" * num_chars, {"max_tokens": 4, "truncate_prompt_tokens": -1}
        for path, start in ((COMPLETIONS, {"prompt": text}), (CHAT, {"messages": [{"role": "user", "content": text}]})):
            body = {"model": NAME, **start}
            assert client.post(path, json=body).status_code == 400
            assert client.post(path, json=body | cut).status_code == status


def test_a_truncated_prompt_is_echoed_and_scored_as_truncated(client: FlaskClient) -> None:
    cut = {"truncate_prompt_tokens": 3, "echo": True, "logprobs": 0, "max_tokens": 0}
    for prompt in ("abcdef", [*range(70, 75), 256, 10]):
        choice = complete(client, prompt, **cut, skip_special_tokens=False)["choices"][0]
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
        assert len(choice["logprobs"]["tokens"]) == 3
    assert complete(client, "abcdef", **cut)["choices"][0]["text"] == "def"


def test_a_long_chat_can_be_cut_to_what_fits(client: FlaskClient) -> None:
    long = [{"role": "user", "content": "x" * 300}]
    assert chat(client, messages=long).status_code == 400
    for fields, num in (({}, 254), ({"max_tokens": -1}, 255), ({"max_tokens": None, "min_tokens": 20}, 236)):
        answer = chat(client, messages=long, truncate_prompt_tokens=-1, **fields).get_json()
        assert answer["usage"]["prompt_tokens"] == num


BIAS = {"logit_bias": {str(EOS_ID): 100}}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_special_tokens_and_ends_in_the_text(client: FlaskClient, path: str) -> None:
    def text(**fields: Any) -> str:
        start: Json = {"prompt": "go"} if path == COMPLETIONS else {"messages": TURNS}
        body = {"model": NAME, **start, "max_tokens": 3, "seed": 1, **BIAS, **fields}
        choice = client.post(path, json=body).get_json()["choices"][0]
        streamed = client.post(path, json=body | {"stream": True}).get_data(as_text=True).split("\n\n")[:-2]
        pieces = [json.loads(event.removeprefix("data: "))["choices"][0] for event in streamed]
        whole = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
        assert whole == "".join(p.get("text", "") or p.get("delta", {}).get("content", "") for p in pieces)
        return f"{whole} {choice['finish_reason']}"

    assert text() == text(stop=EOS, ignore_eos=True) == " stop"
    assert text(ignore_eos=True) == " length"
    assert text(ignore_eos=True, skip_special_tokens=False) == f"{EOS * 3} length"
    assert text(skip_special_tokens=False) == " stop"
    assert text(skip_special_tokens=False, include_stop_str_in_output=True) == f"{EOS} stop"
    assert text(include_stop_str_in_output=True) == " stop", "an end of text has no text"
    assert text(stop=EOS, ignore_eos=True, include_stop_str_in_output=True) == f"{EOS} stop"
    assert text(stop=EOS + EOS, ignore_eos=True, skip_special_tokens=False) == " stop"
    assert text(stop=EOS, ignore_eos=True, min_tokens=3) == text(min_tokens=3), "other tokens instead"


def test_offsets_count_special_tokens_that_are_part_of_the_text(client: FlaskClient) -> None:
    fields = {**BIAS, "ignore_eos": True, "logprobs": 0, "max_tokens": 3}
    for skips, offsets in ((True, [0, 0, 0]), (False, [0, len(EOS), 2 * len(EOS)])):
        logprobs = complete(client, "go", **fields, skip_special_tokens=skips)["choices"][0]["logprobs"]
        assert logprobs["text_offset"] == offsets


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_other_names_and_values_for_the_same(client: FlaskClient, path: str) -> None:
    def answer(**fields: Any) -> Json:
        start: Json = {"prompt": "go"} if path == COMPLETIONS else {"messages": TURNS}
        reply = client.post(path, json={"model": NAME, **start, "temperature": 1, "seed": 4, **fields})
        assert reply.status_code == 200, reply.text
        found: Json = reply.get_json()
        return {"choices": found["choices"], "usage": found["usage"]}

    assert answer(n_predict=5) == answer(max_tokens=5)
    assert answer(n_predict=5, max_tokens=9) == answer(max_tokens=5)
    assert answer(n_predict=-1)["usage"]["completion_tokens"] > 16
    long = {"max_tokens": 12}
    assert answer(repeat_penalty=1.5, **long) == answer(repetition_penalty=1.5, **long)
    assert answer(repeat_penalty=1.5, repetition_penalty=1.5, **long) == answer(repetition_penalty=1.5, **long)
    assert answer(top_k=-1, **long) == answer(top_k=0, **long)
    assert answer(top_p=0, **long) == answer(temperature=0, **long)
    assert answer(seed=-1, **long) != answer(seed=-1, **long)
    one, two = answer(seed=-1, n=2, **long)["choices"]
    assert one != two | {"index": 0}
    assert answer(typical_p=0.3, **long) != answer(**long)
    predicted = {"type": "content", "content": [{"type": "text", "text": "good"}, {"type": "text", "text": "bye"}]}
    assert answer(prediction=predicted, **long) == answer(**long), "nothing is speculated here"
