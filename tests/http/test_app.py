"""The application in-process, over the real engine and the fake session: shapes, limits, errors, metrics."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from prometheus_client.parser import text_string_to_metric_families
from werkzeug.test import EnvironBuilder

from runtime.errors import HeadraceError
from runtime.session.session import Batch
from runtime.text_model import TextModel
from serve.access.errors import kind_of
from serve.app import create_app
from serve.model_registry import ModelRegistry
from serve.observe.engine_metrics import EngineMetrics
from serve.settings import ServerSettings
from tests.support.fake_text_model import NAME, fake_text_model

Json = dict[str, Any]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def completion(**fields: Any) -> Json:
    return {"model": NAME, "prompt": "once", "max_tokens": 8, "temperature": 0, **fields}


def conversation(**fields: Any) -> Json:
    messages = [{"role": "user", "content": "hello"}]
    return {"model": NAME, "messages": messages, "max_tokens": 8, "temperature": 0, **fields}


@pytest.fixture
def served() -> Iterator[tuple[TextModel, FlaskClient]]:
    metrics = EngineMetrics()
    model = fake_text_model(observer=metrics)
    model.start()
    yield model, create_app(model, ServerSettings(max_body=100_000), metrics).test_client()
    model.close()


@pytest.fixture
def client(served: tuple[TextModel, FlaskClient]) -> FlaskClient:
    return served[1]


def post(client: FlaskClient, path: str, body: Json, status: int = 200) -> Json:
    response = client.post(path, json=body, buffered=True)
    assert response.status_code == status, response.text
    answer = response.get_json()
    assert isinstance(answer, dict)
    return answer


def stream(client: FlaskClient, path: str, body: Json) -> list[Json]:
    response = client.post(path, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.mimetype == "text/event-stream"
    events = response.get_data(as_text=True).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def test_completion_has_openais_shape(client: FlaskClient) -> None:
    answer = post(client, COMPLETIONS, completion())
    Completion.model_validate(answer, strict=True)
    assert answer["id"].startswith("cmpl-") and answer["object"] == "text_completion"
    assert answer["usage"]["prompt_tokens"] == 4 and answer["usage"]["completion_tokens"] == 8
    assert answer["usage"]["total_tokens"] == 12
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length" and choice["text"] and choice["logprobs"] is None


def test_chat_has_openais_shape(client: FlaskClient) -> None:
    answer = post(client, CHAT, conversation())
    ChatCompletion.model_validate(answer, strict=True)
    assert answer["id"].startswith("chatcmpl-") and answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"]
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["prompt_tokens"] == len("user: hello\nassistant: ")


@pytest.mark.parametrize("logprobs", [{}, {"logprobs": True, "top_logprobs": 3}])
def test_chat_stream_adds_up_to_the_whole_reply(client: FlaskClient, logprobs: Json) -> None:
    body = conversation(n=3, temperature=1, seed=7, **logprobs)
    whole = post(client, CHAT, body)
    chunks = stream(client, CHAT, {**body, "stream_options": {"include_usage": True}})
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    for choice in whole["choices"]:
        pieces = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert pieces[0]["delta"]["role"] == "assistant"
        assert pieces[-1]["delta"] == {} and pieces[-1]["finish_reason"] == choice["finish_reason"]
        assert all(piece["finish_reason"] is None for piece in pieces[:-1])
        assert "".join(p["delta"].get("content", "") for p in pieces) == choice["message"]["content"]
        if logprobs:
            entries = [e for p in pieces if p["logprobs"] for e in p["logprobs"]["content"]]
            assert entries == choice["logprobs"]["content"] and len(entries) == 8
            assert all(len(entry["top_logprobs"]) == 3 for entry in entries)


def test_completion_stream_adds_up_to_the_whole_reply(client: FlaskClient) -> None:
    body = completion(prompt=["one", "two"], n=2, temperature=1, seed=3, echo=True)
    whole = post(client, COMPLETIONS, body)
    chunks = stream(client, COMPLETIONS, body)
    assert all("usage" not in chunk for chunk in chunks)
    for choice in whole["choices"]:
        pieces = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert pieces[-1]["finish_reason"] == choice["finish_reason"]
    texts = [choice["text"] for choice in whole["choices"]]
    assert [text[:3] for text in texts] == ["one", "one", "two", "two"]
    assert texts[0] != texts[1]


def test_usage_so_far_in_every_chunk(client: FlaskClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [
        chunk["usage"]["completion_tokens"]
        for chunk in stream(client, COMPLETIONS, completion(ignore_eos=True, stream_options=options))
    ]
    assert counts == sorted(counts) and counts[0] >= 1 and counts[-1] == 8 and len(counts) > 3


def test_every_form_of_prompt_gets_the_same_answer(client: FlaskClient) -> None:
    text = post(client, COMPLETIONS, completion())["choices"][0]["text"]
    served_ids = fake_text_model().encode("once")
    for prompt in (["once"], served_ids, [served_ids]):
        assert post(client, COMPLETIONS, completion(prompt=prompt))["choices"][0]["text"] == text
    echoed = post(client, COMPLETIONS, completion(prompt=served_ids, echo=True))["choices"][0]["text"]
    assert echoed == "once" + text


def test_first_of_many_choices_is_what_one_would_be(client: FlaskClient) -> None:
    one = post(client, COMPLETIONS, completion(temperature=1, seed=13))
    many = post(client, COMPLETIONS, completion(temperature=1, seed=13, n=4))
    texts = [choice["text"] for choice in many["choices"]]
    assert texts[0] == one["choices"][0]["text"] and len(set(texts)) == 4
    assert [choice["index"] for choice in many["choices"]] == [0, 1, 2, 3]
    assert many["usage"]["prompt_tokens"] == 4 and many["usage"]["completion_tokens"] == 32


def test_completion_logprobs_are_aligned(client: FlaskClient) -> None:
    (choice,) = post(client, COMPLETIONS, completion(logprobs=2))["choices"]
    logprobs = choice["logprobs"]
    assert {len(values) for values in logprobs.values()} == {8}
    for token, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        # Greedy: the chosen token is the likeliest, and so the first of the two.
        assert len(top) == 2 and top[token] == value == max(top.values()) < 0
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])


def test_stop_string_ends_the_text_before_it(client: FlaskClient) -> None:
    body = completion(max_tokens=40, ignore_eos=True)
    text = post(client, COMPLETIONS, body)["choices"][0]["text"]
    stop = text[10:12]
    (choice,) = post(client, COMPLETIONS, {**body, "stop": ["\x00never", stop]})["choices"]
    assert choice["text"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"


def test_default_lengths(client: FlaskClient) -> None:
    body = completion(ignore_eos=True)
    del body["max_tokens"]
    assert post(client, COMPLETIONS, body)["usage"]["completion_tokens"] == 16
    chat = conversation(ignore_eos=True)
    del chat["max_tokens"]
    assert post(client, CHAT, chat)["usage"]["total_tokens"] == 256


def test_appending_the_reply_to_the_conversation(client: FlaskClient) -> None:
    message = post(client, CHAT, conversation())["choices"][0]["message"]
    parts = [{"type": "text", "text": "and"}, {"type": "text", "text": "then?"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        message,
        {"role": "user", "content": parts},
    ]
    assert post(client, CHAT, conversation(messages=messages))["choices"][0]["message"]["content"]


def test_models(client: FlaskClient) -> None:
    (listed,) = client.get("/v1/models").get_json()["data"]
    assert listed == client.get(f"/v1/models/{NAME}").get_json()
    assert listed["id"] == NAME and listed["object"] == "model" and listed["max_model_len"] == 256
    answer = client.get("/v1/models/other/model")
    assert answer.status_code == 404 and answer.get_json()["error"]["code"] == "model_not_found"


def test_model_without_a_chat_template_refuses_chats() -> None:
    model = fake_text_model(has_template=False)
    model.start()
    error = post(create_app(model).test_client(), CHAT, conversation(), 400)["error"]
    assert "chat template" in error["message"]
    model.close()


def test_prompt_too_long_names_both_numbers(client: FlaskClient) -> None:
    for path, body in (
        (COMPLETIONS, completion(prompt="x" * 250)),
        (CHAT, conversation(messages=[{"role": "user", "content": "x" * 300}], max_tokens=None)),
    ):
        error = post(client, path, body, 400)["error"]
        assert error["code"] == "context_length_exceeded" and "256" in error["message"]
        assert error["param"] == ("prompt" if path == COMPLETIONS else "messages")
        assert "258" in error["message"] or "319" in error["message"], error["message"]


@pytest.fixture
def held() -> Iterator[tuple[TextModel, threading.Event]]:
    """A model with one slot and room for two more, whose steps wait for an event."""
    go_on = threading.Event()

    def wait(_: Batch) -> None:
        assert go_on.wait(20)

    model = fake_text_model(num_slots=1, max_waiting=2, on_run=wait)
    model.start()
    yield model, go_on
    go_on.set()
    model.close()


def test_full_queue_is_429_and_leaves_nothing_behind(held: tuple[TextModel, threading.Event]) -> None:
    model, go_on = held
    client = create_app(model).test_client()
    # Two of three places are free of the first request: three choices do not fit.
    running = model.generate([1], model_params())
    response = client.post(COMPLETIONS, json=completion(n=3))
    assert response.status_code == 429 and int(response.headers["Retry-After"]) >= 1
    assert response.get_json()["error"]["code"] == "overloaded"
    go_on.set()
    assert [event.finish_reason for event in running][-1] == "length"
    # What was submitted before the refusal has been cancelled: all three places are free.
    assert len(post(client, COMPLETIONS, completion(n=3))["choices"]) == 3
    assert model.stats().num_waiting == model.stats().num_running == 0


def model_params() -> Any:
    from runtime.core import SamplingParams

    return SamplingParams(max_tokens=4, ignore_eos=True)


def test_more_choices_than_fit_in_a_request(client: FlaskClient) -> None:
    error = post(client, COMPLETIONS, completion(prompt=["a"] * 11, n=3), 400)["error"]
    assert "33 choices" in error["message"] and "32" in error["message"]


def test_engine_failure_reaches_everyone() -> None:
    broken = threading.Event()

    def fail(batch: Batch) -> None:
        if broken.is_set():
            raise RuntimeError("no more memory")

    model = fake_text_model(on_run=fail)
    model.start()
    client = create_app(model).test_client()
    assert client.get("/readyz").status_code == 200
    assert post(client, COMPLETIONS, completion())
    broken.set()
    error = post(client, COMPLETIONS, completion(), 500)["error"]
    assert error["code"] == "engine_failed" and "no more memory" in error["message"]
    error = post(client, CHAT, conversation(), 503)["error"]
    assert error["code"] == "unavailable"
    for path in ("/readyz", "/healthz"):
        response = client.get(path)
        assert response.status_code == 503 and "no more memory" in response.get_json()["reason"]
    model.close()


def test_engine_failure_inside_a_stream_is_an_event() -> None:
    def fail(batch: Batch) -> None:
        if batch.past_len.max() > 6:
            raise RuntimeError("no more memory")

    model = fake_text_model(on_run=fail)
    model.start()
    response = create_app(model).test_client().post(COMPLETIONS, json=completion(stream=True))
    events = response.get_data(as_text=True).split("\n\n")
    assert response.status_code == 200 and len(events) > 2
    assert "no more memory" in json.loads(events[-2].removeprefix("data: "))["error"]["message"]
    model.close()


def test_draining_refuses_with_retry_after(served: tuple[TextModel, FlaskClient]) -> None:
    model, client = served
    assert client.get("/readyz").get_json() == {"status": "ready", "models": [NAME]}
    assert model.drain(5)
    for response in (client.get("/readyz"), client.post(COMPLETIONS, json=completion())):
        assert response.status_code == 503 and int(response.headers["Retry-After"]) >= 1
    assert client.get("/healthz").status_code == 200


def responses(client: FlaskClient) -> dict[str, float]:
    """By the status that metrics, log and trace have noted: how many answers of POST /v1/completions."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        sample.labels["status"]: sample.value
        for family in families
        for sample in family.samples
        if sample.name == "headrace_http_responses_total" and sample.labels["route"] == COMPLETIONS
    }


