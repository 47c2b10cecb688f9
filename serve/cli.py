"""`headrace serve`: flags in, a running server out. Flask and gunicorn wait until the flags are right."""

import argparse
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.backends.registry import add_engine_flags, engine_settings
from runtime.errors import InvalidArtifact, InvalidSetting
from runtime.settings import EngineSettings, SharedSettings, add_flags, from_namespace
from serve.settings import ServerSettings

if TYPE_CHECKING:
    from runtime.backends.backend import Backend
    from runtime.text_model import MemoryUse, TextModel
    from serve.model_registry import ModelRegistry, ModelSource
    from serve.observe.engine_metrics import ServerMetrics
    from serve.process.wsgi import Listener


def build_parser() -> argparse.ArgumentParser:
    """The flags of `headrace serve`, those of the settings classes included."""
    parser = argparse.ArgumentParser(prog="headrace serve", description="Serve artifacts over HTTP, as OpenAI's API.")
    parser.add_argument("artifact", nargs="?", help="directory that `headrace export` wrote")
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME=PATH", help="a further artifact; may be repeated"
    )
    parser.add_argument("--name", help="name clients use for the first artifact, by default its own")
    parser.add_argument("--allow-failed", action="store_true", help="serve even if the receipt says the gate failed")
    parser.add_argument("--ask", metavar="TEXT", help="when ready, send this as a chat request and print the answer")
    add_flags(parser, ServerSettings)
    add_engine_flags(parser)
    return parser


def main(argv: list[str], *, backends: "Sequence[Backend] | None" = None) -> int:
    """Run the server; the exit code is 0 after a signal, 2 if it could not start.

    `backends` are what --device chooses from, by default those of runtime/backends/registry.py.
    """
    args = build_parser().parse_args(argv)
    server = from_namespace(ServerSettings, args)
    engine = engine_settings(args)
    paths = read_paths(args)
    shared = share_memory(engine, list(paths.values()), allow_failed=args.allow_failed)

    each = zip(paths.items(), shared, strict=True)
    sources = {
        name: _source(name, path, settings, allow_failed=args.allow_failed, backends=backends)
        for (name, path), settings in each
    }
    return serve(sources, server, engine, question=args.ask)


def _source(
    name: str, path: str, engine: EngineSettings, *, allow_failed: bool, backends: "Sequence[Backend] | None"
) -> "ModelSource":
    """How to open one artifact, and to see whether it has changed since."""
    from serve.model_registry import ModelSource

    opened: list[MemoryUse] = []

    def open_model(metrics: "ServerMetrics") -> "TextModel":
        from runtime.text_model import open_text_model

        settings = like_before(engine, opened[-1]) if opened else engine
        model = open_text_model(
            path, settings, name=name, allow_failed=allow_failed, observer=metrics, backends=backends
        )
        model.prepare_constraints()
        opened[:] = [model.memory_use()]
        return model

    read = [path] if engine.draft is None else [path, engine.draft]
    return ModelSource(open_model, lambda: [stamp_of(Path(one)) for one in read])


def like_before(engine: EngineSettings, before: "MemoryUse") -> EngineSettings:
    """Settings of a reload: while the old model still holds its caches, what is free says too little."""
    return replace(
        engine,
        kv_memory=engine.kv_memory or before.kv_bytes,
        prefix_cache=before.prefix_cache_bytes if engine.prefix_cache is None else engine.prefix_cache,
    )


def stamp_of(artifact: Path) -> object:
    """What changes when an artifact is exported again or gets an engine: the manifest's bytes, and which engines there
    are. Raises InvalidArtifact if there is no manifest."""
    from runtime.artifact.plan_files import ENGINES

    try:
        manifest = (artifact / "manifest.json").read_bytes()
        engines = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in artifact.glob(f"{ENGINES}/*")]
    except OSError as error:
        raise InvalidArtifact(f"{artifact} is no artifact any more: {error}") from error
    return manifest, sorted(engines)


