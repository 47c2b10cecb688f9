"""The shape of the code: which way imports run, who may import what is heavy, how long things are, how fast help is."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from headrace import VERBS

ROOT = Path(__file__).parents[2]
PACKAGES = ("export", "runtime", "serve", "calibration_data")
MAY_IMPORT = {
    "runtime": {"runtime"},
    "export": {"export", "runtime", "calibration_data"},
    "serve": {"serve", "runtime"},
    "calibration_data": {"calibration_data"},
}
# The rooms of each package, low to high: a module imports from its own room and from those before it. A room is a
# folder, or a single module beside the folders; what no row names belongs to the folder above it.
ROOMS = {
    "runtime": """errors progress machine settings core artifact session text grammar grammar.schema text.tools
        text.chat engine backends.cuda backends.environment backends.backend backends.nvidia backends.ort
        backends.openvino backends.tensorrt backends text_model commands""",
    "export": """storage checkpoint.texts checkpoint checkpoint.gguf checkpoint.quantized sources model
        checks artifact verify calibration quantize.rounding quantize.statistics quantize.int8 quantize.int4 quantize
        graph graph.portable pipeline tensorrt cli""",
    "serve": "hosts fields replies settings access observe model_registry api app process cli",
}
MAX_ENTRIES = 13
# A serving box needs none of the first three, and an exporting one no web server. The first two only where --verify
# transformers asks for them.
HEAVY = {
    "torch": {"export"},
    "transformers": {"export"},
    "onnx": {"export"},
    "onnx_ir": {"export"},
    "gguf": {"export"},
    "safetensors": {"export"},
    "huggingface_hub": {"export"},
    "pyarrow": {"export"},
    "flask": {"serve"},
    "flask_cors": {"serve"},
    "gunicorn": {"serve"},
    "limits": {"serve"},
    "prometheus_client": {"serve"},
    "onnxruntime": {"runtime", "export"},
    "openvino": {"runtime"},
    "llguidance": {"runtime"},
}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def sources() -> list[Path]:
    return [ROOT / "headrace.py", *(file for package in PACKAGES for file in sorted((ROOT / package).glob("**/*.py")))]


def imported(tree: ast.AST) -> Iterator[str]:
    """Top-level packages imported anywhere in a module, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            yield (node.module or "").partition(".")[0]


def modules_imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Modules of a package that are imported anywhere in a module, by the name within the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == package:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                is_module = (ROOT / name.replace(".", "/")).with_suffix(".py").exists()
                yield (name if is_module else node.module or "").partition(".")[2]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_from_export_and_serve_to_runtime(package: str) -> None:
    for file in (ROOT / package).glob("**/*.py"):
        ours = {name for name in imported(ast.parse(file.read_text())) if name in PACKAGES}
        assert ours <= MAY_IMPORT[package], f"{file.name} imports {ours - MAY_IMPORT[package]}"


def room_of(module: str, rooms: Sequence[str]) -> str:
    """The longest room whose name `module` begins with, both without their package."""
    return max((room for room in rooms if f"{module}.".startswith(f"{room}.")), key=len)


@pytest.mark.parametrize("package", ROOMS)
def test_imports_between_rooms_run_from_high_to_low(package: str) -> None:
    rooms = ROOMS[package].split()
    for file in (ROOT / package).glob("**/*.py"):
        name = ".".join(file.relative_to(ROOT / package).with_suffix("").parts)
        own = rooms.index(room_of(name, rooms))
        for target in modules_imported(ast.parse(file.read_text()), package):
            assert rooms.index(room_of(target, rooms)) <= own, f"{package}.{name} imports {target}, which is above it"


@pytest.mark.parametrize("package", ROOMS)
def test_a_folder_has_few_entries(package: str) -> None:
    folders = [ROOT / package, *(entry for entry in (ROOT / package).glob("**/*") if entry.is_dir())]
    ignored = {"__pycache__", "py.typed", "README.md"}
    for folder in folders:
        entries = {entry.name for entry in folder.iterdir()} - ignored
        assert len(entries) <= MAX_ENTRIES or folder.name == "page", f"{folder.relative_to(ROOT)} has {len(entries)}"


@pytest.mark.parametrize("library", HEAVY)
def test_heavy_libraries_stay_where_they_are_needed(library: str) -> None:
    for package in PACKAGES:
        for file in (ROOT / package).glob("**/*.py"):
            if library in set(imported(ast.parse(file.read_text()))):
                assert package in HEAVY[library], f"{package}/{file.name} imports {library}"


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(ROOT)))
def test_files_and_functions_stay_short_and_say_what_they_are(file: Path) -> None:
    text = file.read_text()
    assert text.count("\n") < MAX_FILE_LINES
    assert file.stem not in {"utils", "helpers", "misc", "common"}
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module opens with what it does"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name


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
