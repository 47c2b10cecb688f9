"""Granite and its relatives: Llama's block, with multipliers of embeddings, scores, logits and what a layer adds.

MiniCPM says the same in other fields (arXiv:2404.06395); its code is its own, so the row follows OpenBMB's.
"""

import math

from export.model.families.config_values import flag, number
from export.model.families.row import Architecture, Defaults, Names, Raw, Sizes, Style

_FIELDS: dict[str, tuple[object, ...]] = {
    "attention_bias": (),
    "mlp_bias": (),
    "embedding_multiplier": (),
    "logits_scaling": (),
    "residual_multiplier": (),
    "attention_multiplier": (),
}


def _style(raw: Raw, *, attention_multiplier: float, logit_scale: float) -> Style:
    bias = flag(raw, "attention_bias")
    return Style(
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=flag(raw, "mlp_bias"),
        attention_scale=number(raw, "attention_multiplier", attention_multiplier),
        embedding_scale=number(raw, "embedding_multiplier", 1),
        residual_scale=number(raw, "residual_multiplier", 1),
        logit_scale=logit_scale,
    )


def _granite(raw: Raw, sizes: Sizes) -> Style:
    return _style(raw, attention_multiplier=1, logit_scale=1 / number(raw, "logits_scaling", 1))


GRANITE = Architecture(class_name="GraniteForCausalLM", style=_granite, fields=_FIELDS)


def _hyperclovax(raw: Raw, sizes: Sizes) -> Style:
    """Unlike Granite's, its logits_scaling multiplies; null means the usual scale of scores."""
    without_null = {name: value for name, value in raw.items() if name != "attention_multiplier" or value is not None}
    scale = number(raw, "logits_scaling", 1)
    return _style(without_null, attention_multiplier=sizes.head_dim**-0.5, logit_scale=scale)


HYPERCLOVAX = Architecture(
    class_name="HyperCLOVAXForCausalLM",
    style=_hyperclovax,
    names=Names(attention_out_norm="post_norm1", mlp_out_norm="post_norm2"),
    fields={**_FIELDS, "use_post_norm": (True,)},
)


def _minicpm(raw: Raw, sizes: Sizes) -> Style:
    return Style(
        qkv_bias=flag(raw, "attention_bias"),
        o_bias=flag(raw, "attention_bias"),
        embedding_scale=number(raw, "scale_emb", 1),
        residual_scale=number(raw, "scale_depth", 1) / math.sqrt(sizes.num_layers),
        logit_scale=number(raw, "dim_model_base", 1) / sizes.hidden_size,
    )


MINICPM = Architecture(
    class_name="MiniCPMForCausalLM",
    style=_minicpm,
    defaults=Defaults(is_tied=True),
    fields={"attention_bias": (), "scale_emb": (), "scale_depth": (), "dim_model_base": ()},
)
