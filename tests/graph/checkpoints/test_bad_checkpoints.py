"""A damaged or dishonest checkpoint ends in one line that names file, tensor, expected and found; nothing is left."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from headrace import main
from tests.support.byte_tokenizer import write_byte_tokenizer
from tests.support.tiny.checkpoint import config_of, write_checkpoint

WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"
Change = Callable[[Path], None]


def config(**changes: Any) -> Change:
    def change(directory: Path) -> None:
        file = directory / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def header(**changes: Any) -> Change:
    """Another entry for one tensor, over the same bytes."""

    def change(directory: Path) -> None:
        raw = (directory / WEIGHTS).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        entries = json.loads(raw[8 : 8 + length])
        entries[UP] |= changes
        text = json.dumps(entries).encode()
        (directory / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    return change


def tensor(change_of: Callable[[NDArray[Any]], NDArray[Any]]) -> Change:
    def change(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        tensors[UP] = change_of(tensors[UP])
        save_file(tensors, directory / WEIGHTS)

    return change


def raw_bytes(change_of: Callable[[bytes], bytes]) -> Change:
    def change(directory: Path) -> None:
        file = directory / WEIGHTS
        file.write_bytes(change_of(file.read_bytes()))

    return change


def without_a_shard(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    files = {name: f"model-0000{1 + idx % 3}-of-00003.safetensors" for idx, name in enumerate(sorted(tensors))}
    for file in set(files.values()) - {"model-00002-of-00003.safetensors"}:
        save_file({name: tensors[name] for name in tensors if files[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def template(text: str) -> Change:
    def change(directory: Path) -> None:
        (directory / "chat_template.jinja").write_text(text)

    return change


def with_nan(weight: NDArray[Any]) -> NDArray[Any]:
    weight[7, 5] = np.nan
    return weight


CASES: dict[str, tuple[Change, str]] = {
    "cut in the data": (
        raw_bytes(lambda raw: raw[:50_000]),
        "end at byte 537,312, and the file has 50,000",
    ),
    "cut in the header": (raw_bytes(lambda raw: raw[:100]), "its header would end at byte 3,040, and the file has 100"),
    "longer": (raw_bytes(lambda raw: raw + b"xx"), "its tensors end at byte 537,312, and the file has 537,314"),
    "another format": (raw_bytes(lambda raw: b"GGUF" + raw), "it begins with b'GGUF"),
    "another type": (
        header(dtype="F16"),
        f"tensor '{UP}' of the type F16 and the shape [96, 64] takes 12,288 bytes, and its place has 24,576",
    ),
    "another size": (header(shape=[96, 63]), "the shape [96, 63] takes 24,192 bytes, and its place has 24,576"),
    "another shape": (
        header(shape=[64, 96]),
        f"{WEIGHTS}: {UP} has the shape [64, 96], and config.json means [96, 64]",
    ),
    "integers": (header(dtype="I32"), f"{WEIGHTS}: {UP} is stored as I32; supported: F32, F16 and BF16"),
    "a row less": (tensor(lambda weight: weight[:-1]), f"{UP} has the shape [95, 64], and config.json means [96, 64]"),
    "not a number": (tensor(with_nan), f"{WEIGHTS}: tensor '{UP}' holds nan at [7, 5]"),
    "missing shard": (without_a_shard, "lacks 1 of 3 shards: model-00002-of-00003.safetensors"),
    "narrower": (config(hidden_size=32), "has the shape [320, 64], and config.json means [320, 32]"),
    "more layers": (config(num_hidden_layers=4), "there is no tensor model.layers.3."),
    "fewer layers": (config(num_hidden_layers=2), "no place for model.layers.2."),
    "more kv heads": (config(num_key_value_heads=4), "has the shape [32, 64], and config.json means [64, 64]"),
    "larger vocabulary": (
        config(vocab_size=321),
        "config.json means [321, 64]: 320 rows, and vocab_size",
    ),
    "text for a number": (config(intermediate_size="96"), "intermediate_size"),
    "unknown rope type": (config(rope_scaling={"rope_type": "mrope", "factor": 2}), "mrope"),
    "a template without end": (
        template("{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"),
        "does more than one rendering may: it takes more than 1,000,000 steps",
    ),
    "a template that calls itself": (
        template("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
        "does more than one rendering may: maximum recursion depth",
    ),
    "a range without end": (template("{% for i in range(999999999) %}{% endfor %}"), "Range too big"),
    "an attribute": (template("{{ ''.__class__.__mro__ }}"), "line 1, reaches for '__mro__', which a template may not"),
    "an attribute that prints nothing": (
        template("\n{{ messages[0]['__class__'] }}"),
        "line 2, reaches for '__class__'",
    ),
    "an attribute by a filter": (template("{{ messages|attr('__class__') }}"), "reaches for '__class__'"),
    "a change of the messages": (template("{{ messages.append(1) }}"), "access to attribute 'append' of 'list' object"),
    "another file": (template("{% include '/etc/passwd' %}"), "line 1, reads another file (include)"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_by_one_line(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, words = CASES[case]
    model = write_checkpoint(tmp_path / "model", config_of("llama"))
    write_byte_tokenizer(model)
    change(model)
    assert main(["export", str(model), "--out", str(tmp_path / "out"), "--dialect", "ort"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("headrace")]
    assert len(lines) == 1 and words in lines[0], lines
    assert {entry.name for entry in tmp_path.iterdir()} == {"model"}
