"""OLMoE (arXiv:2409.02060): norms over all queries and all keys, and 64 small experts."""

from export.model.families.config_values import flag
from export.model.families.experts.mixture import num_experts, stacked_experts, top_k
from export.model.families.row import Architecture, Defaults, Mixture, Raw, Sizes, Style
from export.model.families.windows import windows
from export.model.routing import Routing

_DEFAULTS = Defaults(
    vocab_size=50_304,
    hidden_size=2048,
    intermediate_size=2048,
    num_layers=16,
    num_heads=16,
    max_position_embeddings=4096,
    norm_eps=1e-5,
    bos_id=None,
    eos_id=50_279,
)


def _style(raw: Raw, sizes: Sizes) -> Style:
    count, bias = num_experts(raw, ["num_experts", "num_local_experts"], 64), flag(raw, "attention_bias")
    routing = Routing(top_k=top_k(raw, 8, count), is_normalized=flag(raw, "norm_topk_prob"))
    return Style(
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        qk_norm_is_whole=True,
        mixture=Mixture(num_experts=count, intermediate_size=sizes.intermediate_size, routing=routing),
        windows=windows(raw, "never", sizes, _DEFAULTS),
    )


OLMOE = Architecture(
    class_name="OlmoeForCausalLM",
    style=_style,
    defaults=_DEFAULTS,
    splits=lambda raw, sizes: stacked_experts(),
    fields=dict.fromkeys(
        ("num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob", "attention_bias"), ()
    ),
)
