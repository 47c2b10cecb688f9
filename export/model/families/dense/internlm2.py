"""InternLM2: Llama's block, with queries, keys and values in one matrix, and tensor names of its own.

transformers has no code of it, so the row follows InternLM's: in `wqkv`, each key-value head has its queries before it.
"""

from export.checkpoint.fused import Split
from export.model.families.config_values import flag
from export.model.families.row import Architecture, Defaults, Names, Raw, Sizes, Style


def _style(raw: Raw, sizes: Sizes) -> Style:
    bias = flag(raw, "bias", default=True)
    return Style(qkv_bias=bias, o_bias=bias)


def _splits(raw: Raw, sizes: Sizes) -> tuple[Split, ...]:
    queries = sizes.num_heads // sizes.num_kv_heads * sizes.head_dim
    parts = (("attention.q", queries), ("attention.k", sizes.head_dim), ("attention.v", sizes.head_dim))
    return (Split("attention.wqkv", parts, groups=sizes.num_kv_heads),)


INTERNLM2 = Architecture(
    class_name="InternLM2ForCausalLM",
    style=_style,
    defaults=Defaults(vocab_size=103_168),
    names=Names(
        embedding="model.tok_embeddings",
        head="output",
        attention_norm="attention_norm",
        mlp_norm="ffn_norm",
        qkv=("attention.q", "attention.k", "attention.v"),
        o="attention.wo",
        gate="feed_forward.w1",
        up="feed_forward.w3",
        down="feed_forward.w2",
    ),
    splits=_splits,
    fields={"bias": ()},
)
