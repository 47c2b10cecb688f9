"""GPT-BigCode, the first StarCoder: GPT-2's block with one key-value head, and matrices that are not transposed."""

from dataclasses import replace

from export.checkpoint.fused import Split
from export.model.families.gpt.gpt2 import GPT2
from export.model.families.row import Architecture, Raw, Sizes, Style
from runtime.errors import InvalidCheckpoint


def _style(raw: Raw, sizes: Sizes) -> Style:
    if sizes.num_kv_heads != 1:
        raise InvalidCheckpoint(
            f"config.json: num_key_value_heads is {sizes.num_kv_heads}, and multi_query means 1; remove the wrong one"
        )
    return GPT2.style(raw, sizes)


def _splits(raw: Raw, sizes: Sizes) -> tuple[Split, ...]:
    parts = (("attn.q", sizes.hidden_size), ("attn.k", sizes.head_dim), ("attn.v", sizes.head_dim))
    return (Split("attn.c_attn", parts),)


GPT_BIGCODE = Architecture(
    class_name="GPTBigCodeForCausalLM",
    style=_style,
    defaults=replace(GPT2.defaults, num_kv_heads=1, activation="gelu_pytorch_tanh"),
    names=GPT2.names,
    splits=_splits,
    aliases=GPT2.aliases,
    # The others say how it runs.
    fields={
        **GPT2.fields,
        "multi_query": (True,),
        "attention_softmax_in_fp32": (),
        "scale_attention_softmax_in_fp32": (),
        "inference_runner": (),
        "max_batch_size": (),
        "pre_allocate_kv_cache": (),
        "validate_runner_input": (),
    },
)
