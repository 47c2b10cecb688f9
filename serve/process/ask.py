"""`--ask`: send one question to a running server over HTTP and print the answer as it arrives. `make run` uses it.

An ordinary client: knows only the server's URL and OpenAI's API.
"""

import http.client
import json
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

MAX_TOKENS = 200
"""Enough for a paragraph. A small model that never ends would fill the context."""
TIMEOUT_S = 120.0


class AskFailedError(Exception):
    """The server did not answer; the message says why."""


def ask(url: str, model_name: str, question: str, write: Callable[[str], object]) -> None:
    """Send one chat request; write the question, the answer and the speed. Raises AskFailedError."""
    write(f"\n> {question}\n\n")
    body = {
        "model": model_name,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sent_s = time.perf_counter()
    first_s = last_s = None
    num_tokens = 0
    for chunk in _stream(url, body):
        if "error" in chunk:
            raise AskFailedError(chunk["error"]["message"])
        for choice in chunk["choices"]:
            if text := choice["delta"].get("content"):
                last_s = time.perf_counter()
                first_s = first_s or last_s
                write(text)
        if chunk["usage"]:
            num_tokens = chunk["usage"]["completion_tokens"]
    write(f"\n\n[{_speed(num_tokens, sent_s, first_s, last_s)}; {url}/v1]\n")


def _speed(num_tokens: int, sent_s: float, first_s: float | None, last_s: float | None) -> str:
    """The number of tokens, the time to the first token, and the rate after it."""
    if first_s is None or last_s is None:
        return f"{num_tokens} tokens, no text"
    text = f"{num_tokens} tokens, the first after {first_s - sent_s:.2f} s"
    if num_tokens > 1 and last_s > first_s:
        text += f", then {(num_tokens - 1) / (last_s - first_s):.0f} tokens/s"
    return text


def _stream(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The chunks of a streamed reply, or the one object of an error."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=TIMEOUT_S)
    try:
        headers = {"Content-Type": "application/json", "Connection": "close"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != http.client.OK:
            yield json.load(response)
            return
        for line in response:
            data = line.removeprefix(b"data: ").strip()
            if data and data != b"[DONE]":
                yield json.loads(data)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise AskFailedError(f"no answer from {url}: {error}") from error
    finally:
        connection.close()
