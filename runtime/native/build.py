"""Compiles the native operators: `make native`, or `python -m runtime.native.build`. Needs g++ or clang++.

A source whose header has a table for each variant is compiled once for each, every other once. The library is written
under another name and renamed when it is whole; older libraries are deleted.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from runtime.errors import DeviceUnavailable, HeadraceError
from runtime.native.library import (
    BUILD,
    FLAGS,
    VARIANTS,
    is_built,
    library_file,
    load_library,
    sources,
    variant_of,
)

VARIANT_MACRO = "HEADRACE_VARIANT"


def find_compiler() -> list[str] | None:
    """The command of $CXX, or of the compiler that is installed."""
    if named := os.environ.get("CXX"):
        return shlex.split(named)
    found = next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
    return None if found is None else [found]


def build() -> Path:
    """Compile what is not built yet. DeviceUnavailable without a compiler, or with the compiler's words."""
    target = library_file()
    if is_built():
        return target
    compiler = find_compiler()
    if compiler is None:
        raise DeviceUnavailable("the native operators need a C++ compiler: install g++ or clang++, or name one in CXX")
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        commands = list(compilations(compiler, Path(folder)))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(_compile, commands))
        whole = Path(folder) / target.name
        _run([*compiler, "-shared", "-pthread", *map(str, objects), "-o", str(whole)])
        whole.replace(target)
    for other in BUILD.glob("headrace-*.so"):
        if other != target:
            other.unlink(missing_ok=True)
    return target


def compilations(compiler: Sequence[str], folder: Path) -> Iterator[tuple[list[str], Path]]:
    """Commands, and the object file that each writes."""
    for source in (file for file in sources() if file.suffix == ".cc"):
        is_kernel = f"namespace {VARIANT_MACRO}" in source.read_text()
        for variant, flags in VARIANTS.items() if is_kernel else [("", ())]:
            name = f"{source.parent.name}-{source.stem}"
            target = folder / f"{name}.{variant}.o"
            macro = [f"-D{VARIANT_MACRO}={variant}"] if variant else []
            yield [*compiler, *FLAGS, *flags, *macro, "-c", str(source), "-o", str(target)], target


def _compile(job: tuple[list[str], Path]) -> Path:
    command, target = job
    _run(command)
    return target


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  our own command
    except OSError as error:
        raise DeviceUnavailable(f"the compiler {command[0]} does not start: {error}") from error
    if done.returncode:
        raise DeviceUnavailable(f"the native operators do not compile: {shlex.join(command)}\n{done.stderr}")
    sys.stderr.write(done.stderr)


def main() -> int:
    """Build, load once, and say which instructions will run."""
    try:
        file = build()
        sys.stdout.write(f"{file}: {variant_of(load_library())}\n")
    except HeadraceError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
