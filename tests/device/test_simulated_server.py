"""The whole HTTP server on the simulated GPU, requests of every kind at once: the tokens that ONNX Runtime gives."""

import json
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import pytest
from jsonschema import Draft202012Validator

from export.pipeline.export_model import ExportOptions, export_model
from runtime.artifact.manifest import Artifact
from tests.support.byte_tokenizer import CONFIG, byte_level_hf
from tests.support.fake_text_model import VOCAB_SIZE
from tests.support.server_process import PATIENCE_S, running_server, spawn
from tests.support.simulated.session import write_plan_files
from tests.support.tiny.checkpoint import config_of, write_checkpoint

NUM_REQUESTS = 32
LIMITS = ("--max-batch", "8", "--prefill-chunk", "32", "--max-len", "128")
VERIFY_TOKENS = 4

LOGPROB_TOLERANCE = 1e-4
"""In nats. Both graphs sum in float32 and differ in order: the logits of this model, which reach 16, by 1.4e-5.
A wrong position, mask or cache row changes them by whole units."""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A random model in fp32 with a byte tokenizer, in both dialects, with a simulated engine."""
    directory = tmp_path_factory.mktemp("served")
    source = write_checkpoint(directory / "checkpoint", config_of("llama", vocab_size=VOCAB_SIZE))
    byte_level_hf().save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    options = ExportOptions(model=str(source), out=directory / "artifact", dialects=("ort", "trt"))
    artifact = export_model(options)
    write_plan_files(artifact, max_batch=8, chunk=32, capacity=128, verify=VERIFY_TOKENS)
    return artifact


def body_of(idx: int) -> dict[str, Any]:
    """Prompts of several lengths; greedy, top-k (both from candidates) and nucleus sampling (from whole rows)."""
    sampling: list[dict[str, Any]] = [
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 0.9, "top_k": 20, "seed": idx},
        {"temperature": 0.9, "top_p": 0.9, "seed": idx},
    ]
    prompt = "The mill wheel turns. " * (1 + idx % 4) + str(idx)
    return {"prompt": prompt, "max_tokens": 4 + idx % 9, "ignore_eos": True, **sampling[idx % 3]}


Json = dict[str, Any]


def served(artifact: Artifact, device: str, bodies: Sequence[Json], *, first: Json | None = None) -> list[Json]:
    """The replies to requests that are all sent at once; `first` is answered before any of them."""
    flags = (str(artifact.path), "--device", device, "--prefix-cache", "16MB", *LIMITS)
    with running_server(*flags, module="tests.support.simulated.server") as server, httpx.Client(timeout=60) as client:

        def ask(body: Json) -> Json:
            reply = client.post(f"{server.url}/v1/completions", json={"model": "checkpoint", **body})
            assert reply.status_code == 200, reply.text
            found: Json = reply.json()
            return found

        if first is not None:
            ask(first)
        with ThreadPoolExecutor(len(bodies)) as pool:
            found = list(pool.map(ask, bodies))
        assert server.metric("headrace_batch_size_sum") > server.metric("headrace_batch_size_count"), (
            "rows ran together"
        )
        server.signal(signal.SIGTERM)
        code, _, err = server.wait()
        assert (code, err) == (0, "")
        return found


def words_of(reply: Json) -> tuple[str, list[str], str]:
    """Text, tokens and end of a reply."""
    (choice,) = reply["choices"]
    return choice["text"], (choice["logprobs"] or {}).get("tokens", []), choice["finish_reason"]


def test_the_tokens_of_32_requests_at_once_are_onnx_runtimes(artifact: Artifact) -> None:
    """Against the `ort` dialect on the CPU, another graph: in fp32 no two tokens of these answers are close enough for
    another order of sums to swap them."""
    bodies = [body_of(idx) for idx in range(NUM_REQUESTS)]
    tensorrt, ort = (served(artifact, device, bodies) for device in ("tensorrt", "cpu"))
    assert [words_of(reply) for reply in tensorrt] == [words_of(reply) for reply in ort]


SYSTEM = "The miller answers in one word, and never twice the same. The wheel turns slowly. "
SCHEMA: Json = {
    "type": "object",
    "properties": {"wet": {"type": "boolean"}, "mill": {"enum": ["upper", "lower"]}},
    "required": ["wet", "mill"],
    "additionalProperties": False,
}


def known_beginning(idx: int) -> Json:
    """Its first 64 tokens are in the prefix cache."""
    return {"prompt": f"{SYSTEM}Question {idx}?", "max_tokens": 5 + idx, "ignore_eos": True}


def in_json(idx: int) -> Json:
    schema = {"type": "json_schema", "json_schema": {"name": "mill", "schema": SCHEMA, "strict": True}}
    # Blanks are valid between JSON's parts, and the random model likes nothing better.
    bias = {str(token_id): -100 for token_id in byte_level_hf().encode(" \n\r\t").ids}
    return {"prompt": "Tell me " * (1 + idx), "max_tokens": 60, "response_format": schema, "logit_bias": bias}


def scored(idx: int) -> Json:
    """A prompt of 30 and more tokens, all of which give logits: several runs of VERIFY_TOKENS."""
    return {"prompt": "The sluice is open. " * 2 + str(idx), "max_tokens": idx % 3, "echo": True, "logprobs": 2}


def plain(idx: int) -> Json:
    return {"prompt": "water" * (idx + 1), "max_tokens": 7, "ignore_eos": True, "logprobs": 3}


def logprobs_of(reply: Json) -> list[float]:
    return [value for value in (reply["choices"][0]["logprobs"] or {}).get("token_logprobs", []) if value is not None]


def test_every_kind_of_request_in_one_batch(artifact: Artifact) -> None:
    """Beginnings out of the cache, JSON by a schema, scored prompts and plain ones: in turn greedy, top-k and top-p."""
    kinds: list[Callable[[int], Json]] = [known_beginning, in_json, scored, plain]
    sampling: list[Json] = [{"temperature": 0}, {"temperature": 0.8, "top_k": 20}, {"temperature": 0.8, "top_p": 0.9}]
    bodies = [kind(idx) | sampling[idx] | {"seed": idx} for idx in range(3) for kind in kinds]
    tensorrt, ort = (served(artifact, device, bodies, first=known_beginning(9)) for device in ("tensorrt", "cpu"))
    assert [words_of(reply) for reply in tensorrt] == [words_of(reply) for reply in ort]
    for found, expected in zip(tensorrt, ort, strict=True):
        assert logprobs_of(found) == pytest.approx(logprobs_of(expected), abs=LOGPROB_TOLERANCE)
    for body, reply in zip(bodies, tensorrt, strict=True):
        cached = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached == (64 if body["prompt"].startswith(SYSTEM) else 0), body
        if "response_format" in body:
            Draft202012Validator(SCHEMA).validate(json.loads(reply["choices"][0]["text"]))
        if body.get("echo"):
            num_prompt = reply["usage"]["prompt_tokens"]
            assert num_prompt > 4 * VERIFY_TOKENS
            assert len(logprobs_of(reply)) == num_prompt - 1 + body["max_tokens"]


def test_an_engine_that_cannot_be_used_ends_the_server_with_one_line(artifact: Artifact) -> None:
    flags = (str(artifact.path), "--device", "tensorrt", "--max-len", "128", "--prefill-chunk", "64", "--port", "0")
    process = spawn(*flags, module="tests.support.simulated.server")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    assert "--prefill-chunk 64 is beyond the 32 tokens" in err
