"""`headrace serve`: from flags to a running server. Flask and gunicorn are imported after the flags are checked."""

import argparse
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.backends.registry import add_engine_flags, engine_settings
from runtime.errors import HeadraceError, InvalidArtifact, InvalidSetting
from runtime.settings import EngineSettings, SharedSettings, add_flags, from_namespace
from serve.settings import ServerSettings

if TYPE_CHECKING:
    from runtime.artifact.manifest import Artifact
    from runtime.backends.backend import Backend
    from runtime.text_model import MemoryUse, TextModel
    from serve.model_registry import ModelRegistry, ModelSource
    from serve.observe.engine_metrics import EngineMetrics


def build_parser() -> argparse.ArgumentParser:
    """The flags of `headrace serve`, those of the settings classes included."""
    parser = argparse.ArgumentParser(prog="headrace serve", description="Serve artifacts over HTTP with OpenAI's API.")
    parser.add_argument("artifact", nargs="?", help="directory that `headrace export` wrote")
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME=PATH", help="another artifact; may be repeated"
    )
    parser.add_argument("--name", help="the first artifact's name for clients, by default its own name")
    parser.add_argument(
        "--allow-failed", action="store_true", help="serve an artifact even if its receipt says that a check failed"
    )
    parser.add_argument("--ask", metavar="TEXT", help="when ready, ask the first model this and print the answer")
    add_flags(parser, ServerSettings)
    add_engine_flags(parser)
    return parser


def main(argv: list[str], *, backends: "Sequence[Backend] | None" = None) -> int:
    """Run the server; return 0 after a signal, 2 if it could not start.

    `backends` are the choices for --device, by default those of runtime/backends/registry.py.
    """
    args = build_parser().parse_args(argv)
    server = from_namespace(ServerSettings, args)
    engine = engine_settings(args)
    artifacts = open_artifacts(args)
    each = zip(artifacts.items(), share_memory(engine, list(artifacts.values())), strict=True)
    sources = {
        name: _source(name, artifact.path, settings, allow_failed=args.allow_failed, backends=backends)
        for (name, artifact), settings in each
    }
    return serve(sources, server, engine, question=args.ask)


def _source(
    name: str, path: Path, engine: EngineSettings, *, allow_failed: bool, backends: "Sequence[Backend] | None"
) -> "ModelSource":
    """How to open one artifact, and how to see whether it has changed."""
    from serve.model_registry import ModelSource

    opened: list[MemoryUse] = []

    def open_model(metrics: "EngineMetrics") -> "TextModel":
        from runtime.text_model import open_text_model

        settings = like_before(engine, opened[-1]) if opened else engine
        model = open_text_model(
            path, settings, name=name, allow_failed=allow_failed, prepares=True, observer=metrics, backends=backends
        )
        opened[:] = [model.memory_use()]
        return model

    read = [path] if engine.draft is None else [path, Path(engine.draft)]
    return ModelSource(open_model, lambda: [stamp_of(one) for one in read])


def like_before(engine: EngineSettings, before: "MemoryUse") -> EngineSettings:
    """Settings for a reload: sizes of caches as before, because the old model's caches still take memory."""
    return replace(
        engine,
        kv_memory=engine.kv_memory or before.kv_bytes,
        prefix_cache=before.prefix_cache_bytes if engine.prefix_cache is None else engine.prefix_cache,
    )


def stamp_of(artifact: Path) -> object:
    """A value that changes when an artifact is exported again or gets a TensorRT engine: the manifest's bytes and the
    engine files. Raises InvalidArtifact if there is no manifest."""
    from runtime.artifact.plan_files import ENGINES

    try:
        manifest = (artifact / "manifest.json").read_bytes()
        engines = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in artifact.glob(f"{ENGINES}/*")]
    except OSError as error:
        raise InvalidArtifact(f"{artifact} is not an artifact any more: {error}") from error
    return manifest, sorted(engines)


def open_artifacts(args: argparse.Namespace) -> "dict[str, Artifact]":
    """Every artifact by its name; the first is the default. Raises InvalidSetting, InvalidArtifact."""
    from runtime.artifact.manifest import open_artifact

    # The hashes are checked when the model is loaded.
    opened = partial(open_artifact, allow_failed=args.allow_failed, check_hashes=False)
    found: dict[str, Artifact] = {}
    if args.artifact is not None:
        first = opened(args.artifact)
        found[args.name or first.manifest.name] = first
    elif args.name is not None:
        raise InvalidSetting("--name is for the artifact given without --model; write --model NAME=PATH instead")
    paths: dict[str, str] = {}
    for word in args.model:
        name, sign, path = word.partition("=")
        if not (name and sign and path):
            raise InvalidSetting(f"--model must be NAME=PATH, got {word!r}")
        if name in found or name in paths:
            raise InvalidSetting(f"two models are named {name!r}; give each its own name with --model NAME=PATH")
        paths[name] = path
    found |= {name: opened(path) for name, path in paths.items()}
    if not found:
        raise InvalidSetting("give an artifact directory, or --model NAME=PATH; `headrace export` writes one")
    return found


def share_memory(engine: EngineSettings, artifacts: "Sequence[Artifact]") -> list[EngineSettings]:
    """The settings for each model. Several models share the memory for caches; see MemoryShare."""
    if len(artifacts) == 1:
        return [engine]
    from runtime.artifact.plan_files import device_weight_bytes
    from runtime.machine.memory import PREFIX_CACHE_FRACTION, default_budget, shares_of

    weight_bytes = [artifact.weight_bytes for artifact in artifacts]
    prefix_cache = engine.prefix_cache
    if prefix_cache is None:
        room = default_budget(weight_bytes=sum(weight_bytes), fraction=PREFIX_CACHE_FRACTION)
        prefix_cache = max(1, room // len(artifacts))
    engine = replace(engine, prefix_cache=prefix_cache)
    if engine.kv_memory is not None:  # each model's, as it was given
        return [engine] * len(artifacts)
    shares = shares_of(weight_bytes, [device_weight_bytes(artifact) for artifact in artifacts])
    return [SharedSettings.of(engine, share) for share in shares]


def serve(
    sources: "Mapping[str, ModelSource]", server: ServerSettings, engine: EngineSettings, *, question: str | None = None
) -> int:
    """Bind the address, load the models in a worker, announce them, serve. Raises InvalidSetting for a bad address."""
    from serve.hosts import check_exposure
    from serve.process.wsgi import listen, run_server

    # A request with more choices than the queue holds could never be accepted.
    server = replace(server, max_choices=min(server.max_choices, max(1, engine.max_waiting)))
    listener = listen(server.host, server.port)
    check_exposure(server.host, has_keys=server.api_keys is not None, allow_anonymous=server.allow_anonymous)
    return run_server(sources, listener, server, on_ready=lambda models: _announce(models, listener.url, question))


def _announce(models: "ModelRegistry", url: str, question: str | None) -> None:
    for model in models.loaded():
        sys.stdout.write(f"Headrace is serving {model.name} at {url} ({model.describe()})\n")
    sys.stdout.flush()
    if question is not None:
        # In a thread, so that the caller can go on.
        model = models.loaded()[0]
        threading.Thread(target=_ask, args=(model, question, url), name="ask", daemon=True).start()


def _ask(model: "TextModel", question: str, url: str) -> None:
    from serve.process.ask import ask

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        ask(model, question, url, write)
    except HeadraceError as error:
        sys.stderr.write(f"headrace serve: --ask: {error}\n")