@pytest.mark.parametrize("num_read", [0, 1])
def test_closing_a_stream_early_frees_the_slot(num_read: int) -> None:
    model = fake_text_model(num_slots=1, step_s=0.01)
    model.start()
    app = create_app(model)
    environ = EnvironBuilder(path=COMPLETIONS, json=completion(stream=True, max_tokens=200)).get_environ()
    environ["REQUEST_METHOD"] = "POST"
    body: Any = app(environ, lambda *_: lambda _: None)
    assert model.stats().num_running == 1
    # As a WSGI server does when the client is gone, perhaps before the first chunk was asked for.
    chunks = iter(body)
    for _ in range(num_read):
        next(chunks)
    body.close()
    client = app.test_client()
    assert post(client, COMPLETIONS, completion(max_tokens=1))["usage"]["completion_tokens"] == 1
    assert model.stats().num_running == 0
    if num_read:
        assert responses(client) == {"499": 1, "200": 1}, "a stream that was cut off is none that was answered"
    model.close()


@pytest.mark.parametrize("is_stream", [False, True])
def test_what_fails_before_the_first_event_has_a_status(*, is_stream: bool) -> None:
    """Clients know what to do with a status and Retry-After; of an event in a stream they know nothing."""
    model = fake_text_model(num_slots=1, step_s=0.02, max_queue_wait=0.05)
    model.start()
    client = create_app(model).test_client()
    running = client.post(COMPLETIONS, json=completion(stream=True, max_tokens=200, ignore_eos=True))
    waited = client.post(COMPLETIONS, json=completion(stream=is_stream))
    assert waited.status_code == 503 and int(waited.headers["Retry-After"]) >= 1
    assert "--max-queue-wait" in waited.get_json()["error"]["message"]
    late = client.post(COMPLETIONS, json=completion(stream=is_stream, timeout=0.001))
    assert late.status_code == 504 and late.get_json()["error"]["code"] == "timeout"
    running.close()
    model.close()


