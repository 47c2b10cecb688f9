"""Attention of the native operators against ONNX Runtime's GroupQueryAttention, and against what the machine can do.

usage: python -m benchmarks.native_attention [--heads 9] [--kv-heads 3] [--head-dim 64] [--threads 2] [--cases NAME ...]

A session of several attention layers with a cache of its own each, more than the processor's caches hold, so that every
run reads memory. The sides are measured in turn. `bandwidth` is the share of the read bandwidth that the keys and
values alone make; `peak` the share of a float32 matrix product's speed that both products make. Prints a table, then
one JSON line.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from runtime.commands.roofline import Peaks, describe_machine, measure_peaks
from runtime.native.library import operators_for

MICROSOFT, NATIVE = "com.microsoft", "headrace"
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int8": TensorProto.INT8}
OPERATORS = {"float32": "Attention", "float16": "AttentionFloat16", "int8": "AttentionInt8"}
CACHE_BYTES = 200e6
"""Of all layers: several times a large L3 cache."""
MAX_LAYERS = 30


class Case(NamedTuple):
    """One kind of run: rows, new tokens of each, tokens in the cache before."""

    rows: int
    tokens: int
    past: int

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.tokens}@{self.past}"


CASES = (Case(1, 1, 180), Case(1, 1, 2000), Case(1, 1, 16000), Case(8, 1, 180), Case(32, 1, 180), Case(32, 1, 700),
         Case(1, 128, 0), Case(1, 512, 0), Case(1, 128, 4000), Case(1, 16, 1000))  # fmt: skip


class Heads(NamedTuple):
    """Sizes of a layer."""

    num: int
    kv: int
    dim: int

    def flops(self, case: Case) -> float:
        """Of both products, for the keys that causal attention sees."""
        keys = sum(case.past + idx + 1 for idx in range(case.tokens))
        return 4.0 * case.rows * keys * self.num * self.dim

    def kv_bytes(self, case: Case, dtype: str) -> float:
        return 2.0 * case.rows * (case.past + case.tokens) * self.kv * self.dim * np.dtype(dtype).itemsize


def graph_of(heads: Heads, case: Case, dtype: str, layers: int, capacity: int, *, is_native: bool) -> bytes:
    """A model of attention layers side by side that read the same qkv."""
    width = (heads.num + 2 * heads.kv) * heads.dim
    rows = case.rows * case.tokens
    shape = [rows, width] if is_native else [case.rows, case.tokens, width]
    inputs = [helper.make_tensor_value_info("qkv", TensorProto.FLOAT, shape)]
    ints = {
        "slot": [case.rows],
        "past_len": [case.rows],
        "query_len": [case.rows],
        "last_idx": [case.rows],
        "total": [],
    }
    inputs += [helper.make_tensor_value_info(name, TensorProto.INT32, dims) for name, dims in ints.items()]
    tables = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [capacity, heads.dim // 2]) for name in ("cos", "sin")
    ]
    scales = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [heads.kv * heads.dim]) for name in ("ks", "vs")]
    inputs += tables + scales
    outputs, nodes = [], []
    cache = [case.rows, heads.kv, capacity, heads.dim]
    steps = ["ks", "vs"] if dtype == "int8" else ["", ""]
    for layer in range(layers):
        past, present = ([f"{when}.{layer}.{kv}" for kv in "kv"] for when in ("past", "present"))
        inputs += [helper.make_tensor_value_info(name, TYPES[dtype], cache) for name in past]
        outputs += [helper.make_tensor_value_info(name, TYPES[dtype], cache) for name in present]
        outputs.append(
            helper.make_tensor_value_info(f"out.{layer}", TensorProto.FLOAT, [*shape[:-1], heads.num * heads.dim])
        )
        made = [f"out.{layer}", *present]
        if is_native:
            taken = ["qkv", *past, "slot", "past_len", "query_len", "cos", "sin", "", "", *steps]
            nodes.append(helper.make_node(OPERATORS[dtype], taken, made, domain=NATIVE, num_heads=heads.num,
                                          kv_num_heads=heads.kv, scale=heads.dim**-0.5))  # fmt: skip
        else:
            quantized: dict[str, Any] = dict.fromkeys(("k_quant_type", "v_quant_type"), "PER_CHANNEL")
            quantized["kv_cache_bit_width"] = 8
            taken = ["qkv", "", "", *past, "last_idx", "total", "cos", "sin", "", "", "", *steps, "", "", "query_len"]
            nodes.append(helper.make_node("GroupQueryAttention", taken, made, domain=MICROSOFT, num_heads=heads.num,
                                          kv_num_heads=heads.kv, do_rotary=1,
                                          **(quantized if dtype == "int8" else {})))  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(NATIVE if is_native else MICROSOFT, 1)]
    graph = helper.make_graph(nodes, "attention", inputs, outputs)
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def make_run(
    heads: Heads, case: Case, dtype: str, layers: int, threads: int, *, is_native: bool
) -> Callable[[], object]:
    """A function that runs all layers once."""
    import onnxruntime

    capacity = case.past + case.tokens
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    # Threads that wait by spinning would take a core from the side that is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if is_native:
        options.register_custom_ops_library(str(operators_for(threads)))
    model = graph_of(heads, case, dtype, layers, capacity, is_native=is_native)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    rng = np.random.default_rng(0)
    shape = (case.rows, heads.kv, capacity, heads.dim)
    width = (heads.num + 2 * heads.kv) * heads.dim
    tokens = (case.rows * case.tokens,) if is_native else (case.rows, case.tokens)
    given: dict[str, NDArray[Any]] = {
        "qkv": rng.standard_normal((*tokens, width), dtype=np.float32),
        "slot": np.arange(case.rows, dtype=np.int32),
        "past_len": np.full(case.rows, case.past, np.int32),
        "query_len": np.full(case.rows, case.tokens, np.int32),
        "last_idx": np.full(case.rows, capacity - 1, np.int32),
        "total": np.array(capacity, np.int32),
        **{name: np.full((capacity, heads.dim // 2), 0.7, np.float32) for name in ("cos", "sin")},
        **{name: np.full(heads.kv * heads.dim, 0.02, np.float32) for name in ("ks", "vs")},
    }
    taken = {value.name for value in session.get_inputs()}
    for name in given.keys() & taken:
        binding.bind_cpu_input(name, given[name])
    block = rng.standard_normal(1 << 20, dtype=np.float32) * (40 if dtype == "int8" else 1)
    for layer in range(layers):
        for kv in "kv":
            value = onnxruntime.OrtValue.ortvalue_from_numpy(np.resize(block, shape).astype(dtype))
            binding.bind_ortvalue_input(f"past.{layer}.{kv}", value)
            binding.bind_ortvalue_output(f"present.{layer}.{kv}", value)
        binding.bind_output(f"out.{layer}", "cpu")
    return lambda: session.run_with_iobinding(binding)


def measure(heads: Heads, case: Case, dtype: str, threads: int, peaks: Peaks) -> dict[str, Any]:
    """Microseconds of a layer, ours and ONNX Runtime's in turn."""
    wanted = CACHE_BYTES / heads.kv_bytes(case, dtype)
    layers = max(2, min(MAX_LAYERS, round(wanted)))
    sides = {}
    for side in ("native", "ort"):
        if side == "native" or dtype != "float16":  # its float16 cache wants a float16 model
            sides[side] = make_run(heads, case, dtype, layers, threads, is_native=side == "native")
    times: dict[str, list[float]] = {side: [] for side in sides}
    stop_at = time.perf_counter() + 1.0
    while time.perf_counter() < stop_at or len(times["native"]) < 4:
        for side, run in sides.items():
            started = time.perf_counter()
            run()
            times[side].append((time.perf_counter() - started) / layers)
    taken = {side: statistics.median(values[1:]) for side, values in times.items()}
    return {
        "case": case.name,
        "cache": dtype,
        "native_us": taken["native"] * 1e6,
        "ort_us": taken["ort"] * 1e6 if "ort" in taken else None,
        "bandwidth": heads.kv_bytes(case, dtype) / taken["native"] / peaks.read,
        "peak": heads.flops(case) / taken["native"] / peaks.gemm,
    }


