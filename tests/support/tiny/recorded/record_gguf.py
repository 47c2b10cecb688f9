"""Records GGUF files that llama.cpp's converter writes for tiny models, and transformers' logits of the originals.

Like record.py: `python -m tests.support.tiny.recorded.record_gguf` in an environment with auto-round, whose package
contains the converter. The files have no tokenizer: the converter takes only those that it knows.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.support.tiny.recorded.record import HERE, IDS, library

FILES = HERE / "gguf"
GROUPS = {
    **dict.fromkeys(
        ("llama", "gemma", "gemma2", "granite", "olmo2", "smollm3", "cohere", "arcee", "ernie4_5"), "llama"
    ),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), "experts"),
}
_BASE = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0],
    "rope_theta": 10000.0, "original_max_position_embeddings": 8,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "llama": {**_BASE, "model_type": "llama"},
    "gemma": {**_BASE, "model_type": "gemma", "head_dim": 16},
    "gemma2": {**_BASE, "model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4,
               "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {**_BASE, "model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16,
                    "sliding_window": 4, "num_hidden_layers": 7},
    "phi3": {**_BASE, "model_type": "phi3", "sliding_window": 4},
    "phi3-longrope": {**_BASE, "model_type": "phi3", "rope_scaling": LONGROPE,
                      "original_max_position_embeddings": 8},
    # Of phi, the converter writes the sizes of the published model: as many kv heads, and four times the width.
    "phi": {**_BASE, "model_type": "phi", "partial_rotary_factor": 0.5, "num_key_value_heads": 4,
            "intermediate_size": 128},
    "granite": {**_BASE, "model_type": "granite", "embedding_multiplier": 3.0, "logits_scaling": 2.0,
                "residual_multiplier": 0.5, "attention_multiplier": 0.25},
    "arcee": {**_BASE, "model_type": "arcee"},
    "ernie4_5": {**_BASE, "model_type": "ernie4_5", "head_dim": 8},
    "seed_oss": {**_BASE, "model_type": "seed_oss", "head_dim": 8},
    "glm4": {**_BASE, "model_type": "glm4", "head_dim": 8, "partial_rotary_factor": 0.5, "attention_bias": True},
    "olmo2": {**_BASE, "model_type": "olmo2"},
    "smollm3": {**_BASE, "model_type": "smollm3", "num_hidden_layers": 4},
    "starcoder2": {**_BASE, "model_type": "starcoder2", "sliding_window": None},
    "cohere": {**_BASE, "model_type": "cohere", "logit_scale": 0.25},
    "gpt2": {"model_type": "gpt2", "vocab_size": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
             "n_ctx": 64, "bos_token_id": 1, "eos_token_id": 2},
    "stablelm": {**_BASE, "model_type": "stablelm", "use_qkv_bias": True, "partial_rotary_factor": 0.5},
    "nemotron": {**_BASE, "model_type": "nemotron", "partial_rotary_factor": 0.5},
    "qwen3_moe": {**_BASE, **_EXPERTS, "model_type": "qwen3_moe", "head_dim": 16, "norm_topk_prob": True},
    "qwen2_moe": {**_BASE, **_EXPERTS, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 32},
    "mixtral": {**_BASE, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2,
                "sliding_window": None},
}  # fmt: skip


class Lenient:
    """An enumeration of the gguf package; names that only a later release has are those of another architecture."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name, next(iter(self._inner)))


def record(case: str, directory: Path) -> None:
    """Convert a random model and keep its logits."""
    torch, transformers = library("torch"), library("transformers")
    sys.path.append(str(Path(library("auto_round").__file__).parent / "export" / "export_to_gguf"))
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**CASES[case])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                scale = 8 if name.endswith("mlp.gate.weight") else 1
                weight.normal_(0, scale * weight.shape[-1] ** -0.5)
            else:
                weight.add_(0.1 * torch.randn_like(weight))
            weight.copy_(weight.half().float())
        logits = model(torch.tensor([IDS])).logits[0]
    source = directory / case
    model.save_pretrained(source)
    target = FILES / GROUPS.get(CASES[case]["model_type"], "others") / case
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in ("MODEL_ARCH", "MODEL_TENSOR", "VisionProjectorType"):
        if not isinstance(getattr(library("gguf"), name), Lenient):
            setattr(library("gguf"), name, Lenient(getattr(library("gguf"), name)))
    (name,) = json.loads((source / "config.json").read_text())["architectures"]
    kind = library("conversion").get_model_class(name)
    kind.set_vocab = lambda self: None
    hparams = json.loads((source / "config.json").read_text())
    converter = kind(source, library("gguf").LlamaFileType.MOSTLY_F16, target / "model.gguf", hparams=hparams)
    converter.write()
    library("safetensors.torch").save_file({"logits": logits.contiguous()}, target / "expected.safetensors")
    (target / "config.json").write_text(json.dumps(hparams, indent=1) + "\n")
    sys.stdout.write(f"{case}: {(target / 'model.gguf').stat().st_size} bytes\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        for wanted in sys.argv[1:] or CASES:
            try:
                record(wanted, Path(temporary))
            except Exception as error:  # the next model may convert
                import traceback

                traceback.print_exc()
                sys.stdout.write(f"{wanted} FAILED: {error!r}\n")
