"""The real weights of SmolLM2-135M-Instruct against transformers: tensors, logits, greedy tokens, prompt scores.

All of it is in one file because transformers takes long to load the model.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

import calibration_data
from export.checkpoint.gguf.file import GgufCheckpoint
from export.sources.default_model import default_model_file
from runtime.artifact.manifest import Artifact
from runtime.backends.ort.session import OrtSession
from runtime.core import SamplingParams
from runtime.settings import EngineSettings
from runtime.text.tokenizer import Tokenizer
from runtime.text_model import open_text_model
from tests.support.engine_requests import scores_of
from tests.support.session_runs import run_in_pieces, run_ragged

pytestmark = [pytest.mark.real, pytest.mark.oracle]

# Issue 2's figure. The model has activations of several thousand in a few channels; 1e-4 is what is measured.
LOGIT_TOLERANCE = 1e-3
NUM_TOKENS = 64
NUM_TEXT = 300
"""Tokens of the text: three chunks of the engine's."""

SCORE_TOLERANCE = 1e-3
"""Of a log-probability, in nats: issue 5's figure."""

Oracle = Callable[[list[int]], NDArray[np.float32]]


@pytest.fixture(scope="module")
def transformers_model() -> Any:
    """The same GGUF file as transformers reads it, dequantized to float32."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    file = default_model_file()
    return transformers.AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    ).eval()


@pytest.fixture(scope="module")
def oracle(transformers_model: Any) -> Oracle:
    """Logits `[tokens, vocabulary]` of a text, computed by transformers."""
    import torch

    def logits(ids: list[int]) -> NDArray[np.float32]:
        with torch.no_grad():
            return np.asarray(transformers_model(torch.tensor([ids])).logits[0].numpy())

    return logits


@pytest.fixture(scope="module")
def sessions(smollm2: Artifact) -> Mapping[str, OrtSession]:
    """Both dialects, run by ONNX Runtime."""
    return {name: OrtSession.open(smollm2, num_slots=8, capacity=512, dialect=name) for name in ("ort", "trt")}


@pytest.fixture(scope="module")
def text_ids(smollm2: Artifact) -> NDArray[np.int64]:
    return np.array(Tokenizer.from_artifact(smollm2).encode(calibration_data.verification_text())[:NUM_TEXT])


@pytest.fixture(scope="module")
def expected(oracle: Oracle, text_ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits of the text, computed by transformers."""
    return oracle(text_ids.tolist())


@pytest.mark.parametrize("sizes", [[256], [1] * 64, [100, 1, 64, 91]], ids=["prefill", "decode", "chunked"])
@pytest.mark.parametrize("dialect", ["ort", "trt"])
def test_logits_equal_transformers(
    sessions: Mapping[str, OrtSession],
    expected: NDArray[np.float32],
    text_ids: NDArray[np.int64],
    dialect: str,
    sizes: list[int],
) -> None:
    logits = run_in_pieces(sessions[dialect], text_ids, sizes)
    assert np.abs(logits - expected[: sum(sizes)]).max() <= LOGIT_TOLERANCE


@pytest.mark.parametrize("dialect", ["ort", "trt"])
def test_ragged_batch_of_eight_equals_transformers(
    sessions: Mapping[str, OrtSession], expected: NDArray[np.float32], text_ids: NDArray[np.int64], dialect: str
) -> None:
    cuts = [1, 200, 60, 7, 33, 128, 2, 90]
    heads = run_ragged(sessions[dialect], [text_ids[:cut] for cut in cuts], [0] * 8)
    tails = run_ragged(sessions[dialect], [text_ids[cut : cut + 9 + cut % 5] for cut in cuts], cuts)
    for cut, head, tail in zip(cuts, heads, tails, strict=True):
        assert np.abs(head - expected[cut - 1]).max() <= LOGIT_TOLERANCE
        assert np.abs(tail - expected[cut + 8 + cut % 5]).max() <= LOGIT_TOLERANCE


class Judged(NamedTuple):
    """What transformers makes of a text."""

    likeliest: list[int]
    """The likeliest token after each token."""
    logprobs: NDArray[np.float64]
    """Log-probability of each token but the first."""


def judged(ids: list[int], logits: NDArray[np.float32]) -> Judged:
    wide = logits.astype(np.float64)
    logprobs = wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)
    return Judged(logits.argmax(-1).tolist(), logprobs[np.arange(len(ids) - 1), ids[1:]])


@pytest.fixture(scope="module")
def continued(smollm2: Artifact, oracle: Oracle) -> list[Judged]:
    """The prompts of the receipt, each with the tokens that the `ort` graph chose after it."""
    replay = smollm2.receipt["replay"]
    sequences = [prompt + tokens for prompt, tokens in zip(replay["prompts"], replay["tokens"]["ort"], strict=True)]
    return [judged(ids, oracle(ids)) for ids in sequences]


def test_greedy_tokens_equal_transformers(smollm2: Artifact, continued: list[Judged]) -> None:
    """20 prompts, 64 tokens each: what both dialects chose in ragged batches when the export verified them.

    transformers reads each finished sequence; were its own choice different anywhere, its greedy answer would be.
    """
    replay = smollm2.receipt["replay"]
    prompts, tokens = replay["prompts"], replay["tokens"]
    tokenizer = Tokenizer.from_artifact(smollm2)
    assert prompts == [tokenizer.encode(text) for text in calibration_data.verification_prompts()]
    assert len(prompts) == len(tokens["ort"]) == 20
    assert tokens["ort"] == tokens["trt"]
    for prompt, chosen, oracle in zip(prompts, tokens["ort"], continued, strict=True):
        assert len(chosen) == NUM_TOKENS
        assert oracle.likeliest[len(prompt) - 1 : -1] == chosen


def test_every_tensor_equals_what_transformers_loads(transformers_model: Any) -> None:
    """Bit for bit: both widen the same stored blocks with the same float32 formula."""
    checkpoint = GgufCheckpoint(default_model_file())
    theirs = {name: value.numpy() for name, value in transformers_model.state_dict().items()}
    assert set(theirs) - {"lm_head.weight"} == set(checkpoint.tensors)
    for name in checkpoint.tensors:
        np.testing.assert_array_equal(checkpoint.load(name), theirs[name], err_msg=name)
    for key in ("hidden_size", "head_dim", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"):
        assert checkpoint.config[key] == getattr(transformers_model.config, key), key


def test_prompt_scores_equal_those_of_transformers(
    smollm2: Artifact, continued: list[Judged], text_ids: NDArray[np.int64], expected: NDArray[np.float32]
) -> None:
    """Twenty short texts together and a long one, which is cut into chunks."""
    prompts = [*smollm2.receipt["replay"]["prompts"], text_ids.tolist()]
    model = open_text_model(smollm2.path, EngineSettings(max_batch=8, max_len=512))
    model.start()
    try:
        params = SamplingParams(max_tokens=0, prompt_logprobs=1)
        generations = [model.generate(prompt, params) for prompt in prompts]
        scored = [scores_of(list(generation)) for generation in generations]
    finally:
        model.close()
    assert len(prompts) == 21
    oracles = [*continued, judged(text_ids.tolist(), expected)]
    for prompt, scores, oracle in zip(prompts, scored, oracles, strict=True):
        assert len(scores) == len(prompt) - 1
        assert np.abs(np.array(scores) - oracle.logprobs[: len(scores)]).max() <= SCORE_TOLERANCE
        assert math.fsum(scores) < 0
