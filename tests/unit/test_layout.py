"""The shape of the code: which way imports run, who may import what is heavy, and how long things are."""

import ast
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import TIERS

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
    "runtime": """errors machine settings core native artifact session text grammar grammar.schema text.tools
        text.chat text.model_text engine engine.speculation backends.cuda backends.environment backends.backend
        backends.nvidia backends.ort backends.openvino backends.tensorrt backends text_model commands""",
    "export": """schemes storage checkpoint.texts checkpoint checkpoint.gguf checkpoint.quantized sources model
        model.families model.checks model.reference artifact verify calibration quantize.statistics quantize.rounding
        quantize.int8 quantize.int4 quantize graph graph.ort graph.native graph.standard pipeline tensorrt cli""",
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


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


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
        ours = {name for name in imported(tree_of(file)) if name in PACKAGES}
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
        for target in modules_imported(tree_of(file), package):
            assert rooms.index(room_of(target, rooms)) <= own, f"{package}.{name} imports {target}, which is above it"


@pytest.mark.parametrize("package", ROOMS)
def test_a_folder_has_few_entries(package: str) -> None:
    folders = [ROOT / package, *(entry for entry in (ROOT / package).glob("**/*") if entry.is_dir())]
    ignored = {"__pycache__", "py.typed", "README.md", "built"}
    for folder in folders:
        entries = {entry.name for entry in folder.iterdir()} - ignored
        assert len(entries) <= MAX_ENTRIES or folder.name == "page", f"{folder.relative_to(ROOT)} has {len(entries)}"


def test_tests_stand_in_a_tier_and_share_helpers_through_support() -> None:
    """A test file says what it proves, and imports no other test: that would run, or hide, the other's fixtures."""
    tests = ROOT / "tests"
    for file in tests.glob("**/test_*.py"):
        tree = tree_of(file)
        assert file.relative_to(tests).parts[0] in TIERS, file
        assert ast.get_docstring(tree), f"{file} does not say what it proves"
        shared = [name for name in modules_imported(tree, "tests") if name.rpartition(".")[2].startswith("test_")]
        assert not shared, f"{file} imports {shared}"
    for folder in [tests, *(entry for entry in tests.glob("**/*") if entry.is_dir())]:
        names = {entry.name for entry in folder.iterdir()} - {"__pycache__", "__init__.py"}
        assert len(names) <= MAX_ENTRIES, f"{folder.relative_to(ROOT)} has {len(names)}"


@pytest.mark.parametrize("library", HEAVY)
def test_heavy_libraries_stay_where_they_are_needed(library: str) -> None:
    for package in PACKAGES:
        for file in (ROOT / package).glob("**/*.py"):
            if library in set(imported(tree_of(file))):
                assert package in HEAVY[library], f"{package}/{file.name} imports {library}"


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(ROOT)))
def test_files_and_functions_stay_short_and_say_what_they_are(file: Path) -> None:
    text = file.read_text()
    assert text.count("\n") < MAX_FILE_LINES
    assert file.stem not in {"utils", "helpers", "misc", "common"}
    tree = tree_of(file)
    assert ast.get_docstring(tree), "a module opens with what it does"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name
