"""The int8 KV cache: scales that hold at every position, a graph that computes what numpy computes over rounded keys
and values, and results that depend neither on the neighbours of a row nor on where a prompt was cut."""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.calibration.dataset import CalibrationOptions, calibration_options
from export.model.description import RopeConfig, Rotary, Site
from export.model.families.architectures import parse_config
from export.model.reference.forward import embed, load_block, load_head, load_norm, rotary_tables, run_block
from export.model.reference.operations import Array, normed
from export.pipeline.calibrated import QuantizationOptions
from export.pipeline.export_model import ExportOptions, export_model
from export.quantize.int8.saved import load_calibration
from export.quantize.int8.smoothquant import SmoothedCheckpoint
from export.quantize.statistics.collect import collect_statistics
from export.quantize.statistics.kv_scales import kv_scales, pair_lengths
from export.sources.open import open_checkpoint
from export.verify.gates import gates_of
from export.verify.parity import run_rows
from headrace import main
from runtime.artifact.manifest import MANIFEST, Artifact, open_artifact
from runtime.backends.ort.graph import WHOLE_ROWS
from runtime.backends.ort.session import OrtSession
from runtime.commands.inspect_artifact import as_lines
from runtime.errors import InvalidSetting
from runtime.machine.memory import plan_slots
from tests.support.tiny.artifact import FEW_IDS
from tests.support.tiny.checkpoint import config_of, write_checkpoint

