"""Runs an artifact's graph on text, in the ways the scheduler will run it, and keeps its logits for a comparison.

Material is the text; `run_graph` lets the graph continue prompts, compares the graph with itself (whole, in chunks,
token by token, in a ragged batch) and writes its logits on the text to a spool file. receipt.py judges them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import calibration_data
from export.model.description import ModelConfig
from export.verify.parity import four_ways, run_rows
from runtime.artifact.manifest import Artifact, kind_of
from runtime.backends.ort.native_session import open_cpu_session
from runtime.machine.progress import progress_bar
from runtime.session.scoring import Distance, score, windows_of
from runtime.session.session import Batch, Session

WINDOW = 512
NUM_WINDOWS = 2  # of each text, to measure a perplexity change
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
    """The positions that a part of the spooled logits belongs to."""

    sequence_idx: int
    start: int
    next_ids: NDArray[np.int64]


class GraphRun(NamedTuple):
    """Results of one graph: its own figures, greedy tokens, the parts of the spool, logits for parity.py."""

    figures: dict[str, Any]
    generated: list[list[int]]
    spooled: list[ScoredPart]
    ways: Mapping[str, NDArray[np.float32]]


def run_graph(artifact: Artifact, dialect: str, material: Material, spool: IO[bytes]) -> GraphRun:
    capacity = min(artifact.manifest.dims.max_len, max(WINDOW, MAX_PROMPT + NUM_GREEDY))
    session = open_cpu_session(artifact, dialect, num_slots=BATCH, capacity=capacity, saves_memory=True)
    is_exact, is_ort = artifact.manifest.is_exact, kind_of(dialect) == "ort"
    wanted = NUM_GREEDY_COMPARED if is_exact and len(artifact.manifest.dialects) > 1 else NUM_GREEDY
    # A quantized graph for TensorRT dequantizes its weights at every run on the CPU: a second or two for 135M of them.
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
    """Continue all prompts together, a row each, greedily."""
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
    """Compare the graph with itself: one run over the window's head, and the ways a scheduler splits it.

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
