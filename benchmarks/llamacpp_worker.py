"""The peer's side of versus_llamacpp.py, run by the peer's own Python: JSON lines in, JSON lines out.

llamacpp_worker.py float GGUF OUT               write a quantized GGUF file's weights as float32 (gguf dequantizes them)
llamacpp_worker.py quantize GGUF OUT Q8_0|Q4_0  as llama.cpp's own llama-quantize does
llamacpp_worker.py MODEL                        says {"version": v} when the model is loaded, then answers
                                                {"batch": b, "prompt": p, "new_tokens": n}

The first question of a shape tries flash attention on and off, and one KV cache for all sequences or one for each, and
keeps what is fastest; the answer names it. Threads: one a core that this process may use; llama.cpp's own default is 4.
"""

import ctypes
import json
import os
import sys
import time
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np

VOCABULARY = (1000, 40_000)
IS_CPU_TIME = os.environ.get("HEADRACE_CPU_TIME") == "1"
"""One thread, and its seconds of CPU instead of the clock's."""
clock = time.process_time if IS_CPU_TIME else time.perf_counter
ROOM = 128
"""Tokens of a sequence beyond its prompt."""
TRIAL_STEPS = 12


def write_float(source: str, out: str) -> None:
    """The same metadata and tensors, dequantized to float32."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = gguf.Keys.General.ARCHITECTURE
    writer = gguf.GGUFWriter(out, reader.fields[architecture].contents())
    for field in reader.fields.values():
        if field.name in (architecture, gguf.Keys.General.FILE_TYPE) or field.name.startswith("GGUF."):
            continue
        kind = field.types[0]
        sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=sub_type)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: str, out: str, file_type: str) -> None:
    """llama.cpp's own quantization with its own choice of type for each tensor."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{file_type}")
    status = llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params))
    if status:
        raise SystemExit(f"llama_model_quantize ended with {status}")


class Settings(NamedTuple):
    """What a user of llama.cpp may set, and what this worker chooses between."""

    flash_attention: bool
    is_unified: bool

    def __str__(self) -> str:
        flash = "on" if self.flash_attention else "off"
        return f"flash attention {flash}, {'one KV cache' if self.is_unified else 'a KV cache a sequence'}"


class Model:
    """One GGUF file and a context for each shape and setting asked for, its prompts in the cache."""

    def __init__(self, file: str) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._threads = 1 if IS_CPU_TIME else len(os.sched_getaffinity(0))
        self._model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {file}")
        self._num_tokens: int = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._chosen: dict[tuple[int, int], tuple[Settings, Context]] = {}

    def measure(self, batch: int, prompt: int, new_tokens: int) -> dict[str, Any]:
        """Seconds of the last prompt's prefill, or mean seconds of a decode step after `batch` prompts."""
        shape = (batch, prompt)
        if shape not in self._chosen:
            self._chosen[shape] = self._choose(batch, prompt, new_tokens)
        settings, context = self._chosen[shape]
        return {**context.measure(new_tokens), "settings": f"{settings}, {self._threads} threads"}

    def _choose(self, batch: int, prompt: int, new_tokens: int) -> tuple[Settings, "Context"]:
        """The settings whose best of two short runs is fastest."""
        found: list[tuple[float, Settings, Context]] = []
        for flash_attention in (True, False):
            for is_unified in (True, False) if batch > 1 else (True,):
                settings = Settings(flash_attention, is_unified)
                context = Context(self._api, self._model, self._num_tokens, settings, self._threads, batch, prompt)
                key = "step_s" if new_tokens else "prefill_s"
                found.append(
                    (min(context.measure(min(new_tokens, TRIAL_STEPS))[key] for _ in range(2)), settings, context)
                )
        found.sort(key=lambda entry: entry[0])
        for _, _, slower in found[1:]:
            slower.close()
        return found[0][1:]


class Context:
    """One llama.cpp context with room for `batch` sequences."""

    def __init__(
        self, api: Any, model: Any, num_tokens: int, settings: Settings, threads: int, batch: int, prompt: int
    ) -> None:
        self._api, self._num_tokens, self._num_rows, self._prompt = api, num_tokens, batch, prompt
        params = api.llama_context_default_params()
        params.n_ctx = batch * (prompt + ROOM)
        params.n_batch = params.n_ubatch = max(prompt, batch)
        params.n_seq_max = batch
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = settings.is_unified
        params.flash_attn_type = (
            api.LLAMA_FLASH_ATTN_TYPE_ENABLED if settings.flash_attention else api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self._context = api.llama_init_from_model(model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp makes no context with {settings}")
        self._memory = api.llama_get_memory(self._context)
        self._batch = api.llama_batch_init(max(prompt, batch), 0, 1)
        self._ids = np.random.default_rng(0).integers(*VOCABULARY, (batch, prompt))
        self._is_filled = False

    def measure(self, new_tokens: int) -> dict[str, float]:
        """A prefill alone, or steps from filled caches; the prompts stay cached for the next call."""
        if not new_tokens:
            self._api.llama_memory_clear(self._memory, True)
            started_s = clock()
            self._prefill(0)
            return {"prefill_s": clock() - started_s}
        rows = range(self._num_rows)
        if not self._is_filled:
            for row in rows:
                self._prefill(row)
            self._is_filled = True
        ids = self._ids[:, -1]
        started_s = clock()
        for step in range(new_tokens):
            ids = self._run([(int(ids[row]), self._prompt + step, row, True) for row in rows])
        step_s = (clock() - started_s) / new_tokens
        for row in rows:
            self._api.llama_memory_seq_rm(self._memory, row, self._prompt, -1)
        return {"step_s": step_s}

    def _prefill(self, row: int) -> None:
        last = self._prompt - 1
        self._run([(int(token), position, row, position == last) for position, token in enumerate(self._ids[row])])

    def _run(self, tokens: list[tuple[int, int, int, bool]]) -> Any:
        """One llama_decode of (token, position, sequence, whether its logits are wanted); the greedy choices."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for idx, (token, position, row, is_wanted) in enumerate(tokens):
            batch.token[idx], batch.pos[idx], batch.logits[idx] = token, position, is_wanted
            batch.n_seq_id[idx], batch.seq_id[idx][0] = 1, row
        status = self._api.llama_decode(self._context, batch)
        if status:
            raise SystemExit(f"llama_decode ended with {status}")
        num_wanted = sum(token[3] for token in tokens)
        logits = self._api.llama_get_logits(self._context)  # waits for the result
        return np.ctypeslib.as_array(logits, (num_wanted, self._num_tokens)).argmax(-1)

    def close(self) -> None:
        self._api.llama_batch_free(self._batch)
        self._api.llama_free(self._context)


def main() -> None:
    match sys.argv[1:]:
        case ["float", source, out]:
            write_float(source, out)
        case ["quantize", source, out, file_type]:
            quantize(source, out, file_type)
        case [file]:
            model = Model(file)
            print(json.dumps({"version": f"(llama-cpp-python {version('llama_cpp_python')})"}), flush=True)
            for line in sys.stdin:
                print(json.dumps(model.measure(**json.loads(line))), flush=True)
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
