"""The command in a process of its own: help is instant, and a bad command line ends in one line with exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest

from headrace import VERBS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_is_instant_because_it_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys, headrace
try:
    headrace.main({arguments!r})
except SystemExit as end:
    assert not end.code
heavy = {{"numpy", "onnxruntime", "onnx", "onnx_ir", "flask", "gunicorn", "tokenizers", "jinja2", "huggingface_hub"}}
sys.exit(", ".join(sorted(heavy & set(sys.modules))) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: headrace" in done.stdout


@pytest.mark.parametrize("arguments", [["nonsense"], ["export"], ["serve", "--port", "many", "x"]], ids=" ".join)
def test_a_bad_command_line_ends_with_exit_code_2(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "headrace", *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr
