"""The README names what there is: every verb, flag, route, metric, make target, precision and family."""

import re
from pathlib import Path

import pytest

from calibration_data import CALIBRATION_GROUPS, calibration_records
from export.model.families.architectures import ARCHITECTURES
from export.schemes.registry import SCHEMES
from headrace import VERBS
from serve.observe.engine_metrics import EngineMetrics

ROOT = Path(__file__).parents[2]
README = "".join(
    file.read_text() for file in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("*/README.md")))
)
"""All of them: the main one for newcomers, and each directory's own."""


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_named(verb: str) -> None:
    assert f"headrace {verb}" in README


def test_every_route_is_named() -> None:
    source = "".join(file.read_text() for file in (ROOT / "serve").glob("**/*.py"))
    routes = re.findall(r'\.(?:get|post)\("(/[^"<]*)', source)
    assert len(routes) >= 7
    assert not [route for route in routes if route.rstrip("/") not in README]


def test_every_metric_is_named() -> None:
    names = {metric.name for metric in EngineMetrics().registry.collect()}
    assert len(names) > 8
    assert not {name for name in names if name not in README}


def test_make_lists_every_target_and_variable() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):.*##", makefile, re.M))
    assert {"run", "test", "lint", "bench", "export", "serve", "help"} <= targets
    assert set(" ".join(re.findall(r"^\.PHONY: (.*)$", makefile, re.M)).split()) == targets
    (listed,) = re.findall(r"'variables: (.*)'", makefile)
    assert set(listed.split()) == set(re.findall(r"^([A-Z_]+) \?=", makefile, re.M)) - {"VENV"}


@pytest.mark.parametrize("precision", SCHEMES)
def test_every_precision_has_a_row(precision: str) -> None:
    assert f"| `{precision}` |" in README


def test_every_family_is_named() -> None:
    assert not [name for name in ARCHITECTURES if name not in README.lower()]


def test_every_file_the_readme_names_is_there() -> None:
    files = re.findall(r"`((?:export|runtime|serve|calibration_data|benchmarks|tests)/[\w.]*)`", README)
    assert len(files) > 10
    assert not [file for file in files if not (ROOT / file).exists()]


def test_ci_runs_the_readme_command() -> None:
    assert "make lint test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("group", CALIBRATION_GROUPS)
def test_the_calibration_table_counts_the_records(group: str) -> None:
    table = (ROOT / "calibration_data" / "README.md").read_text()
    assert f"| `calib_{group}.jsonl` | {len(calibration_records(group))} |" in table
