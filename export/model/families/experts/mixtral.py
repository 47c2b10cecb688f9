"""Mixtral: Mistral's block with a mixture of experts instead of the MLP."""

from export.model.families.config_values import integer
from export.model.families.row import Architecture, Defaults, Mixture, Names, Raw, Sizes, Style
from export.model.families.windows import windows
from export.model.routing import Routing
from runtime.errors import InvalidCheckpoint

_DEFAULTS = Defaults(
    intermediate_size=14_336,
    num_kv_heads=8,
    max_position_embeddings=131_072,
    norm_eps=1e-5,
    rope_theta=1e6,
)


def _style(raw: Raw, sizes: Sizes) -> Style:
    num_experts = integer(raw, "num_local_experts", 8, maximum=1024)
    top_k = integer(raw, "num_experts_per_tok", 2, maximum=1024)
    if top_k > num_experts:
        raise InvalidCheckpoint(
            f"config.json: num_experts_per_tok {top_k} is more than num_local_experts {num_experts}"
        )
    mixture = Mixture(num_experts=num_experts, intermediate_size=sizes.intermediate_size, routing=Routing(top_k=top_k))
    return Style(mixture=mixture, windows=windows(raw, "uniform", sizes, _DEFAULTS))


MIXTRAL = Architecture(
    class_name="MixtralForCausalLM",
    style=_style,
    defaults=_DEFAULTS,
    names=Names(
        router="block_sparse_moe.gate", experts="block_sparse_moe.experts.{expert}", expert_parts=("w1", "w3", "w2")
    ),
    fields={"num_local_experts": (), "num_experts_per_tok": (), "router_jitter_noise": ()},
)
