"""Real engines of a tiny model, built with tensorrt-rtx without a GPU: for every GPU and precision, and refusals."""

import json
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import onnx
import pytest

import export.tensorrt.build
from export.calibration.dataset import CalibrationOptions
from export.pipeline.calibrated import QuantizationOptions
from export.pipeline.export_model import ExportOptions, export_model
from export.tensorrt.build import PlanOptions, build_plan, check_plausible
from export.tensorrt.network import read_graph
from export.tensorrt.profiles import PlanLimits
from headrace import main
from runtime.artifact.known_hashes import sha256_of
from runtime.artifact.manifest import MANIFEST, RECEIPT, Artifact, open_artifact
from runtime.artifact.plan_files import find_plan, plans_of
from runtime.backends.tensorrt.library import TrtLibrary, open_library
from runtime.errors import InvalidArtifact, InvalidSetting, PlanBuildFailed
from tests.support.tiny.architectures import write_random
from tests.support.tiny.checkpoint import config_of, write_checkpoint
from tests.support.tiny.hybrids import HYBRIDS

ALL_GPUS = ("sm80", "sm86", "sm89", "sm120")
LIMITS = PlanLimits(max_batch=4, prefill_chunk=16, max_len=64)
NUM_LAYERS = 2
"""Of the tiny model: each takes the compiler about a second, and the second has whatever the first has not."""

ONE_GPU = PlanOptions(gpus=("sm86",), limits=LIMITS)


if platform.machine() != "x86_64":
    pytest.skip("tensorrt-rtx is installed for tests on x86-64 only", allow_module_level=True)


@pytest.fixture(scope="module")
def library() -> TrtLibrary:
    return open_library("tensorrt-rtx")


def export_tiny(
    directory: Path, precision: str, dialects: tuple[str, ...] = ("trt",), num_layers: int = NUM_LAYERS
) -> Path:
    changes = {"intermediate_size": 128, "num_hidden_layers": num_layers}
    source = write_checkpoint(directory / "checkpoint", config_of("qwen3", **changes))
    options = ExportOptions(
        model=str(source),
        out=directory / precision,
        precision=precision,
        dialects=dialects,
        force=True,
        quantization=QuantizationOptions(text=CalibrationOptions(num_samples=4, length=32)),
    )
    return export_model(options).path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In fp16; never built from, only from copies."""
    return export_tiny(tmp_path_factory.mktemp("tiny"), "fp16")


@pytest.fixture
def artifact(exported: Path, tmp_path: Path) -> Path:
    return copytree(exported, tmp_path / "artifact")


def test_one_engine_for_all_gpus_is_built_once_and_found_by_each(
    artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["engine", str(artifact), "--max-batch", "4", "--prefill-chunk", "16", "--max-len", "64"]
    assert main([*command, "--gpu", "sm120,sm80,sm86,sm89"]) == 0
    out = capsys.readouterr().out
    assert "2 attention, 4 kv_cache_update" in out and "4 rows of 64 tokens, prefill 16" in out
    opened = open_artifact(artifact)
    (plan,) = plans_of(opened)
    assert plan.info is not None and plan.problem is None
    assert plan.info.gpus == ALL_GPUS and plan.info.dialect == "trt"
    assert plan.info.graph == opened.receipt["graphs"]["trt"]
    assert plan.path.stat().st_size == plan.info.plan.size > plan.info.build["weight_bytes"]
    assert plan.info.build["peak_bytes"] < plan.info.build["predicted_peak_bytes"]
    for gpu in ALL_GPUS:
        assert find_plan(opened, target="tensorrt-rtx", version=plan.info.version, gpu=gpu).path == plan.path
    written_ns = plan.path.stat().st_mtime_ns
    assert main(command) == 0, "the same GPUs by default"
    assert "is there already" in capsys.readouterr().out
    assert plan.path.stat().st_mtime_ns == written_ns
    assert main(["engine", "--list", str(artifact)]) == 0
    assert "for sm80, sm86, sm89, sm120" in capsys.readouterr().out
    plan.path.write_bytes(plan.path.read_bytes()[:5000])
    monkeypatch.setattr("export.tensorrt.memory.available_memory", lambda: 3_000_000)
    assert main(command) == 2, "half a plan is none: it is about to be built again"
    assert "3.0 MB are free" in capsys.readouterr().err
    assert main(["engine", "--list", str(artifact)]) == 0
    assert "not usable: " in capsys.readouterr().out
    assert main(["engine", "--prune", str(artifact)]) == 0
    assert main(["engine", "--list", str(artifact)]) == 0
    assert "has no engines" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("precision", "num_layers", "num_quantize", "num_dequantize"),
    # A layer has 4 products; the tied LM head is wide but in w8a8. The MLP of w4a16's last layer has 8 bits.
    [("fp32", 1, 0, 0), ("bf16", 1, 0, 0), ("w4a16", 2, 0, 8), ("w8a8", 1, 4, 9)],
)
def test_every_precision_builds_and_keeps_its_layers(
    tmp_path: Path, precision: str, num_layers: int, num_quantize: int, num_dequantize: int
) -> None:
    artifact = open_artifact(export_tiny(tmp_path, precision, num_layers=num_layers), allow_failed=True)
    layers = build_plan(artifact, ONE_GPU).info.layers
    assert (layers["attention"], layers["kv_cache_update"]) == (num_layers, 2 * num_layers)
    if precision != "w8a8":
        assert (layers["quantize"], layers["dequantize"]) == (num_quantize, num_dequantize)
    else:
        two_pass = len([name for name in artifact.receipt["quantization"]["two_pass"] if name != "layers.1.lm_head"])
        assert layers["quantize"] == num_quantize - two_pass
        assert layers["dequantize"] == num_dequantize - two_pass


def test_the_plain_graph_builds_without_attention_layers(tmp_path: Path) -> None:
    built = build_plan(open_artifact(export_tiny(tmp_path, "fp16", ("trt-plain",), num_layers=1)), ONE_GPU)
    assert built.info.dialect == "trt-plain"
    assert not any(built.info.layers.values())


def rewrite(path: Path, name: str, change: Callable[[Any], object]) -> None:
    """Edit one of the artifact's JSON files, and its hash in the manifest."""
    content = json.loads((path / name).read_text())
    change(content)
    (path / name).write_text(json.dumps(content))
    if name != MANIFEST:
        rehash(path, name)