CAPACITY = 96


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where checkpoints and artifacts lie that tests only read."""
    return tmp_path_factory.mktemp("kv-int8")


def export_kv(root: Path, variant: str, precision: str = "fp32", **options: Any) -> Artifact:
    """The artifact of a variant, exported on first use below `root`, by default with an int8 cache."""
    source = root / variant
    if not source.is_dir():
        write_checkpoint(source, config_of(variant))
    settings = {"kv": "int8", "quantization": FEW_IDS, **options}
    out = root / f"{variant}-{precision}-{settings['kv']}"
    if out.exists():
        return open_artifact(out, allow_failed=True)
    # Random weights fail the gates of real ones in 4 bits; what matters here is measured below.
    return export_model(ExportOptions(model=str(source), out=out, precision=precision, force=True, **settings))


def open_session(artifact: Artifact, num_slots: int = 5) -> OrtSession:
    return OrtSession.open(artifact, num_slots=num_slots, capacity=CAPACITY)


def some_ids(num: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, 320, num)]


def rounded_logits(artifact: Artifact, source: Path, sequences: Sequence[Sequence[int]]) -> list[Array]:
    """The numpy reference, with keys and values rounded as the cache rounds them. Logits of every token."""
    checkpoint = open_checkpoint(str(source))
    config = parse_config(checkpoint.config)
    scales = kv_scales(load_calibration(artifact.path, config.vocab_size).statistics, config)
    edges = np.cumsum([0, *map(len, sequences)])
    tables = rotary_tables(config, max(map(len, sequences)))
    x = embed(checkpoint, config.embedding, sequences)
    for layer in range(config.num_layers):

        def store(kv: str, heads: Array, layer: int = layer) -> None:
            step = scales[layer].of(kv).reshape(heads.shape[1:])
            heads[:] = np.clip(np.rint(heads / step), -128, 127) * step  # attention reads this very array

        block = config.blocks[layer]
        x = run_block(load_block(checkpoint, block), block, x, edges, tables, observe=store)
    hidden = normed(x, load_norm(checkpoint, config.final_norm), config.final_norm)
    logits = load_head(checkpoint, config.head).logits(hidden)
    return [logits[start:stop] for start, stop in pairwise(edges)]


@given(st.integers(0, 2**31), st.sampled_from([8, 16, 64]), st.booleans(), st.booleans(), st.integers(0, 1_000_000))
def test_a_key_in_range_stays_in_range_wherever_it_stands(
    seed: int, dim: int, interleaved: bool, is_whole: bool, position: int
) -> None:
    head_dim = dim if is_whole else 2 * dim
    rotary = Rotary(rope=RopeConfig(theta=10_000.0), head_dim=head_dim, dim=dim, interleaved=interleaved)
    attention = replace(parse_config(config_of("llama")).attention, head_dim=head_dim, rotary=rotary)
    keys = np.random.default_rng(seed).standard_normal((20, 2, head_dim)).astype(np.float32)
    step = pair_lengths(np.abs(keys).max(0).reshape(-1), attention).reshape(2, head_dim) / 127
    angle = position * 10000.0 ** (-np.arange(dim // 2) / (dim // 2))
    turning = keys[..., :dim]
    first, second = (turning[..., ::2], turning[..., 1::2]) if interleaved else np.split(turning, 2, axis=-1)
    halves = (first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle))
    turned = np.stack(halves, -1).reshape(turning.shape) if interleaved else np.concatenate(halves, -1)
    assert (np.abs(turned) <= 127.001 * step[:, :dim]).all()
    assert np.allclose(step[:, dim:] * 127, np.abs(keys[..., dim:]).max(0)), "what does not turn keeps its own length"


def test_scales_of_a_smoothed_model_are_those_of_its_own_values(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_checkpoint(tmp_path / "model", config_of("llama-biases"))))
    config = parse_config(checkpoint.config)
    sequences = [some_ids(30, seed) for seed in range(4)]
    per_head = np.random.default_rng(3).uniform(0.2, 5, (config.num_kv_heads, 1, config.head_dim)).astype(np.float32)
    wide = np.broadcast_to(per_head, (config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim))
    vectors = {Site(1, "o"): wide.reshape(-1)}
    smoothed = SmoothedCheckpoint(checkpoint, config, vectors)
    divisors = {layer: smoothed.row_divisor(f"model.layers.{layer}.self_attn.v_proj.weight") for layer in range(3)}
    assert divisors[0] is None and divisors[1] is not None
    found = kv_scales(collect_statistics(checkpoint, config, sequences, tmp_path / "a"), config, divisors)
    own = kv_scales(collect_statistics(smoothed, config, sequences, tmp_path / "b"), config)
    assert found.keys() == own.keys() == {0, 1, 2}
    for layer in found:
        np.testing.assert_allclose(found[layer].value, own[layer].value, rtol=1e-4)
        np.testing.assert_allclose(found[layer].key, own[layer].key, rtol=1e-4)


@pytest.mark.parametrize("variant", ["llama-tied", "llama-mqa-wide-heads", "mistral-sliding", "qwen3-bias"])
def test_the_graph_computes_what_numpy_computes_over_rounded_keys_and_values(root: Path, variant: str) -> None:
    artifact = export_kv(root, variant)
    session, ids = open_session(artifact), some_ids(60)
    expected = rounded_logits(artifact, root / variant, [ids])[0]
    whole = run_rows(session, [ids], [0], every=True).copy()
    token_by_token = [run_rows(session, [[token]], [idx])[0].copy() for idx, token in enumerate(ids[:20])]
    # Float sums in another order, a few 1e-5; and now and then one of them tips a rounding, which moves one channel of
    # one key by a step: 1e-2 of its range, of which one attention weight's share arrives.
    for found in (whole, np.stack(token_by_token)):
        error = np.abs(found - expected[: len(found)]).max(-1)
        assert np.median(error) < 2e-4 and error.max() < 0.1
    unrounded = open_session(export_kv(root, variant, kv="compute"))
    assert np.median(np.abs(run_rows(unrounded, [ids], [0], every=True) - whole).max(-1)) > 1e-3, "nothing was rounded"


def test_a_row_gets_the_same_bits_alone_beside_others_and_in_a_copied_slot(root: Path) -> None:
    session = open_session(export_kv(root, "llama-tied"))
    rows = [some_ids(length, length) for length in (2, 30, 11, 23)]
    alone = [run_rows(session, [row], [0]).copy()[0] for row in rows]
    together = run_rows(session, rows, [0] * 4).copy()
    assert np.array_equal(together, np.stack(alone))
    # A second chunk behind four different pasts, then single tokens, one row idle.
    more = [some_ids(length, 50 + length) for length in (9, 2, 17, 5)]
    pasts = list(map(len, rows))
    seconds = run_rows(session, more, pasts).copy()
    ends = [past + len(row) for past, row in zip(pasts, more, strict=True)]
    thirds = run_rows(session, [[7]] * 4, ends).copy()
    for idx, row in enumerate(rows):
        run_rows(session, [row], [0])
        assert np.array_equal(run_rows(session, [more[idx]], [pasts[idx]])[0], seconds[idx])
        assert np.array_equal(run_rows(session, [[7]], [ends[idx]])[0], thirds[idx])
        session.copy_slot(0, 3, ends[idx])
        session.copy_slot(3, 0, ends[idx])
        assert np.array_equal(run_rows(session, [[7]], [ends[idx]])[0], thirds[idx])


@pytest.mark.parametrize("kv", ["compute", "int8"])
def test_more_threads_than_heads_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv: str) -> None:
    monkeypatch.delenv(WHOLE_ROWS, raising=False)
    # Wide heads and a long past: what the kernel would share out among threads.
    config = config_of("llama", max_position_embeddings=1024, head_dim=128, num_hidden_layers=1)
    write_checkpoint(tmp_path / "llama", config)
    artifact = export_kv(tmp_path, "llama", kv=kv)
    session = OrtSession.open(artifact, num_slots=6, capacity=1024, threads=16)
    run_rows(session, [some_ids(1000)], [0])
    for slot in range(1, 6):
        session.copy_slot(0, slot, 1000)
    alone = run_rows(session, [[7]], [1000]).copy()
    assert np.array_equal(run_rows(session, [[7]] * 6, [1000] * 6), np.repeat(alone, 6, axis=0))


def test_where_a_prompt_is_cut_reorders_sums_and_nothing_else(root: Path) -> None:
    session, ids = open_session(export_kv(root, "llama-tied")), some_ids(80)
    whole = run_rows(session, [ids], [0], every=True).copy()
    for sizes in ([40, 40], [7, 1, 30, 42], [16] * 5):
        done = 0
        for size in sizes:
            piece = run_rows(session, [ids[done : done + size]], [done], every=True)
            error = np.abs(piece - whole[done : done + size]).max(-1)
            assert np.median(error) < 1e-4 and error.max() < 0.1  # as above
            done += size


def test_a_slot_takes_a_quarter_of_the_bytes(root: Path) -> None:
    small, wide = export_kv(root, "llama-tied"), export_kv(root, "llama-tied", kv="compute")
    assert 4 * small.kv_bytes_per_token() == wide.kv_bytes_per_token()
    session = open_session(small)
    assert session.info.kv_bytes_per_token == small.kv_bytes_per_token() == 2 * 3 * 2 * 16
    budget = 3 * CAPACITY * wide.kv_bytes_per_token()
    slots = [
        plan_slots(max_batch=100, capacity=CAPACITY, bytes_per_token=artifact.kv_bytes_per_token(), budget=budget)
        for artifact in (wide, small)
    ]
    assert slots == [3, 12]


def test_every_precision_takes_an_int8_cache_and_one_calibration_serves_all(root: Path) -> None:
    first = export_kv(root, "llama", "w8a8")
    reused = QuantizationOptions(reuse=first.path)
    for precision in ("w8a16", "w4a16"):
        other = export_kv(root, "llama", precision, quantization=reused)
        assert other.manifest.kv.dtype == "int8" and other.receipt["kv_calibration"] == first.receipt["kv_calibration"]
        kept = load_calibration(other.path, 320).statistics
        assert {site.kind for site in kept} == {"k", "v"}
        ids = some_ids(40)
        plain = open_session(export_kv(root, "llama", precision, kv="compute", quantization=reused))
        near = run_rows(open_session(other), [ids], [0], every=True)
        far = run_rows(plain, [ids], [0], every=True)
        assert np.corrcoef(near.ravel(), far.ravel())[0, 1] > 0.99
    with pytest.raises(InvalidSetting, match="another shape"):
        export_kv(root, "llama-mha", "w8a16", quantization=reused)


def test_inspect_shows_the_scales_and_older_manifests_are_read(root: Path, tmp_path: Path) -> None:
    artifact = export_kv(root, "llama-tied")
    lines = "\n".join(as_lines(open_artifact(artifact.path)))
    assert "int8, scales per channel" in lines and "random ids" in lines
    limits = {gate.figure: gate.limit for gate in gates_of("ort", "fp32", kv_dtype="int8")}
    assert {check["figure"]: check["limit"] for check in artifact.receipt["checks"]} == limits
    file = copytree(export_kv(root, "llama-tied", kv="compute").path, tmp_path / "older") / MANIFEST
    raw = json.loads(file.read_text())
    del raw["kv"]["scales"]
    file.write_text(json.dumps(raw))
    assert open_artifact(file.parent).manifest.kv.scales is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dialect", "ort,trt"], "--kv int8 is for ort and native graphs"),
        (["--precision", "fp16"], "--kv int8 needs float32 attention"),
        (["--precision", "bf16", "--dialect", "trt"], "--kv int8 is for ort and native graphs"),
        (["--reuse-calibration", "nowhere"], "nowhere cannot be read as a calibration"),
    ],
)
def test_flags_that_contradict_an_int8_cache_end_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_checkpoint(tmp_path / "model", config_of("llama"))
    assert main(["export", str(source), "--kv", "int8", *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error.splitlines()[-1] and "Traceback" not in error
    assert not (tmp_path / "artifacts").exists() or not list((tmp_path / "artifacts").iterdir())


def test_calibration_flags_apply_to_an_int8_cache() -> None:
    assert calibration_options("w8a16", "a.txt", None, None, for_kv=32) == CalibrationOptions(
        source="a.txt", num_samples=32
    )
    assert calibration_options("w8a16", None, 7, None, for_kv=32).num_samples == 7
    with pytest.raises(InvalidSetting, match="--kv int8"):
        calibration_options("w8a16", "a.txt", None, None)
