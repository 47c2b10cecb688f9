"""Calibration statistics: right, independent of how they are cut up, resumable, and strict about what they take."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.calibration.dataset import CalibrationSet
from export.checkpoint.view import CheckpointView
from export.model.description import Site
from export.model.families.architectures import parse_config
from export.model.reference.forward import embed, load_block, load_norm, rotary_tables, run_block, run_reference
from export.model.reference.operations import normed
from export.quantize.int8.model import calibrate
from export.quantize.int8.ranges import scale_of
from export.quantize.int8.sensitivity import FOLD
from export.quantize.int8.smoothquant import smoothing_vector
from export.quantize.rounding.int8 import rounded_activations
from export.quantize.statistics.activation_stats import NUM_FOLDS, SiteStatistics
from export.quantize.statistics.collect import chunks_of, collect_statistics
from export.quantize.statistics.store import load_arrays, save_arrays, statistics_from_arrays, statistics_to_arrays
from export.sources.open import open_checkpoint
from runtime.errors import CalibrationFailed
from tests.support.tiny.checkpoint import config_of, write_checkpoint

RAW = config_of("llama")
CONFIG = parse_config(RAW)


def some_sequences(num: int = 6, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 320, int(rng.integers(2, 30))).tolist() for _ in range(num)]


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return open_checkpoint(write_checkpoint(tmp_path / "model", RAW))


def test_maxima_of_the_first_layer_are_those_of_its_norm(tmp_path: Path, model: Any) -> None:
    sequences = some_sequences()
    statistics = collect_statistics(model, CONFIG, sequences, tmp_path / "work")
    embeddings, block = model.load("model.embed_tokens.weight"), load_block(model, CONFIG.blocks[0])
    entry, norm = statistics[Site(0, "qkv")], CONFIG.blocks[0].attention_norm
    assert norm is not None
    for fold in range(NUM_FOLDS):
        ids = [token for sequence in sequences[fold::NUM_FOLDS] for token in sequence]
        expected = np.abs(normed(embeddings[ids], block.norms[norm.name], norm)).max(0)
        assert np.array_equal(entry.absmax[fold], expected)
    assert entry.num_tokens == sum(map(len, sequences))
    assert len(statistics) == CONFIG.num_layers * 6 + 1 and CONFIG.head.linear.site in statistics


@given(st.lists(st.integers(1, 200), min_size=1, max_size=20))
def test_chunks_cover_every_token_once(lengths: list[int]) -> None:
    sequences = [[0] * length for length in lengths]
    chunks = list(chunks_of(sequences, CONFIG, limit=64))
    assert [idx for chunk in chunks for idx in chunk.sequence_idx] == list(range(len(lengths)))
    assert [chunk.stop for chunk in chunks][-1] == sum(lengths)
    for chunk, after in pairwise(chunks):
        assert chunk.stop == after.start
    for chunk in chunks:
        assert chunk.stop - chunk.start <= 64 or len(chunk.sequence_idx) == 1
        assert int(chunk.edges[-1]) == chunk.stop - chunk.start


class _Interrupted(CheckpointView):
    """A checkpoint whose user presses Ctrl-C when a tensor is read."""

    def __init__(self, inner: Any, name: str) -> None:
        super().__init__(inner)
        self._name = name

    def load(self, name: str) -> Any:
        if name == self._name:
            raise KeyboardInterrupt
        return super().load(name)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, model: Any) -> None:
    sequences, work = some_sequences(), tmp_path / "work"
    whole = collect_statistics(model, CONFIG, sequences, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        collect_statistics(_Interrupted(model, "model.layers.2.mlp.up_proj.weight"), CONFIG, sequences, work)
    # The first two layers are done: reading them again would be an interruption.
    resumed = collect_statistics(_Interrupted(model, "model.layers.1.mlp.up_proj.weight"), CONFIG, sequences, work)
    assert resumed.keys() == whole.keys()
    for site, entry in whole.items():
        assert np.array_equal(resumed[site].absmax, entry.absmax)
        assert np.array_equal(resumed[site].histogram, entry.histogram)


def test_an_interrupted_calibration_measures_the_same_costs(tmp_path: Path, model: Any) -> None:
    text = CalibrationSet(some_sequences(), {})
    whole = calibrate(model, CONFIG, text, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        calibrate(_Interrupted(model, "model.layers.2.mlp.up_proj.weight"), CONFIG, text, tmp_path / "work")
    resumed = calibrate(_Interrupted(model, "model.layers.1.mlp.up_proj.weight"), CONFIG, text, tmp_path / "work")
    assert resumed.costs == whole.costs and resumed.ranges == whole.ranges
    assert [cost.site for cost in whole.costs] == [linear.site for linear in CONFIG.linears]
    # All is done: neither a layer nor the LM head is read again.
    again = calibrate(_Interrupted(model, "lm_head.weight"), CONFIG, text, tmp_path / "work")
    assert again.costs == whole.costs


def test_a_cost_is_the_divergence_of_the_model_with_that_input_rounded(tmp_path: Path, model: Any) -> None:
    """Measured once more, with whole models and log-softmaxes in double precision."""
    sequences = some_sequences(8)
    found = calibrate(model, CONFIG, CalibrationSet(sequences, {}), tmp_path)
    heads = sequences[FOLD::NUM_FOLDS]
    exact = run_reference(model, CONFIG, heads)
    site = Site(1, "down")
    absmax, chosen = found.statistics[site].absmax, found.ranges[site].one_pass
    others = np.delete(absmax, FOLD, axis=0).max(0)
    weight = model.load("model.layers.1.mlp.down_proj.weight")
    vector = smoothing_vector(others, np.abs(weight).max(0), chosen.strength, site=site, config=CONFIG)
    scale = scale_of(others, vector, chosen.end)
    x, edges = embed(model, CONFIG.embedding, heads), np.cumsum([0, *map(len, heads)])
    for block in CONFIG.blocks:
        weights = load_block(model, block)

        def product(kind: str, h: Any, rows: Any, layer: int = block.layer, weights: Any = weights) -> Any:
            is_rounded = Site(layer, kind) == site
            return weights.product(kind, rounded_activations(h / vector, scale) * vector if is_rounded else h)

        x = run_block(weights, block, x, edges, rotary_tables(CONFIG, 40), product=product)
    x = normed(x, load_norm(model, CONFIG.final_norm), CONFIG.final_norm)
    kl = []
    for idx, (start, stop) in enumerate(pairwise(edges)):
        p, q = (
            logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64), axis=-1, keepdims=True)
            for logits in (exact.logits(idx, 0, len(heads[idx])), exact.head.logits(x[start:stop]))
        )
        kl += (np.exp(p) * (p - q)).sum(-1).tolist()
    (cost,) = (cost for cost in found.costs if cost.site == site)
    assert cost.kl == pytest.approx(np.mean(kl), rel=0.02, abs=1e-8) and cost.kl > 1e-7


def test_other_text_starts_anew(tmp_path: Path, model: Any) -> None:
    work = tmp_path / "work"
    collect_statistics(model, CONFIG, some_sequences(seed=1), work)
    again = collect_statistics(model, CONFIG, some_sequences(seed=2), work)
    fresh = collect_statistics(model, CONFIG, some_sequences(seed=2), tmp_path / "other")
    assert all(np.array_equal(again[site].absmax, entry.absmax) for site, entry in fresh.items())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named(value: float) -> None:
    x = np.ones((3, 5), np.float32)
    x[1, 4] = value
    with pytest.raises(CalibrationFailed, match=r"^channel 4 of the input of layers\.7\.down is not finite"):
        SiteStatistics.empty(5).update(x, 0, Site(7, "down"))


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_a_broken_weight_is_an_error_not_a_range(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", RAW)
    from safetensors.numpy import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.self_attn.v_proj.weight"][0] = 3e38  # finite itself
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CalibrationFailed, match=r"layers\.1\.(v|o)"):
        collect_statistics(open_checkpoint(source), CONFIG, some_sequences(), tmp_path / "work")


@settings(max_examples=25)
@given(st.floats(0.001, 1000), st.integers(1, 60))
def test_percentiles_are_right_within_a_bin(scale: float, num_rows: int) -> None:
    x = (np.random.default_rng(0).standard_normal((num_rows, 64)) * scale).astype(np.float32)
    entry = SiteStatistics.empty(64)
    entry.update(x, 0, Site(0, "qkv"))
    exact = float(np.quantile(np.abs(x[::16]), 0.9, method="inverted_cdf"))
    assert exact <= entry.percentile(0.9) * 1.0001 <= exact * 2**0.25 * 1.0002


def test_statistics_survive_the_file(tmp_path: Path, model: Any) -> None:
    statistics = collect_statistics(model, CONFIG, some_sequences(), tmp_path / "work")
    file = tmp_path / "s.npz"
    save_arrays(file, statistics_to_arrays(statistics))
    found = statistics_from_arrays(load_arrays(file), file)
    assert found.keys() == statistics.keys()
    assert all(np.array_equal(found[site].square_sum, entry.square_sum) for site, entry in statistics.items())


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 half"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "s.npz"
    file.write_bytes(content)
    with pytest.raises(CalibrationFailed, match=r"s\.npz .*calibrate again"):
        statistics_from_arrays(load_arrays(file), file)
