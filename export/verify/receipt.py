"""Compare an exported model with its reference, and write down what was found: the receipt.

Each graph's logits on text and its greedy tokens (graph_run.py) are compared with the reference (references.py); two
dialects are compared with each other (parity.py). All run on ONNX Runtime, from the very files that are served or
compiled. Limits are in gates.py. Writes nothing but a nameless temporary file.
"""

import platform
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import IO, Any

import numpy as np

from export.model.description import ModelConfig
from export.verify.gates import gates_of
from export.verify.graph_run import GraphRun, Material, ScoredPart, material_for, run_graph
from export.verify.parity import HEAD, figure_name, parity_figures, reference_ways
from export.verify.references import Reference, ReferenceLogits
from export.verify.upcast_bf16 import runnable
from runtime.artifact.manifest import Artifact
from runtime.machine.progress import progress_bar
from runtime.session.scoring import Distance

ALL_TEXTS = "all"


def verify(
    reference: Reference, config: ModelConfig, artifact: Artifact, limits: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Measure and judge; the receipt as a JSON-able dict with `passed`, `checks` and `figures`.

    limits: replace the gates' own, by figure

    The graph runs first and is closed before the reference starts, so that their weights are never in memory together.
    """
    material = material_for(artifact, config)
    dialects = tuple(artifact.manifest.dialects)
    runs: dict[str, GraphRun] = {}
    with tempfile.TemporaryFile(dir=artifact.path) as spool:
        for dialect in dialects:
            with runnable(artifact, dialect) as what_runs:
                runs[dialect] = run_graph(what_runs, dialect, material, spool)
        continued = [
            prompt + tokens
            for run in runs.values()
            for prompt, tokens in zip(material.prompts, run.generated, strict=False)
        ]
        with reference.run(material.windows + continued, artifact.path) as states:
            figures = _compare(artifact, material, runs, states, spool)
    receipt = _receipt(artifact, material, figures, len(runs[dialects[0]].generated[0]), limits, reference.name)
    # runtime/commands/replay.py repeats this on the machine that serves the model.
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
        # Two logits closer than the noise of float sums are a tie. Quantized weights get no such allowance.
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
    """The same figures for each text, where there are several."""
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
    """Share of prompts with the reference's own tokens, and the mean share of tokens before the first difference.

    The reference reads the generated tokens, and would have generated the same ones up to the first that is not its own
    most likely token. Where two logits are closer than `tie`, either choice counts.
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
