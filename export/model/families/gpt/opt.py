"""OPT and MPT: GPT's blocks with ReLU and positions that begin at row 2, and with ALiBi and norms without biases."""

from collections.abc import Mapping

from export.checkpoint.config_fields import shown
from export.checkpoint.fused import Split
from export.model.alibi import mpt_slopes
from export.model.description import NormKind
from export.model.families.config_values import flag, optional_number
from export.model.families.row import Architecture, Defaults, Names, Raw, Sizes, Style
from runtime.errors import InvalidCheckpoint, UnsupportedModel


def _opt(raw: Raw, sizes: Sizes) -> Style:
    """arXiv:2205.01068. The norms' epsilon is fixed in the model's code."""
    if raw.get("word_embed_proj_dim") not in (None, sizes.hidden_size):
        raise UnsupportedModel(
            f"config.json: word_embed_proj_dim {raw['word_embed_proj_dim']} is not supported for model_type 'opt'; "
            f"supported: hidden_size, {sizes.hidden_size}"
        )
    if raw.get("_remove_final_layer_norm"):
        raise UnsupportedModel("config.json: _remove_final_layer_norm = True is not supported for model_type 'opt'")
    bias = flag(raw, "enable_bias", default=True)
    return Style(
        norm_kind=NormKind.LAYER,
        norm_bias=True,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        is_gated=False,
        has_rotary=False,
        position_offset=2,
    )


OPT = Architecture(
    class_name="OPTForCausalLM",
    style=_opt,
    defaults=Defaults(
        vocab_size=50_272,
        hidden_size=768,
        intermediate_size=3072,
        num_layers=12,
        num_heads=12,
        norm_eps=1e-5,
        activation="relu",
        is_tied=True,
        bos_id=2,
        eos_id=2,
    ),
    names=Names(
        block="model.decoder.layers.{layer}",
        embedding="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        final_norm="model.decoder.final_layer_norm",
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        o="self_attn.out_proj",
        up="fc1",
        down="fc2",
    ),
    aliases={"ffn_dim": "intermediate_size", "activation_function": "hidden_act"},
    fields={
        "do_layer_norm_before": (True,),
        "enable_bias": (),
        "layer_norm_elementwise_affine": (True,),
        "layerdrop": (),
        "word_embed_proj_dim": (),
    },
)


def _attention_fields(raw: Raw) -> Raw:
    """config.json with the fields in MPT's attn_config beside the others."""
    inner = raw.get("attn_config") or {}
    if not isinstance(inner, Mapping):
        raise InvalidCheckpoint(f"config.json: attn_config must be an object, got {shown(inner)}")
    return {**{name: value for name, value in raw.items() if name != "attn_config"}, **inner}


def _mpt(raw: Raw, sizes: Sizes) -> Style:
    return Style(
        norm_kind=NormKind.LAYER,
        is_gated=False,
        has_rotary=False,
        attention_scale=optional_number(raw, "softmax_scale"),
        qkv_clip=optional_number(raw, "clip_qkv"),
        alibi=mpt_slopes(sizes.num_heads),
    )


MPT = Architecture(
    class_name="MptForCausalLM",
    style=_mpt,
    defaults=Defaults(
        vocab_size=50_368,
        hidden_size=2048,
        intermediate_size=None,
        num_layers=24,
        num_heads=16,
        norm_eps=1e-5,
        activation="gelu",
        is_tied=True,
        bos_id=None,
        eos_id=None,
    ),
    names=Names(
        block="transformer.blocks.{layer}",
        embedding="transformer.wte",
        final_norm="transformer.norm_f",
        attention_norm="norm_1",
        mlp_norm="norm_2",
        qkv=("attn.q", "attn.k", "attn.v"),
        o="attn.out_proj",
        up="ffn.up_proj",
        down="ffn.down_proj",
    ),
    prepared=_attention_fields,
    splits=lambda raw, sizes: (Split("attn.Wqkv", (("attn.q", None), ("attn.k", None), ("attn.v", None))),),
    aliases={
        "d_model": "hidden_size",
        "n_heads": "num_attention_heads",
        "n_layers": "num_hidden_layers",
        "max_seq_len": "max_position_embeddings",
        "layer_norm_epsilon": "rms_norm_eps",
    },
    # The others say how it is made or run. transformers' code always has ALiBi, and never learned positions.
    fields={
        "alibi": (True,),
        "alibi_bias_max": (8,),
        "attn_type": ("multihead_attention",),
        "attn_impl": (),
        "attn_uses_sequence_id": (False,),
        "clip_qkv": (),
        "embedding_fraction": (1,),
        "expansion_ratio": (4,),
        "init_config": (),
        "init_device": (),
        "learned_pos_emb": (),
        "no_bias": (True,),
        "norm_type": ("low_precision_layernorm",),
        "prefix_lm": (False,),
        "qk_ln": (False,),
        "softmax_scale": (),
        "tokenizer_name": (),
        "verbose": (),
    },
)
