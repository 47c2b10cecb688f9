"""The requests of benchmarks/under_fire.py: every feature of the server, mixed at random, and when one is answered."""

import json
import random
from collections.abc import Callable
from typing import Any, NamedTuple

Json = dict[str, Any]
COMPLETIONS, CHAT, TOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize"
OK, BAD, MISSING, LATE = 200, 400, 404, 504
SHORT_TIMEOUTS = (0.001, 0.02, 0.1)
NUM_SALTS = 300
"""Tenants that share no prefix: more than a small cache holds."""
NUM_SCHEMAS = 60
"""Different constraints: more than the server keeps compiled."""
MAX_BESIDE_TOOLS = 100
"""Characters of a prompt: with a token for each byte, a description of three tools fills most of the context."""
PERSON = '{"name": "anna", "age": 34}\n'


class Shot(NamedTuple):
    """One request, the statuses that are right for it, and whether it is answered as a stream."""

    path: str
    body: Json
    statuses: tuple[int, ...] = (OK,)

    @property
    def is_stream(self) -> bool:
        return self.body.get("stream") is True


def make_shot(rng: random.Random, model: str) -> Shot:
    """A request of some kind: mostly good ones with several features at once, some that must be refused."""
    kind = rng.random()
    if kind < 0.04:
        return Shot(COMPLETIONS, {"model": model, "prompt": "x", rng.choice(["temperature", "n"]): -1}, (BAD,))
    if kind < 0.06:
        return Shot(CHAT, {"model": "another", "messages": []}, (MISSING,))
    if kind < 0.09:
        return Shot(TOKENIZE, {"model": model, "prompt": "a caf\u00e9 " * rng.randint(1, 50)})
    body: Json = {"model": model, "max_tokens": rng.randint(1, 48), "stream": rng.random() < 0.6}
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    for option in rng.sample(SAMPLING, rng.randint(0, 3)) + rng.sample(SERVICE, rng.randint(0, 2)):
        body |= option(rng)
    form = rng.choice(FORMS)(rng) if rng.random() < 0.3 else {}
    text = _prompt(rng)
    # Where a stream has begun by the time its time is up, the error is its last event.
    statuses = (OK, LATE) if body.get("timeout") in SHORT_TIMEOUTS else (OK,)
    if rng.random() < 0.5:
        if rng.random() < 0.2:
            body |= {"logprobs": True, "top_logprobs": 3}
        elif rng.random() < 0.2:
            form, text = _tools(rng), text[:MAX_BESIDE_TOOLS]
        return Shot(CHAT, body | form | {"messages": [{"role": "user", "content": text}]}, statuses)
    scores = rng.random()
    if scores < 0.15:
        body |= {"echo": True, "logprobs": rng.randint(0, 3), "max_tokens": rng.choice([0, 1, 20])}
    elif scores < 0.3:
        body["logprobs"] = 2
    return Shot(COMPLETIONS, body | form | {"prompt": rng.choice([text, text, [text, "and " + text]])}, statuses)


def _prompt(rng: random.Random) -> str:
    """Texts that repeat themselves, so that drafts are made; lengths of one to ten chunks; shared beginnings."""
    if rng.random() < 0.3:
        return PERSON * rng.randint(1, 8)
    return "once upon a time " * rng.choice([1, 1, 1, 3, 10, 25]) + str(rng.randint(0, 9))


def _tools(rng: random.Random) -> Json:
    names = ["weather", "time", "search"][: rng.randint(1, 3)]
    parameters = {"type": "object", "properties": {"place": {"type": "string", "maxLength": 9}}, "required": ["place"]}
    tools = [{"type": "function", "function": {"name": name, "parameters": parameters}} for name in names]
    choice = rng.choice(["auto", "required", "none", {"type": "function", "function": {"name": names[0]}}])
    return {"tools": tools, "tool_choice": choice, "parallel_tool_calls": rng.random() < 0.5}


def _schema(rng: random.Random) -> Json:
    limit = rng.randrange(NUM_SCHEMAS)
    return {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer", "maximum": limit}},
        "required": ["name", "age"],
    }


Option = Callable[[random.Random], Json]
SAMPLING: list[Option] = [
    lambda rng: {"temperature": 0},
    lambda rng: {"top_p": 0.9, "seed": rng.randint(0, 99)},
    lambda rng: {"top_k": 5, "min_p": 0.05},
    lambda rng: {"n": rng.randint(2, 3)},
    lambda rng: {"stop": ["zz", "qq"]},
    lambda rng: {"repetition_penalty": 1.2, "presence_penalty": 0.5},
    lambda rng: {"logit_bias": {"5": 3}, "ignore_eos": True},
]
SERVICE: list[Option] = [
    lambda rng: {"cache_salt": f"tenant {rng.randrange(NUM_SALTS)}"},
    lambda rng: {"priority": rng.randint(-5, 5)},
    lambda rng: {"timeout": rng.choice([*SHORT_TIMEOUTS, 100])},
]
FORMS: list[Option] = [
    lambda rng: {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": _schema(rng)}}},
    lambda rng: {"response_format": {"type": "json_object"}},
    lambda rng: {"structured_outputs": {"json": _schema(rng)}},
    lambda rng: {"structured_outputs": {"regex": f"[a-d]{{{rng.randint(1, NUM_SCHEMAS)}}}"}},
    lambda rng: {"structured_outputs": {"choice": ["left", "right", str(rng.randrange(NUM_SCHEMAS))]}},
    lambda rng: {"structured_outputs": {"grammar": 'root ::= "x" [0-9]+ ";"'}},
]


def is_whole(shot: Shot, reply: bytes) -> bool:
    """Whether the answer is complete: every choice ended, and the stream as well, or its time was up as it asked."""
    _, _, body = reply.partition(b"\r\n\r\n")
    if not shot.is_stream:
        answer = json.loads(body)
        return "choices" not in answer or all(choice["finish_reason"] for choice in answer["choices"])
    if LATE in shot.statuses and b'"code":"timeout"' in body:
        return True
    prompt = shot.body.get("prompt")
    num_choices = shot.body.get("n", 1) * (len(prompt) if isinstance(prompt, list) else 1)
    return b"data: [DONE]" in body and body.count(b'"finish_reason":"') == num_choices
