"""README.md's table of families, precisions and devices is what benchmarks/support_matrix.py prints."""

import json
from pathlib import Path

from benchmarks.support_matrix import DIALECT_OF, RECORD, Facts, cell, table
from export.model.families.table import ARCHITECTURES
from export.schemes.registry import SCHEMES

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_readme_has_the_table_of_what_was_run() -> None:
    record = json.loads(RECORD.read_text())
    assert set(record) == {f"{family} {precision}" for family in ARCHITECTURES for precision in SCHEMES}
    assert table(record) in README, "run python -m benchmarks.support_matrix and put its output into README.md"


def test_a_cell_says_how_far_a_combination_got() -> None:
    graph: Facts = {"graphs": ["ort", "trt"]}
    built: Facts = {**graph, "plans": ["trt"]}
    assert [cell({}, "fp32", "cpu"), cell({}, "bf16", "cpu")] == ["not run", "-"]
    assert [cell(graph, "fp32", device) for device in ("cpu", "tensorrt")] == ["graph tested", "graph tested"]
    assert [cell(built, "fp32", device) for device in ("cuda", "tensorrt")] == ["graph tested", "plan built"]
    assert cell({**built, "tried": ["tensorrt"]}, "fp32", "tensorrt") == "refused"
    assert cell({**built, "tried": ["tensorrt"], "devices": ["tensorrt"]}, "fp32", "tensorrt") == "run"


def test_what_was_never_tried_is_not_claimed() -> None:
    (row,) = [line for line in table({}).splitlines() if "fp32" in line]
    assert row.count("not run") == len(DIALECT_OF) and all(family in row for family in ARCHITECTURES)
