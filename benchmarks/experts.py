"""Decoding with the chosen experts against computing all of them: a random model of 1.2 billion parameters.

usage: python -m benchmarks.experts DIRECTORY [--precision w8a16] [--dialect native] [--rounds 8] [--make]

Mixtral's layers, 8 experts of which 2 are chosen. DIRECTORY keeps the model and two artifacts: `chosen` is the model,
and in `all` every token chooses all experts. Ten minutes and 8 GB for each precision the first time; `--make` makes
them and measures nothing. Steps of both sides are taken in turn, each with other random tokens. Prints a table and one
JSON line; exits with 1 if a step is not as much faster as the project wants. Two minutes.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peer_models import made
from export.model.checks.tensors import expected_tensors
from export.model.families.architectures import parse_config
from export.pipeline.export_model import ExportOptions, export_model
from runtime.artifact.manifest import open_artifact
from runtime.backends.ort.native_session import open_cpu_session
from runtime.commands.roofline import describe_machine
from runtime.session.session import Batch, Session
from tests.support.tiny.checkpoint import write_checkpoint

MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
WANTED = {1: 2.5, 16: 1.5}
"""How much faster a step of so many rows is to be."""
PAST, CAPACITY = 64, 128
STEPS = {1: 12, 16: 4}


def write_model(directory: Path) -> None:
    """config.json and model.safetensors."""
    write_checkpoint(directory, MIXTRAL, shapes=expected_tensors(parse_config(MIXTRAL)))


def export_sides(directory: Path, precision: str, dialect: str) -> dict[str, Path]:
    """The two artifacts, made if they are not there."""
    sides = {}
    for side, top_k in (("chosen", 2), ("all", MIXTRAL["num_local_experts"])):
        out = directory / f"{side}-{precision}-{dialect}"
        if not out.exists():
            model = made(directory / "model", write_model)
            config = json.dumps({**MIXTRAL, "num_experts_per_tok": top_k})
            (model / "config.json").write_text(config)
            options = ExportOptions(
                model=str(model), out=out, precision=precision, max_len=CAPACITY, force=True, dialects=(dialect,)
            )
            export_model(options)
        sides[side] = out
    return sides


def step_ms(session: Session, rng: np.random.Generator, rows: int) -> float:
    """Milliseconds of a decoding step, the median of a few."""
    times = []
    for _ in range(STEPS[rows]):
        ids = rng.integers(0, MIXTRAL["vocab_size"], (rows, 1))
        ones = np.ones(rows, np.int32)
        start = time.perf_counter()
        session.run(Batch(0, ids, ones * PAST, ones, np.arange(rows)))
        times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e3


def opened(artifact: Path, dialect: str) -> Session:
    """A session; its slots are read as if they held PAST tokens, and what they hold takes no time."""
    found = open_artifact(str(artifact), allow_failed=True)
    return open_cpu_session(found, dialect, num_slots=max(WANTED), capacity=CAPACITY)


def measure(sides: dict[str, Path], dialect: str, rounds: int) -> dict[str, Any]:
    """Milliseconds of each side and the ratio of each pair, by rows."""
    sessions = {side: opened(path, dialect) for side, path in sides.items()}
    found: dict[str, Any] = {}
    for rows, wanted in WANTED.items():
        rng = np.random.default_rng(rows)
        pairs = [{side: step_ms(session, rng, rows) for side, session in sessions.items()} for _ in range(rounds + 1)]
        ratios = sorted(pair["all"] / pair["chosen"] for pair in pairs[1:])  # the first pair warms up
        found[str(rows)] = {
            **{f"{side}_ms": float(np.median([pair[side] for pair in pairs[1:]])) for side in sessions},
            "ratio": float(np.median(ratios)),
            "lowest": ratios[0],
            "highest": ratios[-1],
            "wanted": wanted,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--precision", default="w8a16")
    parser.add_argument("--dialect", default="native")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--make", action="store_true")
    args = parser.parse_args()
    sides = export_sides(args.directory, args.precision, args.dialect)
    if args.make:
        return
    found = measure(sides, args.dialect, args.rounds)
    print(f"{args.precision}, {args.dialect}: milliseconds of a decoding step")
    print(f"{'rows':>6}{'chosen':>10}{'all':>10}{'ratio':>8}{'range':>14}{'wanted':>8}")
    for rows, row in found.items():
        spread = f"{row['lowest']:.2f}-{row['highest']:.2f}"
        print(
            f"{rows:>6}{row['chosen_ms']:>10.1f}{row['all_ms']:>10.1f}{row['ratio']:>8.2f}{spread:>14}"
            f"{row['wanted']:>8.1f}"
        )
    head = {"benchmark": "experts", "machine": describe_machine()._asdict()}
    print(json.dumps({**head, "precision": args.precision, "dialect": args.dialect, "rows": found}))
    sys.exit(any(row["ratio"] < row["wanted"] for row in found.values()))


if __name__ == "__main__":
    main()
