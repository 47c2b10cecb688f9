"""Compare an exported model with its reference, and write down what was found: the receipt.

Three things are measured: the graph's logits on text against the reference (references.py), its greedy tokens against
the reference's choice at every step, and the graph against itself in every way the scheduler will call it (whole, in
chunks, token by token, in a ragged batch). Where the artifact has TensorRT dialects, each of their graphs is measured
in the same way, on ONNX Runtime: the very files that will be compiled; see parity.py. Thresholds are in gates.py.
Writes nothing.
"""

import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import calibration_data
from export.model.config import ModelConfig
from export.verify.gates import gates_of
from export.verify.parity import HEAD, figure_name, four_ways, parity_figures, reference_ways, run_rows
from export.verify.references import Reference, ReferenceLogits
from export.verify.widen_bf16 import runnable
from runtime.artifact.manifest import Artifact
from runtime.backends.ort.session import OrtSession
from runtime.progress import progress_bar
from runtime.session.scoring import Distance, score, windows_of
from runtime.session.session import Batch, Session

WINDOW = 512
NUM_WINDOWS = 2  # of each text, to measure a perplexity change
ALL_TEXTS = "all"
EXACT_WINDOW = 256  # a wrong float32 graph shows in one short window
NUM_GREEDY = 16  # tokens generated for each prompt
NUM_GREEDY_COMPARED = 64  # where two dialects must give the same ones
MAX_PROMPT = 32
BATCH = 8  # slots; more would cost more memory than a small model's weights
NUM_ALONE = 2  # prompts generated alone as well


@dataclass(frozen=True, slots=True)
class Material:
    """Token ids to verify on: windows of text, the text each comes from, and prompts to continue."""

    windows: list[list[int]]
    texts: list[str]
    prompts: list[list[int]]
    source: str


def material_for(artifact: Artifact, config: ModelConfig) -> Material:
    """The project's texts through the model's tokenizer; random ids where the checkpoint has none."""
    limit = artifact.manifest.dims.max_len
    is_exact = artifact.manifest.is_exact
    num_windows, window = (1, min(EXACT_WINDOW, limit)) if is_exact else (NUM_WINDOWS, min(WINDOW, limit))
    prompt = max(1, min(MAX_PROMPT, limit - NUM_GREEDY))
    if "tokenizer.json" in artifact.manifest.files:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(artifact.path / "tokenizer.json"))
        names = list(calibration_data.EVALUATION_TEXTS)[: 1 if is_exact else None]
        ids = {name: tokenizer.encode(calibration_data.verification_text(name)).ids for name in names}
        prompts = [tokenizer.encode(text).ids for text in calibration_data.verification_prompts()]
        source = "built-in text"
    else:
        rng = np.random.default_rng(0)
        ids = {"random": rng.integers(0, config.vocab_size, NUM_WINDOWS * window).tolist()}
        prompts = [rng.integers(0, config.vocab_size, 3 + row).tolist() for row in range(20)]
        source = "random ids: the checkpoint has no tokenizer"
    cut = [(name, part) for name, text in ids.items() for part in windows_of(text, window)[:num_windows]]
    return Material([part for _, part in cut], [name for name, _ in cut], [ids[:prompt] for ids in prompts], source)


class ScoredPart(NamedTuple):
    """Which positions some spooled logits belong to."""

    sequence_idx: int
    start: int
    next_ids: NDArray[np.int64]


class GraphRun(NamedTuple):
    """What the graph did: figures about itself, the greedy tokens, which logits were spooled; logits for parity.py."""

    figures: dict[str, Any]
    generated: list[list[int]]
    spooled: list[ScoredPart]
    ways: Mapping[str, NDArray[np.float32]]


