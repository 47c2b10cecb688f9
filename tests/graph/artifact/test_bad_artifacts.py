"""Damaged artifacts, and paths that are no artifact: every verb ends with one line and exit code 2."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploy import bundle
from headrace import main
from runtime.artifact.manifest import CALIBRATION, CHOICE, MANIFEST, RECEIPT, Artifact, open_artifact
from runtime.artifact.model_card import model_card
from runtime.artifact.onnx_files import external_files
from runtime.commands.inspect_artifact import as_json, as_lines
from runtime.commands.replay import replay
from runtime.errors import HeadraceError, InvalidArtifact
from runtime.settings import EngineSettings
from runtime.text_model import open_text_model
from tests.support.byte_tokenizer import write_byte_tokenizer
from tests.support.fake_session import FakeSession
from tests.support.tiny.artifact import write_listed
from tests.support.tiny.checkpoint import config_of, write_checkpoint

VERBS: dict[str, list[str]] = {
    "serve": ["serve", "ARTIFACT", "--port", "0"],
    "serve, a second model": ["serve", "--model", "a=ARTIFACT", "--port", "0"],
    "inspect": ["inspect", "ARTIFACT"],
    "verify": ["verify", "ARTIFACT", "--device", "cpu"],
    "generate": ["generate", "ARTIFACT", "-p", "x", "--device", "cpu"],
    "bench": ["bench", "ARTIFACT"],
    "eval": ["eval", "ARTIFACT", "--text", __file__],
    "fit": ["fit", "ARTIFACT", "--memory", "1GB"],
    "engine": ["engine", "ARTIFACT", "--list"],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated artifact with a tokenizer and a choice: every file that is ever read."""
    root = tmp_path_factory.mktemp("whole")
    model = write_checkpoint(root / "model", config_of("llama", num_hidden_layers=1))
    write_byte_tokenizer(model)
    flags = ["--precision", "w8a8", "--calib-samples", "4", "--calib-length", "32", "--calib", "built-in", "--force"]
    assert main(["export", str(model), "--out", str(root / "artifact"), *flags]) == 0
    row = {"precision": "w8a8", "why_not": None, "seconds": 1.0, "prefill_tokens_per_s": 1.0}
    row |= {"decode_tokens_per_s": 1.0, "file_bytes": 1, "perplexity_increase": 0.1}
    choice = {"optimized_for": "latency", "work": "a prompt", "rounds": 3, "chosen": "w8a8", "candidates": [row]}
    choice["machine"] = {"cores": 2, "cpu": "a processor", "instruction_sets": "AVX2"}
    write_listed(root / "artifact", CHOICE, json.dumps(choice).encode())
    return root / "artifact"


@pytest.fixture
def artifact(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "artifact")


