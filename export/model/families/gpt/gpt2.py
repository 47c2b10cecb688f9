"""GPT-2: learned positions, layer norms with biases, an MLP without a gate, transposed matrices (Conv1D)."""

from export.checkpoint.fused import Split
from export.model.description import NormKind
from export.model.families.row import Architecture, Defaults, Names, Raw, Sizes, Style


def _style(raw: Raw, sizes: Sizes) -> Style:
    return Style(
        norm_kind=NormKind.LAYER,
        norm_bias=True,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        is_gated=False,
        has_rotary=False,
    )


GPT2 = Architecture(
    class_name="GPT2LMHeadModel",
    style=_style,
    defaults=Defaults(
        vocab_size=50_257,
        hidden_size=768,
        intermediate_size=None,
        num_layers=12,
        num_heads=12,
        max_position_embeddings=1024,
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
        qkv=("attn.q", "attn.k", "attn.v"),
        o="attn.c_proj",
        up="mlp.c_fc",
        down="mlp.c_proj",
    ),
    splits=lambda raw, sizes: (
        Split("attn.c_attn", (("attn.q", None), ("attn.k", None), ("attn.v", None)), transposed=True),
        *(Split(name, ((name, None),), transposed=True) for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
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
    # n_ctx is an old name of n_positions; the summary fields belong to another class; reorder_and_upcast_attn changes
    # results only by rounding.
    fields={
        "n_ctx": (),
        "scale_attn_weights": (True,),
        "reorder_and_upcast_attn": (),
        "summary_activation": (),
        "summary_first_dropout": (),
        "summary_proj_to_labels": (),
        "summary_type": (),
        "summary_use_proj": (),
    },
)
