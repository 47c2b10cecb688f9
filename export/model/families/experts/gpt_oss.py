"""gpt-oss: attention sinks, a window in every second layer, and experts with biases and a clamped activation."""

from export.checkpoint.fused import Split
from export.model.description import Clamp
from export.model.families.config_values import flag, number
from export.model.families.experts.mixture import num_experts, top_k
from export.model.families.row import Architecture, Defaults, Mixture, Names, Raw, Sizes, Style
from export.model.families.windows import windows
from export.model.routing import Routing

_DEFAULTS = Defaults(
    vocab_size=201_088,
    hidden_size=2880,
    intermediate_size=2880,
    num_layers=36,
    num_heads=64,
    num_kv_heads=8,
    head_dim=64,
    max_position_embeddings=131_072,
    norm_eps=1e-5,
    rope_theta=150_000.0,
    window=128,
    bos_id=None,
    eos_id=None,
)


def _style(raw: Raw, sizes: Sizes) -> Style:
    count, has_bias = (
        num_experts(raw, ["num_local_experts", "num_experts"], 128),
        flag(raw, "attention_bias", default=True),
    )
    return Style(
        qkv_bias=has_bias,
        o_bias=has_bias,
        has_sinks=True,
        mixture=Mixture(
            num_experts=count,
            intermediate_size=sizes.intermediate_size,
            routing=Routing(top_k=top_k(raw, 4, count)),
            router_bias=True,
            expert_bias=True,
            clamp=Clamp(limit=number(raw, "swiglu_limit", 7.0), alpha=number(raw, "swiglu_alpha", 1.702)),
        ),
        windows=windows(raw, "patterned", sizes, _DEFAULTS, pattern=2),
    )


def _splits(raw: Raw, sizes: Sizes) -> tuple[Split, ...]:
    both = tuple((f"mlp.experts.{{}}.{part}_proj", None) for part in ("gate", "up"))
    return (
        Split("mlp.experts.gate_up_proj", both, transposed=True, experts=True, interleaved=True),
        Split("mlp.experts.down_proj", (("mlp.experts.{}.down_proj", None),), transposed=True, experts=True),
    )


GPT_OSS = Architecture(
    class_name="GptOssForCausalLM",
    style=_style,
    defaults=_DEFAULTS,
    names=Names(router="mlp.router"),
    splits=_splits,
    rope={
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    fields=dict.fromkeys(
        (
            "num_local_experts", "num_experts", "num_experts_per_tok", "experts_per_token", "attention_bias",
            "swiglu_limit", "swiglu_alpha", "initial_context_length",
        ),
        (),
    ),
)  # fmt: skip
