"""The peer's side of versus_genai.py, run by the peer's own Python: JSON lines in, JSON lines out.

genai_worker.py save GGUF OUT    save a GGUF file as a Hugging Face directory, in float32 (transformers)
genai_worker.py MODEL            says {"version": v} when the model is loaded, then answers
                                 {"batch": b, "prompt": p, "new_tokens": n} -> {"prefill_s": s, "step_s": s}
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

VOCABULARY = (1000, 40_000)


def save(gguf: str, out: str) -> None:
    """What the model builder wants: a directory with safetensors and a tokenizer."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = Path(gguf)
    # Older releases always dequantize; newer ones only when told to.
    config = getattr(transformers, "GgufConfig", None)
    how = {"quantization_config": config(dequantize=True)} if config else {}
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **how)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)


def measure(model: Any, batch: int, prompt: int, new_tokens: int) -> dict[str, float]:
    """Seconds of the prefill with its first token, and mean seconds of a decode step."""
    import numpy as np
    import onnxruntime_genai as og

    length = prompt + new_tokens + 2
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=length, min_length=length, batch_size=batch, do_sample=False)
    generator = og.Generator(model, params)
    ids = np.random.default_rng(0).integers(*VOCABULARY, (batch, prompt)).astype(np.int32)
    started_s = time.perf_counter()
    generator.append_tokens(ids)
    generator.generate_next_token()
    prefilled_s = time.perf_counter()
    for _ in range(new_tokens):
        generator.generate_next_token()
    step_s = (time.perf_counter() - prefilled_s) / max(1, new_tokens)
    return {"prefill_s": prefilled_s - started_s, "step_s": step_s}


def main() -> None:
    if sys.argv[1] == "save":
        save(sys.argv[2], sys.argv[3])
        return
    import onnxruntime_genai as og

    model = og.Model(sys.argv[1])
    print(json.dumps({"version": og.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(model, **json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
