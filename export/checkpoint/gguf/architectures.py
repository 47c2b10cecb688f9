"""The architectures of GGUF files that are read: how llama.cpp's converter renames, reorders and changes each one.

A row says what differs from llama. Settings that llama.cpp keeps in its code instead of the file are constants here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from export.checkpoint.gguf.metadata import GgufMetadata

Shapes = Mapping[str, tuple[int, ...]]
"""The tensors' shapes by GGUF name."""

_LLAMA_LAYER: Mapping[str, str] = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)
_LLAMA_WHOLE: Mapping[str, str] = MappingProxyType(
    {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufArchitecture:
    """One row of the table.

    model_type, class_name: in Hugging Face's config.json
    layer, whole: names of modules that differ from llama's, within a layer and outside; layers: the layers' prefix
    settings: Hugging Face's field for each key of this architecture
    more: further fields of config.json, from the metadata and the tensors
    constants: fields that are the same in every file
    epsilon: the key and the field of the norms' epsilon
    is_permuted: rows of q_proj and k_proj are in pairs; norm_offset: what the converter added to norms' weights
    transposed: modules that Hugging Face stores as [inputs, outputs]
    renamed: the family's own names of fields; None for a field that it does not have
    reads: further keys that `more` or the rotary embedding reads
    has_rope, has_partial_rope: whether there is a rotary embedding, and whether it may leave channels as they are
    experts: `{}` is the expert's number
    """

    model_type: str
    class_name: str
    layer: Mapping[str, str] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)
    layers: str = "model.layers"
    settings: Mapping[str, str] = field(default_factory=dict)
    more: Callable[[GgufMetadata, Shapes, Mapping[str, Any]], Mapping[str, Any]] | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)
    epsilon: tuple[str, str] = ("attention.layer_norm_rms_epsilon", "rms_norm_eps")
    is_permuted: bool = False
    norm_offset: float = 0.0
    transposed: tuple[str, ...] = ()
    renamed: Mapping[str, str | None] = field(default_factory=dict)
    reads: frozenset[str] = frozenset()
    has_rope: bool = True
    has_partial_rope: bool = False
    experts: Mapping[str, str] = field(default_factory=dict)

    def module(self, name: str) -> str | None:
        """Hugging Face's name of a module outside the layers; None for an unknown one."""
        return {**_LLAMA_WHOLE, **self.whole}.get(name)

    def layer_module(self, number: str, name: str) -> str | None:
        """Hugging Face's name of a module in a layer; None for an unknown one."""
        found = {**_LLAMA_LAYER, **self.layer, **self.experts}.get(name)
        return None if found is None else f"{self.layers}.{number}.{found}"


def _biases(shapes: Shapes, *names: str) -> bool:
    return any(f"blk.0.{name}.bias" in shapes for name in names)


def _gemma2(m: GgufMetadata, shapes: Shapes, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """As llama.cpp takes it: only the model of 46 layers scales by another number than the size of a head."""
    is_largest = config["num_hidden_layers"] == 46
    return {
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]
        if is_largest
        else config["head_dim"]
    }


