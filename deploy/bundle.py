"""`make bundle`: one archive with all that a device needs to serve an artifact, and a script that sets it up.

NAME-DEVICE/artifact/          the artifact, with checked hashes and the engines for this device
NAME-DEVICE/wheels/            Headrace itself
NAME-DEVICE/requirements.txt   every package it needs, at the versions of this environment, with hashes
NAME-DEVICE/device.txt         packages for this device: TensorRT, CUDA's Python
NAME-DEVICE/start.sh           install, doctor, engine, verify, serve; see the file
NAME-DEVICE/headrace.env  headrace.service  Dockerfile  README.md

Beside the archive lies its checksum, NAME-DEVICE.tar.gz.sha256.

python deploy/bundle.py ARTIFACT --device cpu --out dist
"""

import argparse
import configparser
import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.hashes import with_hashes, write_checksum
from export.artifact.writer import file_entry, write_json
from runtime.artifact.manifest import (
    CALIBRATION,
    CALIBRATION_ARRAYS,
    MANIFEST,
    RECEIPT,
    Artifact,
    dialect_name,
    open_artifact,
    read_manifest,
)
from runtime.artifact.plan_files import ENGINES, plans_of
from runtime.errors import HeadraceError, InvalidSetting

HERE = Path(__file__).parent
COPIED = ("start.sh", "headrace.service")
EXTRAS = ("cpu",)
"""Of setup.cfg, packed for every device: the CPU is what DEVICE=auto falls back to."""


@dataclass(frozen=True)
class Stack:
    """The software of one kind of device; deploy/README.md has the sources of the versions and what was tested.

    device: the value of `headrace serve --device`
    target: the value of `headrace engine --target`; empty: no engine is built
    extra: packages beside Headrace's own
    base: base image of the Dockerfile
    platform, python: of the device, as uv names them
    has_hashes: whether the index has the files of `extra`; for Arm it has a stub that fetches NVIDIA's TensorRT
    uses_system: whether the environment sees the system's Python packages, for TensorRT that comes with the system
    """

    device: str
    target: str
    extra: tuple[str, ...]
    base: str
    dialects: tuple[str, ...]
    platform: str = "x86_64-manylinux_2_39"
    python: str = "3.12"
    has_hashes: bool = True
    uses_system: bool = False


STACKS: Mapping[str, Stack] = {
    "cpu": Stack("cpu", "", (), "python:3.11-slim-bookworm", ("ort",), python="3.11"),
    "rtx": Stack(
        "tensorrt",
        "tensorrt-rtx",
        ("tensorrt-rtx==1.7.1.116", "cuda-python==13.4.4"),
        "nvidia/cuda:13.0.1-base-ubuntu24.04",
        ("trt",),
    ),
    "jetson-thor": Stack(
        "tensorrt",
        "tensorrt",
        ("tensorrt==10.15.1.29", "cuda-python==13.0.3"),
        "nvidia/cuda:13.0.1-base-ubuntu24.04",
        ("trt",),
        platform="aarch64-manylinux_2_39",
        has_hashes=False,
    ),
    "jetson-orin": Stack(
        "tensorrt",
        "tensorrt",
        ("cuda-python==12.6.2.post1",),
        "nvcr.io/nvidia/l4t-jetpack:r36.4.0",
        ("trt-plain",),
        platform="aarch64-manylinux_2_35",
        python="3.11",
        uses_system=True,
    ),
}


