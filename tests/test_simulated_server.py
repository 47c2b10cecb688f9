"""The whole HTTP server on the simulated GPU, 32 requests at once: the tokens that ONNX Runtime gives."""

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx
import pytest

from export.pipeline import ExportOptions, export_model
from runtime.artifact import Artifact
from tests.byte_tokenizer import CONFIG, byte_level_hf
from tests.fake_text_model import VOCAB_SIZE
from tests.server_process import PATIENCE_S, running_server, spawn
from tests.sim_session import write_engine
from tests.tiny_checkpoint import config_of, write_checkpoint

NUM_REQUESTS = 32
LIMITS = ("--max-batch", "8", "--prefill-chunk", "32", "--max-len", "128")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A random model in fp32 with a byte tokenizer, in both dialects, with a simulated engine."""
    directory = tmp_path_factory.mktemp("served")
    source = write_checkpoint(directory / "checkpoint", config_of("llama", vocab_size=VOCAB_SIZE))
    byte_level_hf().save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    options = ExportOptions(model=str(source), out=directory / "artifact", dialects=("ort", "trt"))
    artifact = export_model(options)
    write_engine(artifact, max_batch=8, chunk=32, capacity=128)
    return artifact


def body_of(idx: int) -> dict[str, Any]:
    """Prompts of several lengths; greedy, top-k (both from candidates) and nucleus sampling (from whole rows)."""
    sampling: list[dict[str, Any]] = [
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 0.9, "top_k": 20, "seed": idx},
        {"temperature": 0.9, "top_p": 0.9, "seed": idx},
    ]
    prompt = "The mill wheel turns. " * (1 + idx % 4) + str(idx)
    return {"model": "checkpoint", "prompt": prompt, "max_tokens": 4 + idx % 9, "ignore_eos": True, **sampling[idx % 3]}


def answers(artifact: Artifact, device: str) -> list[tuple[str, list[str]]]:
    """Text and tokens of every request, all sent at once."""
    flags = (str(artifact.path), "--device", device, *LIMITS)
    with running_server(*flags, module="tests.sim_server") as server, httpx.Client(timeout=60) as client:

        def ask(idx: int) -> tuple[str, list[str]]:
            reply = client.post(f"{server.url}/v1/completions", json=body_of(idx))
            assert reply.status_code == 200, reply.text
            choice = reply.json()["choices"][0]
            return choice["text"], (choice["logprobs"] or {}).get("tokens", [])

        with ThreadPoolExecutor(NUM_REQUESTS) as pool:
            found = list(pool.map(ask, range(NUM_REQUESTS)))
        assert server.metric("headrace_batch_size_sum") > server.metric("headrace_batch_size_count"), (
            "rows ran together"
        )
        server.signal(signal.SIGTERM)
        code, _, err = server.wait()
        assert (code, err) == (0, "")
        return found


def test_the_tokens_of_32_requests_at_once_are_onnx_runtimes(artifact: Artifact) -> None:
    """Against the `ort` dialect on the CPU, another graph: in fp32 no two tokens of these answers are close enough for
    another order of sums to swap them."""
    assert answers(artifact, "tensorrt") == answers(artifact, "cpu")


def test_an_engine_that_cannot_be_used_ends_the_server_with_one_line(artifact: Artifact) -> None:
    flags = (str(artifact.path), "--device", "tensorrt", "--max-len", "128", "--prefill-chunk", "64", "--port", "0")
    process = spawn(*flags, module="tests.sim_server")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    assert "--prefill-chunk 64 is beyond the 32 tokens" in err