def rehash(path: Path, name: str) -> None:
    entry = {"size": (path / name).stat().st_size, "sha256": sha256_of(path / name)}
    rewrite(path, MANIFEST, lambda manifest: manifest["files"].update({name: entry}))


def with_graph(path: Path, change: Callable[[onnx.GraphProto], object]) -> Artifact:
    """The artifact with another graph, which its receipt names all the same."""
    file = path / "model.trt.onnx"
    model = onnx.load(file, load_external_data=False)
    change(model.graph)
    file.write_bytes(model.SerializeToString())
    rehash(path, file.name)
    rewrite(path, RECEIPT, lambda receipt: receipt["graphs"].update({"trt": sha256_of(file)}))
    return open_artifact(path)


def lengths_instead_of_a_mask(graph: onnx.GraphProto) -> None:
    """Attention's `nonpad_kv_seqlen`, which the parser takes and drops: an engine that gives wrong tokens."""
    graph.input.append(onnx.helper.make_tensor_value_info("lengths", onnx.TensorProto.INT64, ["B"]))
    for node in graph.node:
        if node.op_type == "Attention":
            del node.input[3:]
            node.input.extend(["", "", "", "lengths"])


def cache_past_the_update(graph: onnx.GraphProto) -> None:
    (node,) = (node for node in graph.node if list(node.output) == ["present.1.k"])
    node.op_type = "Identity"
    del node.input[1:], node.attribute[:]


def positions_by_themselves(graph: onnx.GraphProto) -> None:
    graph.input.append(onnx.helper.make_tensor_value_info("extra", onnx.TensorProto.INT64, ["B", "S"]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lengths_instead_of_a_mask, ["nothing reads lengths", "2 attention layers without a mask"]),
        (cache_past_the_update, ["3 kv_cache_update layers of 4"]),
        (positions_by_themselves, ["nothing reads extra"]),
    ],
)
def test_a_network_that_lost_something_is_not_built(
    artifact: Path, change: Callable[[onnx.GraphProto], object], words: list[str]
) -> None:
    with pytest.raises(PlanBuildFailed) as failed:
        build_plan(with_graph(artifact, change), ONE_GPU)
    assert all(word in str(failed.value) for word in words), str(failed.value)
    assert not list((artifact / "engines").glob("*.plan"))


def test_an_operator_that_the_parser_refuses_is_named(artifact: Path) -> None:
    def change(graph: onnx.GraphProto) -> None:
        graph.node[0].op_type = "StringNormalizer"

    with pytest.raises(PlanBuildFailed, match=r"cannot parse .*StringNormalizer"):
        build_plan(with_graph(artifact, change), ONE_GPU)


