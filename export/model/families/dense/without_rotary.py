"""SmolLM3 and EXAONE 4: some layers have no rotary embedding.

EXAONE 4 has norms behind attention and MLP alone. Its layers without a window do not rotate.
"""

from export.checkpoint.config_fields import shown
from export.model.families.config_values import flag, integer
from export.model.families.row import Architecture, Defaults, Names, Raw, Sizes, Style
from export.model.families.windows import windows
from runtime.errors import InvalidCheckpoint

_SMOLLM3 = Defaults(
    vocab_size=128_256,
    hidden_size=2048,
    num_layers=36,
    num_heads=16,
    num_kv_heads=4,
    max_position_embeddings=32_768,
    rope_theta=2e6,
    is_tied=True,
    bos_id=128_000,
    eos_id=128_001,
)


def _smollm3(raw: Raw, sizes: Sizes) -> Style:
    bias = flag(raw, "attention_bias")
    return Style(qkv_bias=bias, o_bias=bias, mlp_bias=flag(raw, "mlp_bias"), rotates=_rotates(raw, sizes.num_layers))


def _rotates(raw: Raw, num_layers: int) -> tuple[bool, ...]:
    """no_rope_layers has a 1 for a layer that rotates; without it, every no_rope_layer_interval-th layer does not."""
    given = raw.get("no_rope_layers")
    if given is None:
        every = integer(raw, "no_rope_layer_interval", 4)
        return tuple((layer + 1) % every != 0 for layer in range(num_layers))
    if not isinstance(given, list) or len(given) != num_layers or not all(one in (0, 1) for one in given):
        raise InvalidCheckpoint(
            f"config.json: no_rope_layers must be 0 or 1 for each of the {num_layers} layers, got {shown(given)}"
        )
    return tuple(map(bool, given))


SMOLLM3 = Architecture(
    class_name="SmolLM3ForCausalLM",
    style=_smollm3,
    defaults=_SMOLLM3,
    fields={"attention_bias": (), "mlp_bias": (), "no_rope_layers": (), "no_rope_layer_interval": ()},
)

_EXAONE4 = Defaults(
    vocab_size=102_400,
    intermediate_size=16_384,
    num_kv_heads=32,
    norm_eps=1e-5,
    window=4096,
    bos_id=0,
)


def _exaone4(raw: Raw, sizes: Sizes) -> Style:
    """arXiv:2507.11407. Without sliding_window, as in the 1.2B model, every layer rotates."""
    by_layer = windows(raw, "patterned", sizes, _EXAONE4, pattern=4)
    has_windows = raw.get("sliding_window", _EXAONE4.window) is not None
    return Style(
        qk_norm=True,
        rotates=tuple(window is not None for window in by_layer) if has_windows else (),
        windows=by_layer,
    )


EXAONE4 = Architecture(
    class_name="Exaone4ForCausalLM",
    style=_exaone4,
    defaults=_EXAONE4,
    names=Names(
        attention_norm="",
        attention_out_norm="post_attention_layernorm",
        mlp_norm="",
        mlp_out_norm="post_feedforward_layernorm",
    ),
    # A pattern like "LLLG" is only read together with layer_types, which then decides.
    fields={"sliding_window_pattern": ()},
)
