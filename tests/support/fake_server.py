"""`headrace serve` with the fake model instead of an artifact: the real command, process and signals.

python -m tests.support.fake_server --num-slots 4 --step-s 0.01 --port 0
"""

import argparse
import sys
import time
from pathlib import Path

from runtime.errors import HeadraceError, InvalidArtifact
from runtime.session.session import Batch
from runtime.settings import EngineSettings, add_flags, from_namespace
from runtime.text_model import TextModel
from serve.cli import serve
from serve.model_registry import ModelSource
from serve.observe.engine_metrics import EngineMetrics
from serve.settings import ServerSettings
from tests.support.fake_text_model import NAME, fake_text_model


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--num-slots", type=int, default=4)
    parser.add_argument("--capacity", type=int, default=256)
    parser.add_argument("--step-s", type=float, default=0.0)
    parser.add_argument("--fail-after", type=int, help="the session raises in this run")
    parser.add_argument("--fail-load", action="store_true", help="opening the model raises InvalidArtifact")
    parser.add_argument("--load-s", type=float, default=0.0, help="how long opening the model takes")
    parser.add_argument("--fail-reload", action="store_true", help="opening the model a second time raises")
    parser.add_argument("--models", nargs="*", default=[NAME], help="names of the models")
    parser.add_argument("--stamp", type=Path, help="a file that says whether the models have changed; none: always")
    parser.add_argument("--ask")
    parser.add_argument("--script", help="what every chat is answered with")
    add_flags(parser, ServerSettings)
    add_flags(parser, EngineSettings)
    args = parser.parse_args()
    engine = from_namespace(EngineSettings, args)
    num_runs = num_opened = 0

    def on_run(batch: Batch) -> None:
        nonlocal num_runs
        num_runs += 1
        if num_runs == args.fail_after:
            raise RuntimeError("the session broke, as it was told to")

    def source(name: str) -> ModelSource:
        def open_model(metrics: EngineMetrics) -> TextModel:
            nonlocal num_opened
            num_opened += 1
            time.sleep(args.load_s)
            if args.fail_load or (args.fail_reload and num_opened > len(args.models)):
                raise InvalidArtifact("this is not an artifact; export one")
            return fake_text_model(
                name=name,
                num_slots=args.num_slots,
                capacity=args.capacity,
                max_waiting=engine.max_waiting,
                step_s=args.step_s,
                on_run=on_run,
                observer=metrics,
                script=args.script,
                tool_format=engine.tool_format,
            )

        return ModelSource(open_model, None if args.stamp is None else args.stamp.read_text)

    sources = {name: source(name) for name in args.models}
    return serve(sources, from_namespace(ServerSettings, args), engine, question=args.ask)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HeadraceError as error:
        sys.stderr.write(f"headrace serve: {error}\n")
        sys.exit(2)
