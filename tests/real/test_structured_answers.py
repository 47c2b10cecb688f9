"""A real model's sampled answers follow the JSON schemas that they were asked to follow."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from jsonschema import Draft202012Validator

from runtime.artifact.manifest import Artifact
from runtime.core import Constraint, ConstraintKind, FinishReason, SamplingParams
from runtime.settings import EngineSettings
from runtime.text_model import TextModel, open_text_model
from tests.support.schemas.graded import Graded, graded_schemas


@pytest.mark.real
def test_real_answers_follow_every_tenth_schema(smollm2: Artifact) -> None:
    """Twenty schemas of all levels, eight at a time, sampled; benchmarks/structured_output.py runs all 200."""
    subset = graded_schemas()[::10]
    model = open_text_model(smollm2.path, EngineSettings(max_batch=8, max_len=512))
    model.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            ends = list(pool.map(lambda graded: answer_follows(model, graded), subset))
    finally:
        model.close()
    assert len(ends) == 20 and ends.count("stop") >= 16, "an answer may be cut by max_tokens, but few are"


def answer_follows(model: TextModel, graded: Graded) -> str:
    """Generate one answer and check it; how it ended."""
    text = f"Answer with JSON that follows this schema: {json.dumps(graded.schema)[:400]}"
    constraint = Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(graded.schema), "x")
    params = SamplingParams(max_tokens=100, temperature=0.7, seed=graded.number, constraint=constraint)
    events = list(model.generate(model.encode_chat([{"role": "user", "content": text}]), params))
    reason = events[-1].finish_reason
    assert reason is not None and reason in (FinishReason.STOP, FinishReason.LENGTH), events[-1].error
    if reason is FinishReason.STOP:
        Draft202012Validator(graded.schema).validate(json.loads("".join(event.text for event in events)))
    return reason.value