def read_paths(args: argparse.Namespace) -> dict[str, str]:
    """Name and path of every artifact, the first one the default. Raises InvalidSetting, InvalidArtifact."""
    from runtime.artifact.manifest import open_artifact

    paths: dict[str, str] = {}
    if args.artifact is not None:
        # The hashes are checked when the model is loaded.
        manifest = open_artifact(args.artifact, allow_failed=args.allow_failed, check_hashes=False).manifest
        paths[args.name or manifest.name] = args.artifact
    elif args.name is not None:
        raise InvalidSetting("--name names the artifact that is given without --model; write --model NAME=PATH instead")
    for word in args.model:
        name, sign, path = word.partition("=")
        if not (name and sign and path):
            raise InvalidSetting(f"--model must be NAME=PATH, got {word!r}")
        if name in paths:
            raise InvalidSetting(f"two models are named {name!r}; give each its own name with --model NAME=PATH")
        paths[name] = path
    if not paths:
        raise InvalidSetting("give an artifact directory, or --model NAME=PATH; `headrace export` writes one")
    for path in paths.values():
        if path != args.artifact:
            open_artifact(path, allow_failed=args.allow_failed, check_hashes=False)
    return paths


def share_memory(engine: EngineSettings, paths: Sequence[str], *, allow_failed: bool) -> list[EngineSettings]:
    """Settings for each model: with several of them, a share of the default caches; see MemoryShare."""
    if len(paths) == 1:
        return [engine]
    from runtime.artifact.manifest import open_artifact
    from runtime.artifact.plan_files import device_weight_bytes
    from runtime.machine.memory import PREFIX_CACHE_FRACTION, default_budget, shares_of

    artifacts = [open_artifact(path, allow_failed=allow_failed, check_hashes=False) for path in paths]
    weight_bytes = [artifact.weight_bytes for artifact in artifacts]
    prefix_cache = engine.prefix_cache
    if prefix_cache is None:
        room = default_budget(weight_bytes=sum(weight_bytes), fraction=PREFIX_CACHE_FRACTION)
        prefix_cache = max(1, room // len(paths))
    engine = replace(engine, prefix_cache=prefix_cache)
    if engine.kv_memory is not None:  # each model's, as it was given
        return [engine] * len(paths)
    shares = shares_of(weight_bytes, [device_weight_bytes(artifact) for artifact in artifacts])
    return [SharedSettings.of(engine, share) for share in shares]


def serve(
    sources: "Mapping[str, ModelSource]", server: ServerSettings, engine: EngineSettings, *, question: str | None = None
) -> int:
    """Bind, load in a worker, announce, serve. Raises InvalidSetting if the address cannot be had, or must not."""
    from serve.hosts import check_exposure
    from serve.process.wsgi import listen, run_server

    # More choices than the queue holds would be refused as overload, however often the client tries again.
    server = replace(server, max_choices=min(server.max_choices, max(1, engine.max_waiting)))
    listener = listen(server.host, server.port)
    check_exposure(server.host, has_keys=server.api_keys is not None, allow_anonymous=server.allow_anonymous)
    return run_server(sources, listener, server, on_ready=_announcer(listener, question))


def _announcer(listener: "Listener", question: str | None) -> "Callable[[ModelRegistry], None]":
    url = listener.url

    def announce(models: "ModelRegistry") -> None:
        for model in models.loaded():
            sys.stdout.write(f"Headrace is serving {model.name} at {url} ({model.describe()})\n")
        sys.stdout.flush()
        if question is not None:
            # In a thread: what called this has other things to do.
            threading.Thread(target=_ask, args=(url, models.default.name, question), name="ask", daemon=True).start()

    return announce


def _ask(url: str, model_name: str, question: str) -> None:
    from serve.process.ask import AskFailedError, ask

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        ask(url, model_name, question, write)
    except AskFailedError as error:
        sys.stderr.write(f"headrace serve: --ask: {error}\n")