def test_only_the_graph_that_was_checked_is_compiled(artifact: Path) -> None:
    file = artifact / "model.trt.onnx"
    file.write_bytes(file.read_bytes() + b"\0")
    rehash(artifact, file.name)  # the manifest knows, the receipt does not
    with pytest.raises(InvalidArtifact, match="is not the graph that was checked"):
        read_graph(open_artifact(artifact), "trt")


def test_a_corrupted_graph_ends_with_one_line(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = artifact / "model.trt.onnx"
    data = file.read_bytes()
    file.write_bytes(data[:3000] + bytes(200) + data[3200:])
    assert main(["engine", str(artifact)]) == 2
    assert "model.trt.onnx has changed" in capsys.readouterr().err
    rehash(artifact, file.name)
    rewrite(artifact, RECEIPT, lambda receipt: receipt["graphs"].update({"trt": sha256_of(file)}))
    assert main(["engine", str(artifact)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpu", "sm90"], "--gpu sm90: tensorrt-rtx .* builds for sm75, sm80"),
        (["--gpu", "ada"], "--gpu ada"),
        (["--target", "trt"], "target 'trt' is unknown; choose one of tensorrt-rtx, tensorrt"),
        (["--target", "tensorrt"], r"tensorrt is not installed: pip install 'headrace\[tensorrt\]'"),
        (["--max-len", "300"], "--max-len 300 is more than the 256"),
        (["--all"], "--all goes with --prune"),
    ],
)
def test_what_the_user_can_mend_is_said_in_one_line(
    artifact: Path,
    flags: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # as on a machine without it
    assert main(["engine", str(artifact), *flags]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.search(words, err), err


def test_an_artifact_without_a_tensorrt_graph_says_how_to_get_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = export_tiny(tmp_path, "fp32", ("ort",), num_layers=1)
    assert main(["engine", str(path)]) == 2
    assert "export it with --dialect ort,standard" in capsys.readouterr().err


def test_a_library_that_is_too_old_or_does_not_load_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorrt_rtx.__version__", "1.6.0.1")
    with pytest.raises(InvalidSetting, match=r"tensorrt-rtx 1\.6\.0\.1 is too old, 1\.7"):
        open_library("tensorrt-rtx")


def test_a_builder_that_gives_no_engine_is_an_error(library: TrtLibrary, exported: Path, tmp_path: Path) -> None:
    graph = read_graph(open_artifact(exported), "trt")
    for nothing in (None, b""):
        with pytest.raises(PlanBuildFailed, match="ended without an engine"):
            check_plausible(library, nothing, graph)
    with pytest.raises(PlanBuildFailed, match="a part is missing"):
        check_plausible(library, bytes(graph.weight_bytes // 2), graph)
    with pytest.raises(PlanBuildFailed, match="MALFORMED_ENGINE"):
        check_plausible(library, bytes(graph.weight_bytes), graph)


def test_the_librarys_own_reason_is_told_when_a_build_fails(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 attention has no fused kernel: without leave to take it apart, the library gives None."""
    monkeypatch.setattr(export.tensorrt.build, "attentions", lambda library, network: [])
    source = open_artifact(export_tiny(artifact.parent / "wide", "fp32", num_layers=1))
    with pytest.raises(PlanBuildFailed, match=r"gave no engine: .*decomposable"):
        build_plan(source, ONE_GPU)
    assert not list((source.path / "engines").iterdir())


def test_ctrl_c_stops_a_build_and_leaves_nothing(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(monitor: Any, parent: str | None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("export.tensorrt.progress.Monitor._share", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_plan(open_artifact(artifact), ONE_GPU)
    assert not list((artifact / "engines").iterdir())


@pytest.mark.parametrize("name", ["lfm2", "qwen3_5", "bamba"])
def test_a_model_with_states_becomes_an_engine(tmp_path: Path, name: str) -> None:
    """No session of ours runs it; it shows that TensorRT takes every operator of the standard graph."""
    source = write_random(tmp_path / "checkpoint", HYBRIDS[name])
    options = ExportOptions(
        model=str(source), out=tmp_path / "artifact", dialects=("trt",), precision="fp16", force=True
    )
    artifact = export_model(options)
    layers = build_plan(artifact, ONE_GPU).info.layers
    num_attention = len(artifact.manifest.dims.kv_layers)
    has_scan = len(artifact.manifest.states) > HYBRIDS[name]["num_hidden_layers"] - num_attention
    # Beside a Scan, attention is in elementary operators.
    assert (layers["attention"], layers["kv_cache_update"]) == (0 if has_scan else num_attention, 2 * num_attention)
