"""Qwen2-MoE, whose shared expert has a gate, and Qwen3-MoE, which has no shared expert."""

from export.model.families.config_values import flag, integer
from export.model.families.experts.mixture import dense_between, num_experts, refuse, stacked_experts, top_k
from export.model.families.row import Architecture, Defaults, Mixture, Raw, Sizes, Style
from export.model.families.windows import windows
from export.model.routing import Routing

_QWEN2 = Defaults(
    vocab_size=151_936,
    hidden_size=2048,
    intermediate_size=5632,
    num_layers=24,
    num_heads=16,
    num_kv_heads=16,
    max_position_embeddings=32_768,
    window=4096,
    bos_id=None,
    eos_id=None,
)
_QWEN3 = Defaults(
    vocab_size=151_936,
    hidden_size=2048,
    intermediate_size=6144,
    num_layers=24,
    num_heads=32,
    num_kv_heads=4,
    max_position_embeddings=32_768,
    window=4096,
    bos_id=None,
    eos_id=None,
)
_NAMES = ("num_experts", "num_local_experts")
MIXTURE_FIELDS = (
    *_NAMES, "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"
)  # fmt: skip


def mixture_of(
    raw: Raw, sizes: Sizes, *, experts: int, chosen: int, inner: int, shared: int = 0, is_normalized: bool = False
) -> Mixture:
    """A mixture of experts in the fields of Qwen's configs.

    experts, chosen, inner, is_normalized: the family's defaults; shared: channels of the shared expert, 0 for none
    """
    count = num_experts(raw, _NAMES, experts)
    return Mixture(
        num_experts=count,
        intermediate_size=integer(raw, "moe_intermediate_size", inner),
        routing=Routing(
            top_k=top_k(raw, chosen, count), is_normalized=flag(raw, "norm_topk_prob", default=is_normalized)
        ),
        shared_size=shared,
        has_shared_gate=shared > 0,
        dense_layers=dense_between(raw, sizes),
    )


def _qwen2(raw: Raw, sizes: Sizes) -> Style:
    if raw.get("layer_types") is None:
        refuse(raw, "use_sliding_window", "because no file of this family says which layers it means; add layer_types")
    # transformers 5 writes 0 for no window.
    window = raw.get("sliding_window") or None
    shared = integer(raw, "shared_expert_intermediate_size", 5632)
    return Style(
        qkv_bias=flag(raw, "qkv_bias", default=True),
        mixture=mixture_of(raw, sizes, experts=60, chosen=4, inner=1408, shared=shared),
        windows=windows({**raw, "sliding_window": window}, "flagged", sizes, _QWEN2),
    )


def _qwen3(raw: Raw, sizes: Sizes) -> Style:
    window = integer(raw, "sliding_window", 4096) if flag(raw, "use_sliding_window") else None
    has_bias = flag(raw, "attention_bias")
    return Style(
        qkv_bias=has_bias,
        o_bias=has_bias,
        qk_norm=True,
        mixture=mixture_of(raw, sizes, experts=128, chosen=8, inner=768),
        windows=windows({**raw, "sliding_window": window, "use_sliding_window": None}, "uniform", sizes, _QWEN3),
    )


QWEN2_MOE = Architecture(
    class_name="Qwen2MoeForCausalLM",
    style=_qwen2,
    defaults=_QWEN2,
    splits=lambda raw, sizes: stacked_experts(),
    fields=dict.fromkeys((*MIXTURE_FIELDS, "qkv_bias", "shared_expert_intermediate_size"), ()),
)

QWEN3_MOE = Architecture(
    class_name="Qwen3MoeForCausalLM",
    style=_qwen3,
    defaults=_QWEN3,
    splits=lambda raw, sizes: stacked_experts(),
    fields=dict.fromkeys((*MIXTURE_FIELDS, "attention_bias"), ()),
)