def rows_of(found: list[dict[str, Any]]) -> Iterator[str]:
    """The table."""
    names = f"{'native us':>10} {'ort us':>10} {'ratio':>6} {'bandwidth':>10} {'peak':>6}"
    yield f"{'rows x new @ past':>18} {'cache':>8} {names}"
    for row in found:
        other = row["ort_us"]
        versus = f"{other:10.1f} {other / row['native_us']:6.2f}" if other else f"{'-':>10} {'-':>6}"
        yield (f"{row['case']:>18} {row['cache']:>8} {row['native_us']:10.1f} {versus} {row['bandwidth']:10.0%} "
               f"{row['peak']:6.0%}")  # fmt: skip


def main() -> None:
    """Measure every case with every type of cache."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES])
    parser.add_argument("--caches", nargs="+", choices=list(TYPES), default=list(TYPES))
    args = parser.parse_args()
    heads, peaks = Heads(args.heads, args.kv_heads, args.head_dim), measure_peaks(args.threads)
    cases = [case for case in CASES if args.cases is None or case.name in args.cases]
    found = [measure(heads, case, dtype, args.threads, peaks) for case in cases for dtype in args.caches]
    machine = describe_machine()
    print(f"{machine.cpu}, {args.threads} threads: {peaks.read / 1e9:.1f} GB/s, {peaks.gemm / 1e9:.0f} GFLOPS")
    print("\n".join(rows_of(found)))
    print(json.dumps({"machine": machine._asdict(), "peaks": peaks._asdict(), "heads": heads._asdict(), "runs": found}))


if __name__ == "__main__":
    main()