def build_wheel(target: Path) -> None:
    """Write Headrace's wheel into a directory."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--wheel-dir", str(target), str(HERE.parent)], check=True)


def make_bundle(
    artifact: Artifact,
    device: str,
    out: Path,
    *,
    keeps_calibration: bool = False,
    write_wheel: Callable[[Path], None] = build_wheel,
    hashed: Callable[..., str] = with_hashes,
) -> Path:
    """Write `out`/NAME-DEVICE.tar.gz and its checksum; return the archive's path.

    keeps_calibration: pack the calibration data, and its text if the artifact has it; no device needs it
    Raises InvalidSetting if the artifact has no graph for the device, or the packages' hashes cannot be read.
    """
    if device not in STACKS:
        raise InvalidSetting(f"DEVICE {device!r} is unknown; choose one of {', '.join(STACKS)}")
    stack = STACKS[device]
    if not set(stack.dialects) & set(artifact.manifest.dialects):
        wanted = dialect_name(stack.dialects[0])
        raise InvalidSetting(
            f"{artifact.path} has no {wanted} graph, which {device} needs; export it with --dialect ort,{wanted}"
        )
    name = f"{artifact.path.resolve().name}-{device}"
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as temporary:
        root = Path(temporary) / name
        root.mkdir()
        _copy_artifact(artifact, root / "artifact", stack, keeps_calibration=keeps_calibration)
        write_wheel(root / "wheels")
        where = {"platform": stack.platform, "python": stack.python}
        (root / "requirements.txt").write_text(hashed(requirements(), **where, is_closed=True))
        extra = hashed(stack.extra, **where, is_closed=False) if stack.has_hashes else "\n".join(stack.extra) + "\n"
        (root / "device.txt").write_text(extra)
        (root / "headrace.env").write_text("".join(f"{line}\n" for line in environment(stack)))
        (root / "Dockerfile").write_text((HERE / "Dockerfile.in").read_text().replace("@BASE@", stack.base))
        for file in COPIED:
            shutil.copy(HERE / file, root / file)
        shutil.copy(HERE / "BUNDLE.md", root / "README.md")
        draft = Path(temporary) / "bundle.tar.gz"
        with tarfile.open(draft, "w:gz", compresslevel=1) as archive:  # weights hardly compress
            archive.add(root, name)
        archive_file = draft.rename(out / f"{name}.tar.gz")
    write_checksum(archive_file)
    return archive_file


def requirements() -> list[str]:
    """Every package Headrace and EXTRAS need, their dependencies too, at the version that is installed here.

    A device with another processor or Python gets the same releases. pip names those that it lacks.
    """
    found: dict[str, str] = {}
    config = configparser.ConfigParser()
    config.read(HERE.parent / "setup.cfg")
    lines = config["options"]["install_requires"].splitlines()
    lines += [line for extra in EXTRAS for line in config["options.extras_require"][extra].splitlines()]
    waiting = [Requirement(line) for line in lines if line and not line.startswith("#")]
    while waiting:
        requirement = waiting.pop()
        is_wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        name = canonicalize_name(requirement.name)
        if is_wanted and name not in found:
            package = importlib.metadata.distribution(name)
            found[name] = package.version
            waiting += [Requirement(line) for line in package.requires or []]
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def environment(stack: Stack) -> Iterator[str]:
    """The lines of headrace.env, which start.sh reads."""
    yield "# Read by start.sh. Flags of `headrace serve` go into SERVE_FLAGS."
    yield "HOST=127.0.0.1"
    yield "PORT=8000"
    yield "# This device must work; or auto: the first of TensorRT, CUDA and the CPU that works."
    yield f"DEVICE={stack.device}"
    yield "MAX_BATCH=8"
    yield "# Tokens of prompt and answer together; empty means the model's limit."
    yield "MAX_LEN="
    yield "PREFILL_CHUNK=128"
    yield "# File of hashed keys that `./start.sh key NAME` writes; needed if other machines can reach HOST."
    yield "API_KEYS="
    yield "SERVE_FLAGS="
    yield f"ENGINE_TARGET={stack.target}"
    yield f"VENV_FLAGS={'--system-site-packages' if stack.uses_system else ''}"


def _copy_artifact(artifact: Artifact, target: Path, stack: Stack, *, keeps_calibration: bool) -> None:
    """Copy the files of the manifest, without the calibration and other devices' engines, and write their manifest."""
    target.mkdir()
    left_out = () if keeps_calibration else (CALIBRATION, CALIBRATION_ARRAYS)
    files = {name: entry for name, entry in artifact.manifest.files.items() if name not in left_out}
    for name in files:
        shutil.copy(artifact.path / name, target / name)
    if not keeps_calibration and (receipt := _without_paths(artifact.receipt)) != artifact.receipt:
        write_json(target / RECEIPT, receipt)
        files[RECEIPT] = file_entry(target / RECEIPT)
    listed = read_manifest(artifact.path).engines
    engines = {}
    for plan in plans_of(artifact, check_hashes=True):
        if plan.problem is None and plan.info is not None and plan.info.target == stack.target:
            (target / ENGINES).mkdir(exist_ok=True)
            description = plan.path.with_suffix(".json")
            for part in (plan.path, description):
                shutil.copy(part, target / ENGINES / part.name)
            engines[description.name] = listed[description.name]
    manifest = replace(artifact.manifest, files=files, engines=engines)
    (target / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def _without_paths(receipt: Mapping[str, Any]) -> dict[str, Any]:
    """The receipt with only the file name of a calibration text; early releases noted its whole path."""

    def shortened(account: Any) -> Any:
        source = account.get("source") if isinstance(account, dict) else None
        if isinstance(source, str) and source.startswith(("/", "~")):
            return {**account, "source": Path(source).name}
        return account

    found = dict(receipt)
    if "kv_calibration" in found:
        found["kv_calibration"] = shortened(found["kv_calibration"])
    if "calibration" in found.get("quantization", {}):
        found["quantization"] = {
            **found["quantization"],
            "calibration": shortened(found["quantization"]["calibration"]),
        }
    return found


def main(argv: list[str]) -> int:
    """Make one bundle. Return 2, after one line, if that fails."""
    parser = argparse.ArgumentParser(prog="bundle.py", description="Pack an artifact with all that a device needs.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--device", required=True, help=", ".join(STACKS))
    parser.add_argument("--out", type=Path, default=Path("dist"))
    parser.add_argument("--keep-calibration", action="store_true", help="pack the calibration data and its text too")
    args = parser.parse_args(argv)
    try:
        artifact = open_artifact(args.artifact)
        path = make_bundle(artifact, args.device, args.out, keeps_calibration=args.keep_calibration)
    except HeadraceError as error:
        sys.stderr.write(f"bundle: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"bundle: {error.strerror or error}{f': {error.filename}' if error.filename else ''}\n")
        return 2
    except subprocess.CalledProcessError as error:
        sys.stderr.write(f"bundle: building the wheel failed (exit status {error.returncode}, its message is above)\n")
        return 2
    sys.stdout.write(f"{path} ({path.stat().st_size / 1e6:.0f} MB)\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