def test_a_stream_that_fails_later_counts_as_failed() -> None:
    model = fake_text_model(step_s=0.02)
    model.start()
    client = create_app(model).test_client()
    answer = client.post(COMPLETIONS, json=completion(stream=True, max_tokens=200, ignore_eos=True, timeout=0.3))
    events = answer.get_data(as_text=True).split("\n\n")
    assert answer.status_code == 200, "the head was out"
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "timeout"
    answer.close()
    assert responses(client) == {"504": 1}
    model.close()


class Panic(BaseException):
    """What PyO3 makes of a panic in Rust is no Exception either."""


@pytest.mark.parametrize("error", [Panic("index out of range"), SystemExit(1), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("is_stream", [False, True])
def test_whatever_a_view_raises_is_a_500_and_leaves_nothing_behind(error: BaseException, *, is_stream: bool) -> None:
    model = fake_text_model()
    model.start()
    models = ModelRegistry.of_one(model)
    client = create_app(models).test_client()
    token_bytes = model.token_bytes

    def broken(token_id: int) -> bytes:
        raise error

    model.token_bytes = broken  # type: ignore[method-assign]  # a bug is what this test needs
    answer = client.post(COMPLETIONS, json=completion(logprobs=1, stream=is_stream), buffered=True)
    if is_stream:
        assert answer.status_code == 200
        event = json.loads(answer.get_data(as_text=True).split("\n\n")[-2].removeprefix("data: "))
        assert event["error"]["code"] == "internal_error"
    else:
        assert answer.status_code == 500 and answer.get_json()["error"]["code"] == "internal_error"
    model.token_bytes = token_bytes  # type: ignore[method-assign]
    assert post(client, COMPLETIONS, completion())
    assert responses(client) == {"500": 1, "200": 1}
    assert models.default.current is not None and models.default.current.num_leases == 0
    model.close()


@pytest.mark.parametrize(("extra", "status"), [(0, 200), (1, 413), (100_000, 413)])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_beyond_the_limit_is_refused_and_never_cut(
    client: FlaskClient, extra: int, status: int, *, is_chunked: bool
) -> None:
    """JSON with blanks up to the limit, and behind it anything: nobody may read it as the JSON alone."""
    body = json.dumps(completion()).encode().ljust(100_000) + b"x" * extra
    # gunicorn ends the stream of a body in chunks, which has no length.
    chunked: Json = {"wsgi.input_terminated": True, "CONTENT_LENGTH": ""} if is_chunked else {}
    answer = client.post(COMPLETIONS, data=body, content_type="application/json", environ_overrides=chunked)
    assert answer.status_code == status, answer.text
    if status == 413:
        assert "100,000 bytes" in answer.get_json()["error"]["message"]


def test_metrics_count_what_happened(client: FlaskClient) -> None:
    post(client, COMPLETIONS, completion(n=2, ignore_eos=True))
    post(client, COMPLETIONS, {}, 400)
    client.get("/no/such/path", buffered=True)
    text = client.get("/metrics").get_data(as_text=True)
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["headrace_generated_tokens_total", NAME] == 16
    assert samples["headrace_prompt_tokens_total", NAME] == 8
    assert samples["headrace_requests_finished_total", NAME, "length"] == 2
    assert samples["headrace_time_to_first_token_seconds_count", NAME] == 2
    assert samples["headrace_time_per_output_token_seconds_count", NAME] == 2
    assert samples["headrace_requests_waiting", NAME] == samples["headrace_requests_running", NAME] == 0
    assert samples["headrace_kv_slots", NAME] == 4 and samples["headrace_kv_tokens", NAME] == 4 * 256
    assert samples["headrace_batch_size_sum", NAME] == 14
    assert samples["headrace_http_responses_total", COMPLETIONS, "200"] == 1
    assert samples["headrace_http_responses_total", COMPLETIONS, "400"] == 1
    assert samples["headrace_http_responses_total", "unmatched", "404"] == 1
    assert samples["headrace_request_seconds_count", COMPLETIONS] == 2


def test_a_bug_is_a_500_without_its_text(
    served: tuple[TextModel, FlaskClient], caplog: pytest.LogCaptureFixture
) -> None:
    model, client = served
    model.close()

    def broken(text: str, *, add_special_tokens: bool = True, max_tokens: int | None = None) -> list[int]:
        raise ZeroDivisionError("the secret is 42")

    model.encode = broken  # type: ignore[method-assign]  # a bug is what this test needs
    error = post(client, COMPLETIONS, completion(), 500)["error"]
    assert error["code"] == "internal_error" and "42" not in error["message"]
    assert "the secret is 42" in caplog.text


def test_every_error_class_has_a_status() -> None:
    def descendants(cls: type[HeadraceError]) -> Iterator[type[HeadraceError]]:
        for child in cls.__subclasses__():
            yield child
            yield from descendants(child)

    statuses = {cls.__name__: kind_of(cls.__new__(cls)).status for cls in descendants(HeadraceError)}
    assert statuses["InvalidRequest"] == statuses["PromptTooLong"] == 400
    assert statuses["ModelNotFound"] == 404 and statuses["Overloaded"] == 429
    assert statuses["Unavailable"] == 503 and statuses["EngineFailed"] == statuses["InvalidArtifact"] == 500


def test_the_usage_counts_cached_tokens_and_a_salt_hides_them() -> None:
    metrics = EngineMetrics()
    model = fake_text_model(observer=metrics, prefix_cache=10**6)
    model.start()
    client = create_app(model, ServerSettings(), metrics).test_client()
    prompt = "a prompt of more than two blocks of thirty-two tokens, each a byte"
    seen = []
    for salt in ("mine", "mine", "yours"):
        usage = post(client, COMPLETIONS, completion(prompt=prompt, cache_salt=salt))["usage"]
        seen.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert seen == [0, 64, 0]
    two = post(client, COMPLETIONS, completion(prompt=[prompt, prompt], n=2, cache_salt="mine"))["usage"]
    assert two["prompt_tokens_details"]["cached_tokens"] == 2 * 64  # a prompt counts once, whatever n is
    model.close()
    text = client.get("/metrics").text
    assert f'headrace_prefix_cached_tokens_total{{model="{NAME}"}} 320.0' in text