def verify(
    reference: Reference, config: ModelConfig, artifact: Artifact, limits: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Measure and judge; the receipt as a JSON-able dict with `passed`, `checks` and `figures`.

    limits: instead of the gates' own, by figure

    The graph runs first and is closed before the reference starts, its logits kept in a nameless file: never are
    the graph's weights and the reference's in memory together.
    """
    material = material_for(artifact, config)
    dialects = tuple(artifact.manifest.dialects)
    runs: dict[str, GraphRun] = {}
    with tempfile.TemporaryFile(dir=artifact.path) as spool:
        for dialect in dialects:
            with runnable(artifact, dialect) as what_runs:
                runs[dialect] = _run_graph(what_runs, dialect, material, spool)
        continued = [
            prompt + tokens
            for run in runs.values()
            for prompt, tokens in zip(material.prompts, run.generated, strict=False)
        ]
        with reference.run(material.windows + continued, artifact.path) as states:
            figures = _compare(artifact, material, runs, states, spool)
    receipt = _receipt(artifact, material, figures, len(runs[dialects[0]].generated[0]), limits, reference.name)
    # What runtime/commands/replay.py repeats where the model is to be served.
    tokens = {dialect: run.generated for dialect, run in runs.items()}
    return {**receipt, "replay": {"prompts": material.prompts, "tokens": tokens}}


def _compare(
    artifact: Artifact,
    material: Material,
    runs: Mapping[str, GraphRun],
    states: ReferenceLogits,
    spool: IO[bytes],
) -> dict[str, Any]:
    """Every figure of every dialect."""
    is_exact = artifact.manifest.is_exact
    figures: dict[str, Any] = {}
    spool.seek(0)
    offset = len(material.windows)
    for dialect, run in runs.items():
        by_text = _distances(spool, run.spooled, states, artifact.manifest.dims.vocab_size, material.texts)
        distance = by_text[ALL_TEXTS]
        # Two logits closer than the float sums' own noise are a tie; rounded weights get no such allowance.
        tie = 2 * distance.max_logit_error if is_exact else 0.0
        agreement, prefix = _greedy_agreement(states, offset, material.prompts, run.generated, tie=tie)
        offset += len(run.generated)
        found = run.figures | _figures(distance) | _text_figures(by_text)
        found |= {"greedy_agreement": agreement, "greedy_prefix": prefix}
        figures |= {figure_name(dialect, name): value for name, value in found.items()}
    head = states.logits(0, 0, min(HEAD, len(material.windows[0])))
    expected = runs["ort"].ways if is_exact and "ort" in runs else reference_ways(head)
    for dialect, run in runs.items():
        if dialect != "ort":
            figures |= parity_figures(dialect, run.ways, expected)
            if "ort" in runs:
                equal = [a == b for a, b in zip(run.generated, runs["ort"].generated, strict=False)]
                figures[figure_name(dialect, "tokens_equal_to_ort")] = float(np.mean(equal))
    return figures


def _run_graph(artifact: Artifact, dialect: str, material: Material, spool: IO[bytes]) -> GraphRun:
    capacity = min(artifact.manifest.dims.max_len, max(WINDOW, MAX_PROMPT + NUM_GREEDY))
    session = OrtSession.open(artifact, num_slots=BATCH, capacity=capacity, saves_memory=True, dialect=dialect)
    is_exact, is_ort = artifact.manifest.is_exact, dialect == "ort"
    wanted = NUM_GREEDY_COMPARED if is_exact and len(artifact.manifest.dialects) > 1 else NUM_GREEDY
    # A quantized graph for TensorRT widens its weights on this CPU at every run: a second or two for 135M of them.
    prompts = material.prompts if is_exact or is_ort else material.prompts[:BATCH]
    try:
        num_greedy = min(wanted, capacity - max(map(len, prompts)))
        batched: list[list[int]] = []
        with progress_bar("generate", total=num_greedy * -(-len(prompts) // BATCH)) as bar:
            for start in range(0, len(prompts), BATCH):
                batch = prompts[start : start + BATCH]
                batched += greedy(session, batch, num_greedy, on_token=lambda: bar.update(1))
        figures: dict[str, Any] = {}
        if is_ort:
            alone = [greedy(session, [prompt], num_greedy)[0] for prompt in prompts[:NUM_ALONE]]
            figures |= self_distance(session, material.windows[0])
            figures["batch_token_agreement"] = float(np.mean([a == b for a, b in zip(alone, batched, strict=False)]))
        spooled = []
        with progress_bar("score", total=sum(map(len, material.windows)), unit="token") as bar:
            for chunk in score(session, material.windows):
                spool.write(np.ascontiguousarray(chunk.logits).data)
                spooled.append(ScoredPart(chunk.sequence_idx, chunk.start, chunk.next_ids))
                bar.update(len(chunk.next_ids))
        has_others = set(artifact.manifest.dialects) != {"ort"}
        ways = four_ways(session, material.windows[0]) if has_others else {}
    finally:
        session.close()
    return GraphRun(figures, batched, spooled, ways)


def greedy(
    session: Session,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    *,
    on_token: Callable[[], object] = lambda: None,
) -> list[list[int]]:
    """Continue all prompts together, a row each, by their likeliest tokens."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    ids = np.zeros((len(prompts), int(lengths.max())), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    past, query = np.zeros_like(lengths), lengths
    out: list[NDArray[np.int64]] = []
    for _ in range(num_tokens):
        last = np.arange(len(prompts)) * ids.shape[1] + query - 1
        ids = session.run(Batch(0, ids, past, query, last)).argmax(-1)[:, None]
        out.append(ids[:, 0])
        past, query = past + query, np.ones_like(lengths)
        on_token()
    return [[int(token) for token in row] for row in np.stack(out, 1)]


def self_distance(session: Session, window: Sequence[int]) -> Mapping[str, float]:
    """The graph against itself: one run over the window's head, and the ways a scheduler splits it.

    batch_logit_error: rows prefilled and decoded together against each row alone
    chunk_kl, chunk_logit_error: chunks and single tokens against one run; other kernels, so other float sums
    """
    ids = list(window[:64])
    whole = run_rows(session, [ids], [0], every=True).copy()
    chunked = Distance()
    for sizes in ([7, 1, 20, len(ids)], [1] * 12):
        done = 0
        for size in sizes:
            piece = ids[done : done + size]
            if len(piece) == 0:
                break
            logits = run_rows(session, [piece], [done], every=True)
            chunked.add(whole[done : done + len(piece)], logits, np.array(piece, np.int64))
            done += len(piece)
    rows = min(BATCH, session.info.num_slots)
    cuts = [1 + (row * 7) % (len(ids) - 1) for row in range(rows)]
    heads = run_rows(session, [ids[:cut] for cut in cuts], [0] * rows).copy()
    nexts = run_rows(session, [[ids[cut]] for cut in cuts], cuts).copy()
    errors = []
    for row, cut in enumerate(cuts):
        errors.append(np.abs(run_rows(session, [ids[:cut]], [0])[0] - heads[row]).max())
        errors.append(np.abs(run_rows(session, [[ids[cut]]], [cut])[0] - nexts[row]).max())
    return {
        "batch_logit_error": float(np.max(errors)),
        "chunk_logit_error": chunked.max_logit_error,
        "chunk_kl": chunked.kl,
    }


def _distances(
    spool: IO[bytes], spooled: Sequence[ScoredPart], states: ReferenceLogits, vocab_size: int, texts: Sequence[str]
) -> dict[str, Distance]:
    """How far the spooled logits are from the reference's, for each text and for all together."""
    found = {name: Distance() for name in (ALL_TEXTS, *texts)}
    with progress_bar("compare", total=sum(len(part.next_ids) for part in spooled), unit="token") as bar:
        for part in spooled:
            rows = len(part.next_ids)
            raw = spool.read(rows * vocab_size * 4)
            logits = np.frombuffer(raw, np.float32).reshape(rows, vocab_size)
            reference = states.logits(part.sequence_idx, part.start, part.start + rows)
            for name in (ALL_TEXTS, texts[part.sequence_idx]):
                found[name].add(reference, logits, part.next_ids)
            bar.update(rows)
    return found


def _figures(distance: Distance) -> dict[str, float]:
    return {
        "max_logit_error": distance.max_logit_error,
        "kl": distance.kl,
        "top1_agreement": distance.top1_agreement,
        "perplexity": distance.candidate.perplexity,
        "perplexity_reference": distance.reference.perplexity,
        "perplexity_increase": distance.perplexity_increase,
    }


def _text_figures(by_text: Mapping[str, Distance]) -> dict[str, float]:
    """The same for each text alone, where there are several."""
    names = [name for name in by_text if name != ALL_TEXTS]
    if len(names) == 1:
        return {}
    return {
        f"{figure}.{name}": value
        for name in names
        for figure, value in _figures(by_text[name]).items()
        if figure in ("kl", "top1_agreement", "perplexity_increase")
    }


def _greedy_agreement(
    states: ReferenceLogits,
    offset: int,
    prompts: Sequence[Sequence[int]],
    generated: Sequence[Sequence[int]],
    *,
    tie: float,
) -> tuple[float, float]:
    """Share of prompts whose tokens are the reference's own, and the mean share of tokens before the first difference.

    The reference reads the generated tokens; it would have generated the same ones up to the first where its own
    likeliest token differs. Where the two lie closer than `tie` either choice counts as its own.
    """
    equal, prefixes = 0, []
    for idx, (prompt, tokens) in enumerate(zip(prompts, generated, strict=False)):
        start = len(prompt) - 1
        logits = states.logits(offset + idx, start, start + len(tokens))
        chosen = logits[np.arange(len(tokens)), tokens]
        differs = np.flatnonzero(logits.max(-1) - chosen > tie)
        equal += not len(differs)
        prefixes.append((differs[0] if len(differs) else len(tokens)) / len(tokens))
    return equal / len(generated), float(np.mean(prefixes))


def _receipt(
    artifact: Artifact,
    material: Material,
    figures: Mapping[str, Any],
    num_greedy: int,
    limits: Mapping[str, float] | None,
    reference: str,
) -> dict[str, Any]:
    import onnxruntime

    precision = artifact.manifest.precision
    checks = [
        replace(gate, figure=figure_name(dialect, gate.figure)).check(figures[figure_name(dialect, gate.figure)])
        for dialect in artifact.manifest.dialects
        for gate in gates_of(dialect, precision, kv_dtype=artifact.manifest.kv.dtype, limits=limits)
    ]
    return {
        "passed": all(check["passed"] for check in checks),
        "precision": precision,
        "kv_cache": artifact.manifest.kv.dtype,
        "source": artifact.manifest.source,
        "commit": artifact.manifest.commit,
        "reference": reference,
        "material": {
            "source": material.source,
            "texts": material.texts,
            "windows": [len(window) for window in material.windows],
            "prompts": len(material.prompts),
            "greedy_tokens": num_greedy,
        },
        "graphs": {
            dialect: artifact.manifest.files[file].sha256 for dialect, file in artifact.manifest.dialects.items()
        },
        "checks": checks,
        "figures": {name: value if np.isfinite(value) else str(value) for name, value in figures.items()},
        "runtime": f"onnxruntime {onnxruntime.__version__}, CPU, {platform.machine()}",
    }