def ends_with_one_line(command: list[str], path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    status = main([argument.replace("ARTIFACT", str(path)) for argument in command])
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
    assert (status, len(lines)) == (2, 1), lines
    assert lines[0].startswith(f"headrace {command[0]}: ")
    return lines[0]


PLACES: dict[str, Callable[[Path], Path]] = {
    "nothing there": lambda root: root / "nowhere",
    "a file": lambda root: touched(root / "file"),
    "below a file": lambda root: touched(root / "file") / "artifact",
    "an empty directory": lambda root: made(root / "empty"),
    "a link to nothing": lambda root: linked(root / "link", root / "nowhere"),
    "a link to itself": lambda root: linked(root / "loop", root / "loop"),
    "a manifest that is a directory": lambda root: made(root / "odd" / MANIFEST).parent,
    "a name that is too long": lambda root: root / ("x" * 300),
}


def touched(path: Path) -> Path:
    path.write_text("words")
    return path


def made(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def linked(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("place", PLACES)
def test_a_path_that_is_no_artifact(verb: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = PLACES[place](tmp_path)
    assert str(path) in ends_with_one_line(VERBS[verb], path, capsys)


def receipt_with(**changes: Any) -> Any:
    def spoil(artifact: Path) -> None:
        receipt = json.loads((artifact / RECEIPT).read_text())
        write_listed(artifact, RECEIPT, json.dumps({**receipt, **changes}).encode())

    return spoil


def manifest_with(*path: str, value: Any) -> Any:
    def spoil(artifact: Path) -> None:
        manifest = json.loads((artifact / MANIFEST).read_text())
        inner = manifest
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = value
        (artifact / MANIFEST).write_text(json.dumps(manifest))

    return spoil


SPOILED: dict[str, Any] = {
    "receipt: not JSON": lambda path: write_listed(path, RECEIPT, b"passed"),
    "receipt: not UTF-8": lambda path: write_listed(path, RECEIPT, b'{"passed": "\xff"}'),
    "receipt: a list": lambda path: write_listed(path, RECEIPT, b"[]"),
    "receipt: nested": lambda path: write_listed(path, RECEIPT, b'{"passed": true, "checks": ' + b"[" * 100_000),
    "receipt: passed without a check": receipt_with(passed=True, checks=[]),
    "receipt: a check without a value": receipt_with(checks=[{"figure": "kl"}]),
    "receipt: passed, but not its gate": receipt_with(
        passed=True,
        checks=[{"figure": "kl", "value": "nan", "limit": 1, "reason": "", "at_most": True, "passed": False}],
    ),
    "receipt: figures are a list": receipt_with(figures=[]),
    "receipt: prompts are text": receipt_with(replay={"prompts": "x", "tokens": {}}),
    "manifest: empty": lambda path: (path / MANIFEST).write_bytes(b""),
    "manifest: nested": lambda path: (path / MANIFEST).write_text('{"a":' * 100_000),
    "manifest: dialects are a list": manifest_with("dialects", value=["ort"]),
    "manifest: no dialect": manifest_with("dialects", value={}),
    "manifest: an unknown dialect": manifest_with("dialects", value={"mine": "model.onnx"}),
    "manifest: a size is text": manifest_with("files", RECEIPT, "size", value="1"),
    "manifest: a hash is a number": manifest_with("files", RECEIPT, "sha256", value=5),
    "manifest: name is a list": manifest_with("name", value=["a"]),
    "manifest: a huge format": manifest_with("kv", "past_name", value="{layer:>1000000000}.{kv}"),
    "manifest: an attribute in a format": manifest_with("kv", "present_name", value="{layer.__class__}.{kv}"),
    "manifest: layers without end": manifest_with("dims", "num_layers", value=10**11),
    "manifest: a number as bool": manifest_with("dims", "num_heads", value=True),
    "manifest: an end outside": manifest_with("eos_ids", value=[320]),
    "manifest: a type of cache": manifest_with("kv", "dtype", value="float128"),
    "manifest: NaN": lambda path: (path / MANIFEST).write_text('{"schema_version": NaN}'),
    "manifest: a file above": manifest_with("files", value={"../secret": {"size": 1, "sha256": "0" * 64}}),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_artifact_is_refused_by_every_verb(
    case: str, artifact: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    SPOILED[case](artifact)
    for command in VERBS.values():
        assert str(artifact) in ends_with_one_line(command, artifact, capsys)
    assert bundle.main([str(artifact), "--device", "cpu", "--out", str(tmp_path / "dist")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=12)
    | st.sampled_from(["{layer}", "{0.__class__}", "../x", "a" * 64, "\0", "float32", "ort"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def places_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, the whole first; of a long list the first two."""
    yield path
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from places_of(inner, (*path, name))
    elif isinstance(value, list):
        for idx, inner in enumerate(value[:2]):
            yield from places_of(inner, (*path, idx))


def replaced(value: Any, path: tuple[Any, ...], new: Any, *, is_removed: bool) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1 and is_removed:
        del copy[path[0]]
    else:
        copy[path[0]] = replaced(copy[path[0]], path[1:], new, is_removed=is_removed)
    return copy


@pytest.mark.parametrize("name", [MANIFEST, RECEIPT, CHOICE, CALIBRATION])
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # every example puts the files back
)
@given(data=st.data())
def test_whatever_a_json_file_holds_it_is_read_or_refused(name: str, artifact: Path, data: st.DataObject) -> None:
    original, manifest = (artifact / name).read_bytes(), (artifact / MANIFEST).read_bytes()
    raw = json.loads(original)
    place = data.draw(st.sampled_from(list(places_of(raw))))
    spoiled = replaced(raw, place, data.draw(VALUES), is_removed=data.draw(st.booleans()))
    content = json.dumps(spoiled).encode()
    try:
        if name == MANIFEST:
            (artifact / name).write_bytes(content)
        else:
            write_listed(artifact, name, content)
        opened = open_artifact(artifact, allow_failed=True, check_hashes=False)
        assert all(isinstance(line, str) for line in as_lines(opened))
        json.dumps([as_json(opened), model_card(opened)], allow_nan=False)
        session = FakeSession(num_slots=2, capacity=64, vocab_size=opened.manifest.dims.vocab_size)
        replay(opened, session)
    except HeadraceError as error:
        assert "\n" not in str(error)
    finally:
        (artifact / name).write_bytes(original)
        (artifact / MANIFEST).write_bytes(manifest)


def test_a_template_that_nobody_listed_is_not_used(artifact: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = json.loads((artifact / MANIFEST).read_text())
    del manifest["files"]["tokenizer_config.json"]
    (artifact / MANIFEST).write_text(json.dumps(manifest))
    (artifact / "chat_template.jinja").write_text("{{ raise_exception('mine') }}")
    (artifact / "tokenizer_config.json").write_text('{"chat_template": "mine"}')
    settings = EngineSettings(device="cpu", max_batch=1, kv_memory=10**7)
    model = open_text_model(artifact, settings, allow_failed=True)
    try:
        with pytest.raises(HeadraceError, match="has no chat template"):
            model.encode_chat([{"role": "user", "content": "x"}])
    finally:
        model.close()
    assert "chat_template.jinja is not used: manifest.json does not list it" in caplog.text
    assert "tokenizer_config.json is not used" in caplog.text


def opened_with_graph(artifact: Path, model: onnx.ModelProto) -> Artifact:
    write_listed(artifact, "model.onnx", model.SerializeToString())
    return open_artifact(artifact, allow_failed=True)


def test_weights_that_the_manifest_does_not_list_are_not_read(artifact: Path) -> None:
    model = onnx.load(artifact / "model.onnx", load_external_data=False)
    assert external_files(model.SerializeToString()) == {"weights.bin"}
    shutil.copy(artifact / "weights.bin", artifact / "other.bin")
    entries = (entry for tensor in model.graph.initializer for entry in tensor.external_data)
    next(entry for entry in entries if entry.key == "location").value = "other.bin"
    opened = opened_with_graph(artifact, model)
    with pytest.raises(InvalidArtifact, match=r"reads weights from 'other\.bin', which manifest\.json does not list"):
        opened.model_file()


def external(name: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value=name)
    return tensor


def test_external_tensors_are_found_wherever_a_graph_can_hold_them() -> None:
    inner = onnx.GraphProto(initializer=[external("in a subgraph")])
    inner.node.add().attribute.add(tensors=[external("in a list of an attribute")])
    graph = onnx.GraphProto(initializer=[external("in the graph")])
    graph.node.add().attribute.add(t=external("in an attribute"))
    graph.node.add().attribute.add(g=inner)
    graph.node.add().attribute.add(graphs=[onnx.GraphProto(initializer=[external("in a list of graphs")])])
    graph.sparse_initializer.add(values=external("in sparse values"), indices=external("in sparse indices"))
    model = onnx.ModelProto(graph=graph)
    model.functions.add().node.add().attribute.add(t=external("in a function"))
    assert external_files(model.SerializeToString()) == {
        "in a subgraph",
        "in a list of an attribute",
        "in the graph",
        "in an attribute",
        "in a list of graphs",
        "in sparse values",
        "in sparse indices",
        "in a function",
    }
