"""What the comparisons of benchmarks/ rest on: the random model's files, the load's clock, and the ratios."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat

import pytest
from tokenizers import pre_tokenizers

from benchmarks.load_client import body_of, closed_loop
from benchmarks.random_model import MERGE, QWEN, gguf_name, words
from benchmarks.versus_servers import HEADRACE, NEW_TOKENS, Load, Round, table
from tests.support.tiny.checkpoint import shapes_of

PAUSE_S = 0.05


def test_every_token_of_the_random_model_is_a_word() -> None:
    tokens = words()
    assert len(tokens) == len(set(tokens)) == QWEN["vocab_size"] - 1
    assert set("".join(tokens)) <= set(pre_tokenizers.ByteLevel.alphabet())
    assert "".join(MERGE) in tokens


def test_gguf_knows_every_tensor_of_the_random_model() -> None:
    gguf = pytest.importorskip("gguf")
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, QWEN["num_hidden_layers"])
    for name in shapes_of(QWEN):
        stem, _, kind = name.rpartition(".")
        assert gguf_name(name) == f"{known.get_name(stem)}.{kind}"


class Streaming(BaseHTTPRequestHandler):
    """Two events and a usage of `num_tokens` tokens, a pause before each event."""

    num_tokens = 64

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["ignore_eos"] and asked["stream"] and asked["temperature"] == 0
        self.send_response(200)
        self.end_headers()
        usage = json.dumps({"usage": {"completion_tokens": self.num_tokens}, "choices": []})
        for event in ('{"choices": [{"text": "a"}]}', usage, "[DONE]"):
            time.sleep(PAUSE_S)
            self.wfile.write(f"data: {event}\n\n".encode())

    def log_message(self, *_: object) -> None: ...


@contextmanager
def fake_server(num_tokens: int) -> Iterator[tuple[str, int]]:
    """The address of a server that counts so many tokens."""
    handler = type("Handler", (Streaming,), {"num_tokens": num_tokens})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield ("127.0.0.1", server.server_address[1])
        server.shutdown()
        thread.join()


def test_the_load_takes_the_time_of_first_and_last_event() -> None:
    with fake_server(64) as address:
        found = closed_loop(address, repeat(body_of("m", [1, 2], 64), 5), 2, 64)
    assert len(found["times"]) == 5
    for first, last in found["times"]:
        assert first >= PAUSE_S and first + 2 * PAUSE_S <= last
    assert found["seconds"] >= 3 * 3 * PAUSE_S, "five requests of two clients are three rounds"


def test_an_answer_that_ends_early_is_no_measurement() -> None:
    with fake_server(63) as address, pytest.raises(SystemExit, match="did not send 64 tokens"):
        closed_loop(address, repeat(body_of("m", [1], 64), 1), 1, 64)


def test_rounds_have_prompts_of_their_own() -> None:
    loads = [Load.of_round(8, 16, seed) for seed in range(3)]
    prompts = {tuple(prompt) for load in loads for prompt in load.prompts}
    assert len(prompts) == 48 and {len(prompt) for prompt in prompts} <= set(range(120, 181))
    assert Load.of_round(8, 16, 0) == loads[0]


def test_the_table_has_ratios_of_rounds() -> None:
    def answer(seconds: float, first: float) -> dict[str, object]:
        return {"seconds": seconds, "times": [[first, first + 0.63]] * 4}

    load = Load(4, [], NEW_TOKENS)
    rounds = [
        Round.of(HEADRACE, load, 0, answer(1.0, 0.1)),
        Round.of("peer", load, 0, answer(2.0, 0.4)),
        Round.of(HEADRACE, load, 1, answer(10.0, 1.0)),
        Round.of("peer", load, 1, answer(20.0, 4.0)),
        Round.of("peer", load, 2, answer(1.0, 9.0)),
    ]
    assert rounds[0].tokens_per_s == 4 * NEW_TOKENS and rounds[0].tpot_p95 == pytest.approx(0.01)
    lines = [line.split() for line in table(rounds).splitlines()]
    assert lines[1][:3] == ["4", HEADRACE, "2"] and len(lines[1]) == 8
    assert lines[2][:3] == ["4", "peer", "3"] and lines[2][-3:] == ["2.00", "0.25", "0.25"]
