"""`headrace doctor`: what is installed, which GPU there is, which backends work, and what the others need.

Asks every backend of the registry about an Environment, so that tests can describe machines that are not here.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from runtime.backends.backend import Backend, Problem
from runtime.backends.environment import CudaDevice, Environment
from runtime.backends.registry import BACKENDS, backend_named
from runtime.machine.sizes import format_bytes


@dataclass(frozen=True)
class Verdict:
    """Whether a backend works here; `note` says with what."""

    name: str
    problems: tuple[Problem, ...]
    note: str = ""

    @property
    def works(self) -> bool:
        return not self.problems


def examine(env: Environment, backends: Sequence[Backend] = BACKENDS) -> list[Verdict]:
    """A verdict for each backend, in the order `--device auto` tries them."""
    return [Verdict(backend.name, tuple(_problems(backend, env)), backend.note(env)) for backend in backends]


def _problems(backend: Backend, env: Environment) -> Iterator[Problem]:
    if (problem := backend.missing_hardware(env)) is not None:
        yield problem
    yield from backend.missing_software(env)


def installed(env: Environment, backends: Sequence[Backend] = BACKENDS) -> dict[str, str]:
    """Versions of the packages that backends come from, of those that are installed."""
    names = dict.fromkeys(name for backend in reversed(backends) for name in backend.packages)
    return {name: env.packages[name] for name in names if name in env.packages}


def report(env: Environment, backends: Sequence[Backend] = BACKENDS) -> dict[str, Any]:
    """All of it, as JSON has it."""
    device = env.cuda_device
    return {
        "machine": env.machine,
        "python": env.python,
        "jetson": None if env.jetson is None else env.jetson._asdict(),
        "driver": env.driver,
        "gpus": list(env.gpus),
        "cuda_device": device._asdict() if isinstance(device, CudaDevice) else None,
        "packages": installed(env, backends),
        "backends": [{"works": verdict.works, **_plain(verdict)} for verdict in examine(env, backends)],
    }


def _plain(verdict: Verdict) -> dict[str, Any]:
    return {**asdict(verdict), "problems": [problem._asdict() for problem in verdict.problems]}


def lines(env: Environment, backends: Sequence[Backend] = BACKENDS) -> Iterator[str]:
    """All of it, for people."""
    yield f"machine   {env.machine}, Python {env.python}"
    if env.jetson is not None:
        yield f"Jetson    {env.jetson.model}, L4T {env.jetson.l4t}, JetPack {env.jetson.jetpack}"
    device = env.cuda_device
    if isinstance(device, CudaDevice):
        yield f"GPU       {device.name}, {device.capability}, {format_bytes(device.free_bytes)} free"
    else:
        yield f"GPU       {', '.join(env.gpus) or 'none found'}"
    yield f"driver    {env.driver or 'none loaded'}"
    packages = installed(env, backends)
    yield f"packages  {', '.join(f'{name} {version}' for name, version in packages.items()) or 'none'}"
    for verdict in examine(env, backends):
        note = f": {verdict.note}" if verdict.note else ""
        yield f"{verdict.name:10}{'works' if verdict.works else 'does not work'}{note}"
        for problem in verdict.problems:
            yield f"          {problem.what}"
            yield f"          -> {problem.fix}"


def main(argv: list[str], env: Environment | None = None, backends: Sequence[Backend] = BACKENDS) -> int:
    """Print the report; 2 if the backend named by --require does not work."""
    names = ", ".join(backend.name for backend in backends)
    parser = argparse.ArgumentParser(prog="headrace doctor", description="What can run models here, and what cannot.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--require", metavar="DEVICE", help=f"fail unless it works: {names}")
    args = parser.parse_args(argv)
    if args.require is not None:
        backend_named(args.require, "--require", backends=backends)
    env = env or Environment()
    text = json.dumps(report(env, backends), indent=2) if args.json else "\n".join(lines(env, backends))
    sys.stdout.write(f"{text}\n")
    works = {verdict.name: verdict.works for verdict in examine(env, backends)}
    return 0 if args.require is None or works[args.require] else 2
