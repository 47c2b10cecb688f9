"""Records adapters that PEFT saved for tiny models, and the weights that PEFT's own merge makes of them.

Like record.py: `python -m tests.support.tiny.recorded.record_peft` in an environment with peft.
"""

import shutil
import sys
from typing import Any

from tests.support.tiny.recorded.record import HERE, IDS, SIZES, library

ADAPTERS = HERE / "peft"
LLAMA = {**SIZES, "hidden_size": 32, "intermediate_size": 48}
GPT2 = {
    "vocab_size": 32,
    "n_embd": 32,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama-tied": ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}),
    "phi3": ("Phi3ForCausalLM", {**LLAMA, "pad_token_id": 0}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
}
ATTENTION = ["q_proj", "v_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "plain": ("llama", [{"r": 4, "lora_alpha": 16, "target_modules": ATTENTION}]),
    "rslora": ("llama", [{"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": LINEAR}]),
    "dora": ("llama", [{"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": LINEAR}]),
    "patterns": (
        "llama",
        [
            {
                "r": 4,
                "lora_alpha": 8,
                "target_modules": LINEAR,
                "rank_pattern": {"q_proj": 8, "layers.0.mlp.down_proj": 2},
                "alpha_pattern": {"mlp.up_proj": 32, "down_proj": 4},
            }
        ],
    ),
    "saved-modules": (
        "llama",
        [{"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "modules_to_save": ["lm_head", "input_layernorm"]}],
    ),
    "embedding": ("llama", [{"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}]),
    "embedding-tied": ("llama-tied", [{"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "q_proj"]}]),
    "fused": ("phi3", [{"r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj", "gate_up_proj", "down_proj"]}]),
    "transposed": (
        "gpt2",
        [{"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}],
    ),
    "transposed-dora": (
        "gpt2",
        [{"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}],
    ),
    "several": (
        "llama",
        [
            {"r": 4, "lora_alpha": 8, "target_modules": LINEAR},
            {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
        ],
    ),
}
WEIGHTS = [0.5, -1.25]
"""Of the adapters of a case with several."""


def base_model(name: str) -> Any:
    """A tiny random model in float32 whose weights half precision holds exactly."""
    torch, transformers = library("torch"), library("transformers")
    torch.manual_seed(0)
    kind, sizes = MODELS[name]
    model_class = getattr(transformers, kind)
    model = model_class(model_class.config_class(**sizes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            scale = weight.shape[-1] ** -0.5 if weight.dim() == 2 else 0.1
            weight.add_(scale * torch.randn_like(weight))
            weight.copy_(weight.half().float())
    return model


def record(case: str) -> None:
    """Write the model, the adapters and what PEFT makes of them."""
    torch, peft = library("torch"), library("peft")
    name, settings = CASES[case]
    target = ADAPTERS / case
    shutil.rmtree(target, ignore_errors=True)
    base_model(name).half().save_pretrained(target)
    (target / "generation_config.json").unlink(missing_ok=True)
    model: Any = None
    for index, setting in enumerate(settings):
        config = peft.LoraConfig(task_type="CAUSAL_LM", **setting)
        adapter = f"adapter-{index}"
        if model is None:
            model = peft.get_peft_model(base_model(name), config, adapter_name=adapter)
        else:
            model.add_adapter(adapter, config)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "lora_" in key or "modules_to_save" in key:
                weight.add_(0.2 * torch.randn_like(weight))
    adapters = [f"adapter-{index}" for index in range(len(settings))]
    for adapter in adapters:
        model.save_pretrained(target, selected_adapters=[adapter])
        (target / "README.md").unlink(missing_ok=True)
        (target / adapter / "README.md").unlink(missing_ok=True)
    if len(adapters) > 1:
        model.add_weighted_adapter(adapters, WEIGHTS, "sum", combination_type="cat")
        model.set_adapter("sum")
    merged = model.merge_and_unload().eval()
    state = {key: value.detach().float().contiguous().clone() for key, value in merged.state_dict().items()}
    kept = {key: state[key] for key in state if key.endswith(("k_proj.weight", "down_proj.weight", "c_attn.weight"))}
    with torch.no_grad():
        logits = merged(torch.tensor([IDS])).logits[0]
    library("safetensors.torch").save_file({**kept, "logits": logits.contiguous()}, target / "expected.safetensors")
    sys.stdout.write(f"{case}: {sorted(path.name for path in target.glob('**/*'))}\n")


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        record(case)
