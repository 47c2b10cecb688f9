"""Peak memory of an export against the file it writes, on a random checkpoint of a given size.

usage: python benchmarks/export_memory.py [--gigabytes 2.2] [--precision fp32,fp16,w8a16]

Writes a Llama-shaped bf16 checkpoint, runs `headrace export` on it as a process of its own and reads that process's
high-water mark from the operating system. Prints a table, then one JSON line. The bound is 1.3 times the written file
plus 500 MB. Needs free disk for about four times the size asked for.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a random Llama."""

    hidden: int = 2048
    inner: int = 5632
    vocab: int = 32_000
    heads: int = 32
    kv_heads: int = 4
    num_layers: int = 1
    is_tied: bool = False

    @property
    def layer_bytes(self) -> int:
        """Of one layer in bf16."""
        kv = self.hidden * self.kv_heads // self.heads
        return 2 * self.hidden * (2 * self.hidden + 2 * kv + 3 * self.inner)

    @classmethod
    def of_size(cls, gigabytes: float) -> "Shape":
        """As many layers as make a checkpoint of about this size."""
        shape = cls()
        rest = gigabytes * 1e9 - 4 * shape.vocab * shape.hidden
        return replace(shape, num_layers=max(1, round(rest / shape.layer_bytes)))


def write_random(directory: Path, shape: Shape) -> int:
    """A sharded checkpoint of random weights, one file a layer; returns its bytes."""
    rng = np.random.default_rng(0)
    index: dict[str, str] = {}

    def save(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {
            name: (
                rng.standard_normal(size, np.float32) / np.float32(np.sqrt(size[-1]))
                if len(size) > 1
                else np.ones(size)
            ).astype(ml_dtypes.bfloat16)
            for name, size in shapes.items()
        }
        save_file(tensors, directory / file)
        index.update(dict.fromkeys(shapes, file))

    hidden, inner, kv = shape.hidden, shape.inner, shape.hidden * shape.kv_heads // shape.heads
    head = {"model.embed_tokens.weight": (shape.vocab, hidden), "model.norm.weight": (hidden,)}
    save("model-head.safetensors", head if shape.is_tied else {**head, "lm_head.weight": (shape.vocab, hidden)})
    for layer in range(shape.num_layers):
        p = f"model.layers.{layer}"
        matrices = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
        shapes: dict[str, tuple[int, ...]] = {f"{p}.self_attn.{n}_proj.weight": size for n, size in matrices.items()}
        shapes |= {f"{p}.mlp.{n}_proj.weight": (inner, hidden) for n in ("gate", "up")}
        shapes[f"{p}.mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{p}.{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
        save(f"model-{layer:03}.safetensors", shapes)
    config = {
        "model_type": "llama", "vocab_size": shape.vocab, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": shape.num_layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
        "eos_token_id": 2, "tie_word_embeddings": shape.is_tied,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sum(file.stat().st_size for file in directory.iterdir())


def peak_of_export(model: str, out: Path, flags: list[str]) -> int:
    """Export in a child process; its peak resident memory in bytes. SystemExit with what it said if it fails."""
    # A grandchild's peak counts towards this process's children, so each export gets a parent of its own.
    code = (
        "import resource, subprocess, sys; r = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode; "
        "print(r, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-m", "headrace", "export", model, "--out", str(out), *flags]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    code_text, peak_kb = done.stdout.split()
    if code_text != "0":
        raise SystemExit(done.stderr[-2000:])
    return int(peak_kb) * 1024


def measure(checkpoint: Path, out: Path, precision: str) -> dict[str, Any]:
    """Peak resident memory of an export and what it wrote, in bytes."""
    peak = peak_of_export(str(checkpoint), out, ["--precision", precision, "--force"])
    written = sum(file.stat().st_size for file in out.iterdir())
    bound = 1.3 * written + 500e6
    return {
        "precision": precision,
        "written": written,
        "peak": peak,
        "bound": bound,
        "share_of_bound": peak / bound,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--precision", default="fp32,fp16,w8a16")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        checkpoint.mkdir()
        size = write_random(checkpoint, Shape.of_size(args.gigabytes))
        print(f"checkpoint: {size / 1e9:.2f} GB in bf16")
        print(f"{'precision':12}{'written MB':>12}{'peak MB':>10}{'bound MB':>10}{'share':>8}")
        rows = []
        for precision in args.precision.split(","):
            row = measure(checkpoint, Path(scratch) / precision, precision)
            print(f"{precision:12}{row['written'] / 1e6:12,.0f}{row['peak'] / 1e6:10,.0f}{row['bound'] / 1e6:10,.0f}"
                  f"{row['share_of_bound']:8.0%}", flush=True)  # fmt: skip
            rows.append(row)
    print(json.dumps({"benchmark": "export_memory", "checkpoint_bytes": size, "rows": rows}))


if __name__ == "__main__":
    main()
