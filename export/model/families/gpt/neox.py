"""GPT-NeoX (Pythia), Falcon and BLOOM: queries, keys and values of each head together in one matrix."""

from dataclasses import replace

from export.checkpoint.fused import Split
from export.model.alibi import bloom_slopes
from export.model.description import NormKind
from export.model.families.config_values import flag, integer, share
from export.model.families.row import Architecture, Defaults, Names, Raw, Sizes, Style
from runtime.errors import UnsupportedModel


def _by_head(raw: Raw, sizes: Sizes) -> tuple[Split, ...]:
    """Each head's query, key and value in turn; heads that share key and value have their queries before these."""
    queries = sizes.num_heads // sizes.num_kv_heads * sizes.head_dim
    parts = (("q", queries), ("k", sizes.head_dim), ("v", sizes.head_dim))
    return (Split("query_key_value", parts, groups=sizes.num_kv_heads),)


def _neox(raw: Raw, sizes: Sizes) -> Style:
    """arXiv:2204.06745."""
    bias = flag(raw, "attention_bias", default=True)
    return Style(
        norm_kind=NormKind.LAYER,
        norm_bias=True,
        is_parallel=flag(raw, "use_parallel_residual", default=True),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=True,
        is_gated=False,
        rotary_dim=int(sizes.head_dim * share(raw, "partial_rotary_factor", 0.25)),
    )


GPT_NEOX = Architecture(
    class_name="GPTNeoXForCausalLM",
    style=_neox,
    defaults=Defaults(
        vocab_size=50_432,
        hidden_size=6144,
        intermediate_size=24_576,
        num_layers=44,
        num_heads=64,
        norm_eps=1e-5,
        activation="gelu",
        bos_id=0,
    ),
    names=Names(
        block="gpt_neox.layers.{layer}",
        embedding="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        head="embed_out",
        qkv=("attention.q", "attention.k", "attention.v"),
        o="attention.dense",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
    ),
    splits=_by_head,
    aliases={"layer_norm_eps": "rms_norm_eps"},
    synonyms={"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"},
    fields={"attention_bias": (), "use_parallel_residual": (), "partial_rotary_factor": ()},
)


def _with_kv_heads(raw: Raw) -> Raw:
    """Falcon reads num_kv_heads in its new architecture alone."""
    if raw.get("num_key_value_heads") is not None:
        raise UnsupportedModel(
            "config.json: num_key_value_heads is not supported for model_type 'falcon', which reads num_kv_heads"
        )
    is_new = flag(raw, "new_decoder_architecture")
    heads = integer(raw, "num_attention_heads", 71)
    shared = 1 if flag(raw, "multi_query", default=True) else heads
    given = heads if raw.get("num_kv_heads") is None else integer(raw, "num_kv_heads", heads)
    return {**raw, "num_key_value_heads": given if is_new else shared}


def _falcon(raw: Raw, sizes: Sizes) -> Style:
    """arXiv:2311.16867. A parallel block has one norm or two, and the older architecture may be sequential."""
    bias, is_new = flag(raw, "bias"), flag(raw, "new_decoder_architecture")
    is_parallel = is_new or flag(raw, "parallel_attn", default=True)
    num_norms = integer({"num_ln_in_parallel_attn": raw.get("num_ln_in_parallel_attn") or 2}, "num_ln_in_parallel_attn",
                        2, maximum=2)  # fmt: skip
    names = FALCON.names
    if is_new and num_norms == 2:
        names = replace(names, attention_norm="ln_attn", mlp_norm="ln_mlp")
    elif is_parallel:
        names = replace(names, mlp_norm="")
    return Style(
        norm_kind=NormKind.LAYER,
        norm_bias=True,
        is_parallel=is_parallel,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        is_gated=False,
        names=names,
    )


FALCON = Architecture(
    class_name="FalconForCausalLM",
    style=_falcon,
    defaults=Defaults(
        vocab_size=65_024,
        hidden_size=4544,
        intermediate_size=None,
        num_heads=71,
        norm_eps=1e-5,
        activation="gelu",
        is_tied=True,
        bos_id=11,
        eos_id=11,
    ),
    names=Names(
        block="transformer.h.{layer}",
        embedding="transformer.word_embeddings",
        final_norm="transformer.ln_f",
        qkv=("self_attention.q", "self_attention.k", "self_attention.v"),
        o="self_attention.dense",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
    ),
    prepared=_with_kv_heads,
    splits=_by_head,
    aliases={"layer_norm_epsilon": "rms_norm_eps", "ffn_hidden_size": "intermediate_size", "activation": "hidden_act"},
    # Falcon's ALiBi rounds its slopes to bfloat16, which no graph does.
    fields={
        "alibi": (False,),
        "bias": (),
        "multi_query": (),
        "new_decoder_architecture": (),
        "num_kv_heads": (),
        "num_ln_in_parallel_attn": (),
        "parallel_attn": (),
    },
)


def _bloom(raw: Raw, sizes: Sizes) -> Style:
    """arXiv:2211.05100."""
    return Style(
        norm_kind=NormKind.LAYER,
        norm_bias=True,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        is_gated=False,
        has_rotary=False,
        alibi=bloom_slopes(sizes.num_heads),
    )


BLOOM = Architecture(
    class_name="BloomForCausalLM",
    style=_bloom,
    defaults=Defaults(
        vocab_size=250_880,
        hidden_size=64,
        intermediate_size=None,
        num_layers=2,
        num_heads=8,
        norm_eps=1e-5,
        activation="gelu_new",
        is_tied=True,
    ),
    names=Names(
        block="transformer.h.{layer}",
        embedding="transformer.word_embeddings",
        embedding_norm="transformer.word_embeddings_layernorm",
        final_norm="transformer.ln_f",
        qkv=("self_attention.q", "self_attention.k", "self_attention.v"),
        o="self_attention.dense",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
    ),
    splits=_by_head,
    aliases={"layer_norm_epsilon": "rms_norm_eps"},
    synonyms={"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embed": "hidden_size"},
    # The others change how it is computed, and results only by rounding.
    fields={
        "apply_residual_connection_post_layernorm": (False,),
        "slow_but_exact": (),
        "attention_softmax_in_fp32": (),
        "bias_dropout_fusion": (),
        "masked_softmax_fusion": (),
        "offset_alibi": (),
        "skip_bias_add": (),
        "skip_bias_add_qkv": (),
    },
)
