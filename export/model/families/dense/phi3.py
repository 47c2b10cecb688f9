"""Phi-3 and Phi-4-mini: Llama's block with fused matrices, partial rotary embedding and longrope."""

from export.checkpoint.fused import Split
from export.model.families.config_values import share
from export.model.families.row import Architecture, Defaults, Raw, Sizes, Style
from export.model.families.windows import windows

_DEFAULTS = Defaults(
    vocab_size=32_064,
    hidden_size=3072,
    intermediate_size=8192,
    max_position_embeddings=4096,
    norm_eps=1e-5,
    bos_id=1,
    eos_id=32_000,
)


def _style(raw: Raw, sizes: Sizes) -> Style:
    return Style(
        rotary_dim=int(sizes.head_dim * share(raw, "partial_rotary_factor")),
        windows=windows(raw, "uniform", sizes, _DEFAULTS),
    )


def _splits(raw: Raw, sizes: Sizes) -> tuple[Split, ...]:
    q_rows, kv_rows = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    qkv = (("self_attn.q_proj", q_rows), ("self_attn.k_proj", kv_rows), ("self_attn.v_proj", kv_rows))
    return (
        Split("self_attn.qkv_proj", qkv),
        Split("mlp.gate_up_proj", (("mlp.gate_proj", None), ("mlp.up_proj", None))),
    )


PHI3 = Architecture(
    class_name="Phi3ForCausalLM",
    style=_style,
    defaults=_DEFAULTS,
    rope_kinds=("default", "longrope"),
    splits=_splits,
    fields={"partial_rotary_factor": (), "original_max_position_embeddings": ()},
)
