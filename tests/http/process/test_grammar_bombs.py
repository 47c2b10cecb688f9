"""Constraints that would take all time, memory or stack, sent to a real server: it stays, and others are served."""

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2 as httpx

from tests.support.fake_text_model import NAME
from tests.support.schemas.bombs import aliases, chain, rules, same_property
from tests.support.server_process import children_of, running_server

Json = dict[str, Any]
CHAT = "/v1/chat/completions"


def test_bombs_end_neither_the_worker_nor_the_answers_of_others() -> None:
    """By recursion, by time and by what a schema says of itself, all at once, beside a stream and a form of its own."""
    bombs: list[Json] = [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "bomb", "schema": schema}}}
        for schema in (chain(1000), aliases(2500), same_property(30), {"const": "xy z" * 22_000})
    ]
    large = {"type": "object", "description": "%json", "properties": {"a": {"multipleOf": 99_999_989}}}
    function = {"name": "f", "strict": True, "parameters": large}
    bombs.append({"tools": [{"type": "function", "function": function}], "tool_choice": "required"})
    bombs.append({"structured_outputs": {"grammar": rules(4400, 'r{i}: "a" r{j} | "b"', 'r{i}: "c"')}})
    plain: Json = {"model": NAME, "messages": [{"role": "user", "content": "go"}], "max_tokens": 20}
    form = {"structured_outputs": {"regex": "[a-f]{9}-[0-9]{9}"}}
    with (
        running_server("--num-slots", "4", "--capacity", "512", "--step-s", "0.002") as server,
        httpx.Client(base_url=server.url, timeout=120) as client,
        ThreadPoolExecutor(len(bombs)) as pool,
    ):
        worker = children_of(server.process.pid)
        body = {**plain, "stream": True, "max_tokens": 400, "ignore_eos": True}
        with client.stream("POST", CHAT, json=body) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
            replies = [pool.submit(client.post, CHAT, json={**plain, **bomb}) for bomb in bombs]
            answer = client.post(CHAT, json={**plain, **form})
            assert re.fullmatch("[a-f]{9}-[0-9]{9}", answer.json()["choices"][0]["message"]["content"])
            statuses = [reply.result().status_code for reply in replies]
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert statuses[4] == 400 and statuses[2] in (400, 429), statuses
        assert statuses[:2] + statuses[3:4] + statuses[5:] == [200] * 4, statuses
        assert children_of(server.process.pid) == worker
