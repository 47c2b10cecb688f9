"""Every engine feature in the same batches on a real graph: each request gets the tokens that it gets alone."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from export.pipeline.export_model import ExportOptions, export_model
from runtime.artifact.manifest import Artifact, open_artifact
from runtime.backends.ort.session import OrtSession
from runtime.core import (
    Constraint,
    ConstraintKind,
    FinishReason,
    Request,
    RequestOptions,
    SamplingParams,
    TextStream,
    TokenEvent,
)
from runtime.engine.engine import Engine
from runtime.engine.speculation.draft_model import DraftModel
from runtime.engine.speculation.speculator import Speculator
from runtime.grammar.grammar import GrammarCompiler
from runtime.text.stop_strings import RequestText
from runtime.text.tools.call_or_answer import calls_or
from runtime.text.tools.formats import HERMES, Tool, calls_grammar
from runtime.text.tools.one_call import OneCallText
from runtime.text.tools.parser import ToolCallParser
from tests.support.byte_tokenizer import byte_level_hf, byte_tokenizer
from tests.support.engine_requests import Recorder, check_cache, check_slots
from tests.support.tiny.checkpoint import config_of, write_checkpoint

BOS_ID = 256
EOS_ID, CAPACITY, NUM_SLOTS, CHUNK, CACHE_BYTES = 257, 320, 6, 48, 300_000
TOKENIZER = byte_tokenizer()
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["anna", "tom"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
PERSON = '{"name": "anna", "age": 34}\n'
HEAD = (
    "Every prompt that begins like this one shares three blocks of the cache with the others, if the salt is the same. "
)


class Asked(NamedTuple):
    """One request; a `cancelled_at` is the number of events after which its client leaves."""

    prompt: str
    params: SamplingParams
    options: RequestOptions = RequestOptions()
    cancelled_at: int | None = None
    is_predicted: bool = False
    """Whether the client expects the very answer it gets, but for one token in the middle."""
    one_call_of: tuple[str, ...] = ()


def constraint(kind: ConstraintKind, source: Any) -> Constraint:
    return Constraint(kind, source if isinstance(source, str) else json.dumps(source), "structured_outputs")


def greedy(max_tokens: int, **settings: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, **settings)


def sampled(max_tokens: int, seed: int, **settings: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": max_tokens, "temperature": 0.8, "seed": seed, "logprobs": 1, **settings})


PERSONS = constraint(ConstraintKind.JSON_SCHEMA, SCHEMA)
TOOL = Tool(name="f", description="", parameters=SCHEMA)
TWO_CALLS = constraint(
    ConstraintKind.GRAMMAR, calls_grammar(HERMES, [TOOL], is_parallel=False).replace("start: call", "start: call call")
)
SHORT_CODE = constraint(ConstraintKind.REGEX, "[ab]{3}-[0-9]{2}")
CALL_OR_PERSON, CALL_OR_CODE = (calls_or(form, HERMES, [TOOL], is_parallel=False) for form in (PERSONS, SHORT_CODE))
STOPS = TOKENIZER.encode("eo7")
CODE = constraint(ConstraintKind.REGEX, "[ab]{3}-[0-9]{2}(;[ab]{3}-[0-9]{2}){0,4}")
WORD = constraint(ConstraintKind.CHOICE, ["left", "right", "left and right"])
LONG = "This sentence is long enough to be cut into several chunks, whatever its neighbours are. " * 2
OTHER_SALT = RequestOptions(cache_salt="another")
ASKED = {
    "greedy": Asked("One, two,", greedy(30)),
    "greedy, penalties": Asked("three, four,", greedy(25, repetition_penalty=1.2, frequency_penalty=0.5, logprobs=2)),
    "sampled": Asked("five", sampled(30, 1, top_p=0.9)),
    "sampled, stop": Asked("six, seven", sampled(40, 2, top_k=12, min_p=0.02, stop=("q", "zz"))),
    "copy": Asked("the same words again and " * 5, greedy(60)),
    "copy, sampled": Asked("the same words again and " * 4, sampled(50, 3, temperature=0.3, ignore_eos=True)),
    "schema": Asked(PERSON * 3, greedy(140, constraint=PERSONS)),
    "schema, sampled": Asked(PERSON * 3, sampled(140, 4, temperature=1.5, constraint=PERSONS)),
    "schema, cut": Asked(PERSON * 2, greedy(9, constraint=PERSONS)),
    "regex": Asked("aab-12;abb-13;aab-12;abb-13;", greedy(40, constraint=CODE, logprobs=1)),
    "regex, cached": Asked(HEAD + "aab-12;aab-12;", sampled(40, 5, constraint=CODE)),
    "choice": Asked("left and right and left and right", greedy(20, constraint=WORD)),
    "cached": Asked(HEAD + "A", greedy(20)),
    "cached, sampled": Asked(HEAD + "Bb", sampled(20, 6, presence_penalty=0.4)),
    "cached, another salt": Asked(HEAD + "A", greedy(20), OTHER_SALT),
    "cached, urgent": Asked(HEAD * 2 + "C", sampled(20, 7), RequestOptions(priority=-5)),
    "scored": Asked(HEAD + "A", greedy(0, prompt_logprobs=1)),
    "scored, answered": Asked(LONG, sampled(12, 8, prompt_logprobs=0)),
    "scored, schema": Asked(PERSON * 3, greedy(140, prompt_logprobs=0, constraint=PERSONS)),
    "least": Asked("Least one", greedy(40, min_tokens=25, logit_bias={EOS_ID: 40.0})),
    "least, sampled": Asked(
        "Least two", sampled(40, 10, min_tokens=12, stop=("e", "a", " "), logit_bias={EOS_ID: 2.0})
    ),
    "least, stop token": Asked("Least three", greedy(30, min_tokens=9, stop_token_ids=frozenset(range(0, 256, 2)))),
    "least, schema": Asked(PERSON * 3, greedy(200, min_tokens=190, constraint=PERSONS)),
    "typical": Asked("Typical", sampled(30, 11, typical_p=0.6)),
    "typical, few": Asked("the same words again and " * 4, sampled(30, 12, typical_p=0.8, top_k=20, temperature=0.4)),
    "special": Asked(
        "Special", sampled(30, 13, skip_special_tokens=False, ignore_eos=True, logit_bias={BOS_ID: 5.0, EOS_ID: 5.0})
    ),
    "special, kept end": Asked(
        "Special end",
        sampled(40, 14, skip_special_tokens=False, include_stop_str_in_output=True, logit_bias={EOS_ID: 4.0}),
    ),
    "stop, kept": Asked(
        "Stop kept",
        sampled(60, 22, stop=("e", "o", "7"), include_stop_str_in_output=True, logit_bias=dict.fromkeys(STOPS, 3.0)),
    ),
    "seedless": Asked("Whatever", sampled(20, -1, top_p=0)),
    "predicted": Asked("Predicted", greedy(50), is_predicted=True),
    "predicted, sampled": Asked("Predicted, too", sampled(50, 16), is_predicted=True),
    "predicted, schema": Asked(PERSON, sampled(140, 17, constraint=PERSONS), is_predicted=True),
    "calls, one": Asked(PERSON * 2, greedy(200, constraint=TWO_CALLS), one_call_of=("f",)),
    "calls, one, sampled": Asked(PERSON * 2, sampled(200, 18, constraint=TWO_CALLS), one_call_of=("f",)),
    "calls or answer": Asked(PERSON * 3, greedy(200, constraint=CALL_OR_PERSON)),
    "calls or answer, sampled": Asked(PERSON * 3, sampled(200, 19, constraint=CALL_OR_PERSON)),
    "calls or code": Asked("aab-12;", sampled(200, 20, constraint=CALL_OR_CODE)),
    "long": Asked(LONG, greedy(40)),
    "cancelled": Asked("eight, nine", greedy(200), cancelled_at=7),
    "cancelled copy": Asked("the same words again and " * 5, greedy(150), cancelled_at=20),
    "cancelled schema": Asked(PERSON * 3, greedy(140, constraint=PERSONS), cancelled_at=3),
    "cancelled cached": Asked(HEAD + "D", sampled(100, 9), cancelled_at=2),
    "cancelled at once": Asked(LONG, greedy(100, prompt_logprobs=0), cancelled_at=0),
}


def exported(path: Path, precision: str) -> Artifact:
    source = write_checkpoint(path / "checkpoint", config_of("llama", max_position_embeddings=512, eos_token_id=EOS_ID))
    byte_level_hf().save(str(source / "tokenizer.json"))
    export_model(ExportOptions(model=str(source), out=path / precision, precision=precision, force=True))
    return open_artifact(path / precision, allow_failed=True)


def opened(artifact: Artifact) -> OrtSession:
    return OrtSession.open(artifact, num_slots=NUM_SLOTS, capacity=CAPACITY, is_run_exact=True)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OrtSession]:
    session = opened(exported(tmp_path_factory.mktemp("target"), "fp32"))
    yield session
    session.close()


@pytest.fixture(scope="module")
def draft_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OrtSession]:
    """The same model with rounded weights: often right, not always."""
    session = opened(exported(tmp_path_factory.mktemp("draft"), "w4a16"))
    yield session
    session.close()


@pytest.fixture(scope="module")
def grammars(session: OrtSession) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(TOKENIZER, vocab_size=session.info.vocab_size, eos_ids=frozenset({EOS_ID}))
    yield compiler
    compiler.close()


@pytest.fixture(scope="module")
def alone(session: OrtSession, grammars: GrammarCompiler) -> dict[str, list[TokenEvent]]:
    """What each request gets from an engine of its own, without cache and drafts, its prompt in one piece."""
    events = {}
    for name, asked in ASKED.items():
        engine = Engine(session, prefill_chunk=CAPACITY)
        _, recorder = submit(engine, grammars, name, asked)
        while engine.has_work:
            engine.step()
        events[name] = recorder.events
    return events


def predictions_of(alone: Mapping[str, list[TokenEvent]]) -> dict[str, list[int]]:
    """The answers of requests that are predicted, each with a wrong token in the middle."""
    predictions = {}
    for name, asked in ASKED.items():
        if asked.is_predicted:
            ids = predictions[name] = [event.token_id for event in alone[name] if event.token_id is not None]
            ids[len(ids) // 2] = (ids[len(ids) // 2] + 1) % 256
    return predictions


def submit(
    engine: Engine, grammars: GrammarCompiler, name: str, asked: Asked, prediction_ids: Sequence[int] = ()
) -> tuple[Request, Recorder]:
    recorder, prompt_ids, params = Recorder(), TOKENIZER.encode(asked.prompt), asked.params
    text: TextStream = RequestText(
        TOKENIZER.detokenizer(prompt_ids, skips_special=params.skip_special_tokens),
        params.stop,
        min_tokens=params.min_tokens,
        keeps_end=params.include_stop_str_in_output,
    )
    if asked.one_call_of:
        text = OneCallText(text, ToolCallParser(HERMES, asked.one_call_of))
    request = Request(
        request_id=name,
        prompt_ids=prompt_ids,
        params=params,
        eos_ids=frozenset({EOS_ID}),
        sink=recorder,
        text=text,
        options=replace(asked.options, prediction_ids=prediction_ids),
        guide=None if params.constraint is None else grammars.guide(params.constraint),
    )
    engine.add(engine.prepare(request))
    return request, recorder


class Trace:
    """One engine, to which the requests come in random order, some with every step."""

    def __init__(
        self, engine: Engine, grammars: GrammarCompiler, seed: int, predictions: Mapping[str, Sequence[int]]
    ) -> None:
        self.engine = engine
        self.requests: dict[str, Request] = {}
        self.recorders: dict[str, Recorder] = {}
        self.company: set[str] = set()
        """The most kinds of request, by the first word of their name, that held slots at one time."""
        rng = np.random.default_rng(seed)
        names = rng.permutation(list(ASKED)).tolist()
        while names or engine.has_work:
            for name in [names.pop() for _ in range(min(len(names), int(rng.integers(0, 4))))]:
                self.requests[name], self.recorders[name] = submit(
                    engine, grammars, name, ASKED[name], predictions.get(name, ())
                )
            engine.step()
            self._cancel()
            self._check()

    def _cancel(self) -> None:
        for name, recorder in self.recorders.items():
            limit = ASKED[name].cancelled_at
            if limit is not None and len(recorder.events) >= limit:
                self.engine.cancel(name)

    def _check(self) -> None:
        check_slots(self.engine)
        check_cache(self.engine, CACHE_BYTES)
        running = {re.split("[ ,]", name)[0] for name, item in self.engine.live.items() if item.slot is not None}
        self.company = max(self.company, running, key=len)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("has_draft_model", [False, True], ids=["copied drafts", "draft model"])
def test_everything_together_gets_what_each_gets_alone(
    session: OrtSession,
    draft_session: OrtSession,
    grammars: GrammarCompiler,
    alone: dict[str, list[TokenEvent]],
    seed: int,
    *,
    has_draft_model: bool,
) -> None:
    draft_model = DraftModel(draft_session, prefill_chunk=32) if has_draft_model else None
    speculator = Speculator(draft_model, min_gain=0.0)
    engine = Engine(session, prefill_chunk=CHUNK, prefix_cache=CACHE_BYTES, drafter=speculator)
    trace = Trace(engine, grammars, seed, predictions_of(alone))
    for name, asked in ASKED.items():
        got, usage = trace.recorders[name].events, trace.requests[name].usage
        if asked.cancelled_at is not None:
            assert got[-1].finish_reason is FinishReason.CANCELLED and len(got) > asked.cancelled_at
            assert got[:-1] == alone[name][: len(got) - 1], name
            continue
        assert got == alone[name], name
        if asked.params.prompt_logprobs is not None:
            assert usage.num_cached == 0, "every position of it is computed"
    usages = {name: request.usage for name, request in trace.requests.items()}
    assert len(trace.company) >= 4, "kinds that shared batches"
    for name in ("copy", "copy, sampled", "schema", "regex", "long", "predicted", "predicted, sampled", "calls, one"):
        assert usages[name].num_drafted > 0, name
    assert sum(usage.num_accepted for usage in usages.values()) > 50
    assert usages["schema"].num_accepted > 0
    assert usages["predicted"].num_accepted >= 24 and usages["predicted, sampled"].num_accepted >= 24
    assert sum(usages[name].num_cached for name in ASKED if "cached" in name) >= 96
    assert engine.stats().num_running == engine.stats().num_waiting == 0


def test_answers_alone_are_what_was_asked_for(alone: dict[str, list[TokenEvent]]) -> None:
    """So that the comparison compares something: forms are kept, and requests end in every way."""
    texts = {name: "".join(event.text for event in events) for name, events in alone.items()}
    for name in ("schema", "schema, sampled", "scored, schema"):
        Draft202012Validator(SCHEMA).validate(json.loads(texts[name]))
    assert not texts["schema, cut"].endswith("}")
    assert re.fullmatch(CODE.source, texts["regex"]) and texts["choice"] in json.loads(WORD.source)
    reasons = {name: events[-1].finish_reason for name, events in alone.items()}
    assert reasons["schema"] is FinishReason.STOP and reasons["greedy"] is FinishReason.LENGTH
    assert alone["scored"][0].prompt_logprobs is not None and texts["scored"] == ""
    num_tokens = {name: len(events) for name, events in alone.items()}
    assert num_tokens["least"] == 26 and num_tokens["least, sampled"] > 12 and num_tokens["least, stop token"] > 9
    assert reasons["least"] is reasons["least, sampled"] is reasons["least, stop token"] is FinishReason.STOP
    assert num_tokens["least, schema"] < 190 and reasons["least, schema"] is FinishReason.STOP
    assert "<|begin|>" in texts["special"] and "<|end|>" in texts["special"]
    assert texts["special, kept end"].endswith("<|end|>")
    assert re.search("[eo7]$", texts["stop, kept"]) and reasons["stop, kept"] is FinishReason.STOP
    for name in ("calls, one", "calls, one, sampled"):
        (call,) = texts[name].split("<tool_call>")[1:]
        Draft202012Validator(SCHEMA).validate(json.loads(call)["arguments"])
        assert reasons[name] is FinishReason.STOP
    for name in ("calls or answer", "calls or answer, sampled", "calls or code"):
        assert reasons[name] is FinishReason.STOP
        if not re.fullmatch(SHORT_CODE.source, texts[name]):
            answer = json.loads(texts[name].removeprefix("<tool_call>").removesuffix("</tool_call>"))
            Draft202012Validator(SCHEMA).validate(answer.get("arguments", answer))
