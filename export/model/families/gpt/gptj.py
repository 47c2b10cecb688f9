"""GPT-J and GPT-Neo: GPT-2's names with separate queries, keys and values.

GPT-J has a parallel block and rotates pairs of neighbouring channels. GPT-Neo does not scale scores, and every second
layer has a window.
"""

from collections.abc import Sequence

from export.checkpoint.config_fields import shown
from export.model.description import NormKind
from export.model.families.config_values import integer
from export.model.families.row import Architecture, Defaults, Names, Raw, Sizes, Style
from runtime.errors import InvalidCheckpoint, UnsupportedModel


def _gptj(raw: Raw, sizes: Sizes) -> Style:
    for name in ("rope_theta", "rope_scaling", "rope_parameters"):
        if raw.get(name) is not None:
            raise UnsupportedModel(f"config.json: {name} = {shown(raw[name])} is not supported: GPT-J's is fixed")
    return Style(
        norm_kind=NormKind.LAYER,
        norm_bias=True,
        is_parallel=True,
        mlp_bias=True,
        head_bias=True,
        is_gated=False,
        rotary_dim=integer(raw, "rotary_dim", 64, maximum=sizes.head_dim),
        rotary_interleaved=True,
    )


GPTJ = Architecture(
    class_name="GPTJForCausalLM",
    style=_gptj,
    defaults=Defaults(
        vocab_size=50_400,
        intermediate_size=None,
        num_layers=28,
        num_heads=16,
        max_position_embeddings=2048,
        norm_eps=1e-5,
        activation="gelu_new",
        bos_id=50_256,
        eos_id=50_256,
    ),
    names=Names(
        block="transformer.h.{layer}",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        attention_norm="ln_1",
        mlp_norm="",
        qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        o="attn.out_proj",
        up="mlp.fc_in",
        down="mlp.fc_out",
    ),
    aliases={
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_inner": "intermediate_size",
        "n_positions": "max_position_embeddings",
        "layer_norm_epsilon": "rms_norm_eps",
        "activation_function": "hidden_act",
    },
    fields={
        "rotary_dim": (),
        "rotary": (True,),
        "n_ctx": (),
        "scale_attn_weights": (True,),
        "summary_activation": (),
        "summary_first_dropout": (),
        "summary_proj_to_labels": (),
        "summary_type": (),
        "summary_use_proj": (),
    },
)


def _gpt_neo(raw: Raw, sizes: Sizes) -> Style:
    window = integer(raw, "window_size", 256)
    kinds = _kinds(raw, sizes.num_layers)
    return Style(
        norm_kind=NormKind.LAYER,
        norm_bias=True,
        o_bias=True,
        mlp_bias=True,
        is_gated=False,
        has_rotary=False,
        attention_scale=1.0,
        windows=tuple(window if kind == "local" else None for kind in kinds),
    )


def _kinds(raw: Raw, num_layers: int) -> Sequence[str]:
    """`global` or `local` for each layer, from `[[["global", "local"], 12]]`: kinds, and how often they repeat."""
    groups = raw.get("attention_types") or [[["global", "local"], 12]]
    kinds: list[str] = []
    for group in groups if isinstance(groups, list) else [groups]:
        if not (
            isinstance(group, list)
            and len(group) == 2
            and isinstance(group[0], list)
            and all(kind in ("global", "local") for kind in group[0])
            and isinstance(group[1], int)
            and 0 <= group[1] <= num_layers
        ):
            raise UnsupportedModel(
                f"config.json: attention_types {shown(groups)} is not supported; supported: lists like "
                "[[['global', 'local'], 12]]"
            )
        kinds += group[0] * group[1]
    if len(kinds) != num_layers:
        raise InvalidCheckpoint(
            f"config.json: attention_types {shown(groups)} means {len(kinds)} layers, and there are {num_layers}"
        )
    if raw.get("attention_layers", kinds) != kinds:
        raise InvalidCheckpoint(
            f"config.json: attention_layers {shown(raw['attention_layers'])} is not what attention_types "
            f"{shown(groups)} says; remove the wrong one"
        )
    return kinds


GPT_NEO = Architecture(
    class_name="GPTNeoForCausalLM",
    style=_gpt_neo,
    defaults=Defaults(
        vocab_size=50_257,
        hidden_size=2048,
        intermediate_size=None,
        num_layers=24,
        num_heads=16,
        max_position_embeddings=2048,
        norm_eps=1e-5,
        activation="gelu_new",
        is_tied=True,
        bos_id=50_256,
        eos_id=50_256,
    ),
    names=Names(
        block="transformer.h.{layer}",
        embedding="transformer.wte",
        positions="transformer.wpe",
        final_norm="transformer.ln_f",
        attention_norm="ln_1",
        mlp_norm="ln_2",
        qkv=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
        o="attn.attention.out_proj",
        up="mlp.c_fc",
        down="mlp.c_proj",
    ),
    aliases={
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "layer_norm_epsilon": "rms_norm_eps",
        "activation_function": "hidden_act",
    },
    fields={
        "attention_types": (),
        "attention_layers": (),
        "window_size": (),
        "summary_activation": (),
        "summary_first_dropout": (),
        "summary_proj_to_labels": (),
        "summary_type": (),
        "summary_use_proj": (),
    },
)