def _phi3(m: GgufMetadata, shapes: Shapes, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A window of 0 is none."""
    window = m.integer("phi3.attention.sliding_window")
    return {
        "sliding_window": window or None,
        "original_max_position_embeddings": m.integer("phi3.rope.scaling.original_context_length"),
    }


def _cohere(m: GgufMetadata, shapes: Shapes, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"use_qk_norm": "blk.0.attn_q_norm.weight" in shapes}


def _stablelm(m: GgufMetadata, shapes: Shapes, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "use_qkv_bias": _biases(shapes, "attn_q"),
        "use_parallel_residual": m.flag("stablelm.use_parallel_residual", default=False),
    }


def _seed_oss(m: GgufMetadata, shapes: Shapes, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "attention_bias": _biases(shapes, "attn_q"),
        "attention_out_bias": _biases(shapes, "attn_output"),
        "mlp_bias": _biases(shapes, "ffn_up"),
    }


def _glm4(m: GgufMetadata, shapes: Shapes, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"attention_bias": _biases(shapes, "attn_q")}


_PLAIN_MLP: Mapping[str, str] = MappingProxyType({"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"})
_SANDWICH: Mapping[str, str] = MappingProxyType(
    {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
)
_LAYER_NORM = "attention.layer_norm_epsilon"
_QWEN_EXPERTS: Mapping[str, str] = MappingProxyType(
    {f"ffn_{part}_exps": f"mlp.experts.{{}}.{part}_proj" for part in ("gate", "up", "down")}
)
_QWEN_SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
    }
)

_LLAMA = GgufArchitecture(model_type="llama", class_name="LlamaForCausalLM", is_permuted=True)
MIXTRAL = GgufArchitecture(
    model_type="mixtral",
    class_name="MixtralForCausalLM",
    is_permuted=True,
    layer={"ffn_gate_inp": "block_sparse_moe.gate"},
    experts={
        "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
        "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
        "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
    },
    settings={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
)
"""llama.cpp calls it llama, too."""

ARCHITECTURES: Mapping[str, GgufArchitecture] = MappingProxyType(
    {
        "llama": _LLAMA,
        "qwen2": GgufArchitecture(model_type="qwen2", class_name="Qwen2ForCausalLM"),
        "qwen3": GgufArchitecture(model_type="qwen3", class_name="Qwen3ForCausalLM"),
        "gemma": GgufArchitecture(model_type="gemma", class_name="GemmaForCausalLM", norm_offset=1.0),
        "gemma2": GgufArchitecture(
            model_type="gemma2",
            class_name="Gemma2ForCausalLM",
            norm_offset=1.0,
            layer={**_SANDWICH, "ffn_norm": "pre_feedforward_layernorm"},
            settings={
                "attn_logit_softcapping": "attn_logit_softcapping",
                "final_logit_softcapping": "final_logit_softcapping",
                "attention.sliding_window": "sliding_window",
            },
            more=_gemma2,
        ),
        "phi2": GgufArchitecture(
            model_type="phi",
            class_name="PhiForCausalLM",
            layer={"attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"},
            whole={"output_norm": "model.final_layernorm"},
            epsilon=(_LAYER_NORM, "layer_norm_eps"),
            has_partial_rope=True,
        ),
        "phi3": GgufArchitecture(
            model_type="phi3",
            class_name="Phi3ForCausalLM",
            layer={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
            reads=frozenset({"attention.sliding_window", "rope.scaling.attn_factor"}),
            more=_phi3,
            has_partial_rope=True,
        ),
        "granite": GgufArchitecture(
            model_type="granite",
            class_name="GraniteForCausalLM",
            is_permuted=True,
            settings={
                "embedding_scale": "embedding_multiplier",
                "residual_scale": "residual_multiplier",
                "logit_scale": "logits_scaling",
                "attention.scale": "attention_multiplier",
            },
        ),
        "arcee": GgufArchitecture(model_type="arcee", class_name="ArceeForCausalLM", is_permuted=True),
        "ernie4_5": GgufArchitecture(model_type="ernie4_5", class_name="Ernie4_5ForCausalLM"),
        "seed_oss": GgufArchitecture(
            model_type="seed_oss",
            class_name="SeedOssForCausalLM",
            layer={"post_attention_norm": "post_attention_layernorm"},
            more=_seed_oss,
        ),
        "glm4": GgufArchitecture(
            model_type="glm4",
            class_name="Glm4ForCausalLM",
            layer={
                "ffn_up": "mlp.gate_up_proj",
                "post_attention_norm": "post_self_attn_layernorm",
                "post_ffw_norm": "post_mlp_layernorm",
            },
            more=_glm4,
            has_partial_rope=True,
        ),
        "olmo2": GgufArchitecture(model_type="olmo2", class_name="Olmo2ForCausalLM", layer=_SANDWICH),
        "smollm3": GgufArchitecture(model_type="smollm3", class_name="SmolLM3ForCausalLM", is_permuted=True),
        "starcoder2": GgufArchitecture(
            model_type="starcoder2",
            class_name="Starcoder2ForCausalLM",
            layer=_PLAIN_MLP,
            epsilon=(_LAYER_NORM, "norm_epsilon"),
            constants={"use_bias": True, "sliding_window": None},
        ),
        "command-r": GgufArchitecture(
            model_type="cohere",
            class_name="CohereForCausalLM",
            epsilon=(_LAYER_NORM, "layer_norm_eps"),
            settings={"logit_scale": "logit_scale"},
            more=_cohere,
        ),
        "gpt2": GgufArchitecture(
            model_type="gpt2",
            class_name="GPT2LMHeadModel",
            layer={
                "attn_norm": "ln_1",
                "attn_qkv": "attn.c_attn",
                "attn_output": "attn.c_proj",
                "ffn_norm": "ln_2",
                **_PLAIN_MLP,
            },
            whole={
                "token_embd": "transformer.wte",
                "position_embd": "transformer.wpe",
                "output_norm": "transformer.ln_f",
            },
            layers="transformer.h",
            epsilon=(_LAYER_NORM, "layer_norm_epsilon"),
            transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
            has_rope=False,
            renamed={
                "hidden_size": "n_embd",
                "num_hidden_layers": "n_layer",
                "num_attention_heads": "n_head",
                "max_position_embeddings": "n_positions",
                "intermediate_size": "n_inner",
                "num_key_value_heads": None,
                "head_dim": None,
            },
        ),
        "stablelm": GgufArchitecture(
            model_type="stablelm",
            class_name="StableLmForCausalLM",
            epsilon=(_LAYER_NORM, "layer_norm_eps"),
            reads=frozenset({"use_parallel_residual"}),
            more=_stablelm,
            has_partial_rope=True,
        ),
        "nemotron": GgufArchitecture(
            model_type="nemotron",
            class_name="NemotronForCausalLM",
            epsilon=(_LAYER_NORM, "norm_eps"),
            norm_offset=1.0,
            has_partial_rope=True,
        ),
        "qwen2moe": GgufArchitecture(
            model_type="qwen2_moe",
            class_name="Qwen2MoeForCausalLM",
            layer={
                "ffn_gate_inp": "mlp.gate",
                "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
                **{f"ffn_{part}_shexp": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")},
            },
            experts=_QWEN_EXPERTS,
            settings={**_QWEN_SETTINGS, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
            constants={"norm_topk_prob": False, "decoder_sparse_step": 1},
        ),
        "qwen3moe": GgufArchitecture(
            model_type="qwen3_moe",
            class_name="Qwen3MoeForCausalLM",
            layer={"ffn_gate_inp": "mlp.gate"},
            experts=_QWEN_EXPERTS,
            settings=_QWEN_SETTINGS,
            constants={"norm_topk_prob": True, "decoder_sparse_step": 1},
        ),
    }
)
"""By general.architecture. GGUF calls Mistral llama."""


def row_of(name: str, metadata: Mapping[str, Any]) -> GgufArchitecture:
    """The row of a known general.architecture."""
    num_experts = metadata.get("llama.expert_count")
    has_experts = name == "llama" and isinstance(num_experts, int) and num_experts > 0
    return MIXTRAL if has_experts else ARCHITECTURES[name]
