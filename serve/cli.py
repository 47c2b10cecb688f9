"""`headrace serve`: flags in, a running server out. Flask and gunicorn wait until the flags are right."""

import argparse
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from runtime.settings import EngineSettings, add_flags, from_namespace
from serve.settings import ServerSettings

if TYPE_CHECKING:
    from runtime.devices import Backend
    from runtime.text_model import TextModel
    from serve.metrics import ServerMetrics
    from serve.wsgi import Listener, OpenModel


def build_parser() -> argparse.ArgumentParser:
    """The flags of `headrace serve`, those of the settings classes included."""
    parser = argparse.ArgumentParser(prog="headrace serve", description="Serve an artifact over HTTP, as OpenAI's API.")
    parser.add_argument("artifact", help="directory that `headrace export` wrote")
    parser.add_argument("--name", help="name clients use for the model, by default the artifact's")
    parser.add_argument("--allow-failed", action="store_true", help="serve even if the receipt says the gate failed")
    parser.add_argument("--ask", metavar="TEXT", help="when ready, send this as a chat request and print the answer")
    add_flags(parser, ServerSettings)
    add_flags(parser, EngineSettings)
    return parser


def main(argv: list[str], *, backends: "Mapping[str, Backend] | None" = None) -> int:
    """Run the server; the exit code is 0 after a signal, 2 if it could not start.

    `backends` are what --device chooses from, by default those of runtime/devices.py.
    """
    args = build_parser().parse_args(argv)
    server = from_namespace(ServerSettings, args)
    engine = from_namespace(EngineSettings, args)

    def open_model(metrics: "ServerMetrics") -> "TextModel":
        from runtime.text_model import open_text_model

        model = open_text_model(
            args.artifact,
            engine,
            name=args.name,
            allow_failed=args.allow_failed,
            observer=metrics,
            backends=backends,
        )
        model.prepare_constraints()
        return model

    return serve(open_model, server, engine, question=args.ask)


def serve(
    open_model: "OpenModel", server: ServerSettings, engine: EngineSettings, *, question: str | None = None
) -> int:
    """Bind, load in a worker, announce, serve. Raises InvalidSetting if the address cannot be had."""
    from serve.wsgi import listen, run_server

    # More choices than the queue holds would be refused as overload, however often the client tries again.
    server = replace(server, max_choices=min(server.max_choices, max(1, engine.max_waiting)))
    listener = listen(server.host, server.port)
    return run_server(
        open_model,
        listener,
        server,
        num_requests=engine.max_batch + engine.max_waiting,
        on_ready=_announcer(listener, question),
    )


def _announcer(listener: "Listener", question: str | None) -> "Callable[[TextModel], None]":
    url = listener.url

    def announce(model: "TextModel") -> None:
        sys.stdout.write(f"Headrace is serving {model.name} at {url} ({model.describe()})\n")
        sys.stdout.flush()
        if question is not None:
            # In a thread: the worker must go on to accept what is asked.
            threading.Thread(target=_ask, args=(url, model.name, question), name="ask", daemon=True).start()

    return announce


def _ask(url: str, model_name: str, question: str) -> None:
    from serve.ask import AskFailedError, ask

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        ask(url, model_name, question, write)
    except AskFailedError as error:
        sys.stderr.write(f"headrace serve: --ask: {error}\n")
