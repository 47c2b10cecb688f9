"""A random model of Qwen2.5-0.5B's shape, for speed alone: as a Hugging Face directory, and as a GGUF file.

usage: python -m benchmarks.random_model DIRECTORY [FILE.gguf]

24 layers, hidden size 896, 14 query heads of 64 over 2 KV heads, 4,864 inner channels, 151,936 tokens, tied: 494
million parameters, 2 GB in float32. Both files hold the same weights, drawn from one seed. The tokenizer has a
printable word for every token, so that a server streams text; in a text it finds single bytes only. Half a minute.
"""

import itertools
import json
import string
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from tests.support.tiny.checkpoint import shapes_of, write_checkpoint

QWEN: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "bos_token_id": 151_935,
    "eos_token_id": 151_935,
}
END = "<|end|>"
# One merge, because llama.cpp does not load a vocabulary without any.
MERGE = ("\u0120", "a")

_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def words() -> list[str]:
    """Every token but the last as byte-level BPE spells it: 256 bytes, then a space and letters; distinct."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = (
        MERGE[0] + "".join(some)
        for length in itertools.count(1)
        for some in itertools.product(string.ascii_lowercase, repeat=length)
    )
    return [*alphabet, *itertools.islice(letters, QWEN["vocab_size"] - len(alphabet) - 1)]


def write_directory(directory: Path) -> None:
    """config.json, model.safetensors and a tokenizer."""
    write_checkpoint(directory, QWEN)
    tokenizer = Tokenizer(BPE(vocab={word: idx for idx, word in enumerate(words())}, merges=[MERGE]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def gguf_name(name: str) -> str:
    """A tensor's name in a GGUF file."""
    fixed = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in fixed:
        return fixed[name]
    _, _, layer, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{_GGUF_NAMES[module]}.{kind}"


def write_gguf(directory: Path, file: Path) -> None:
    """The directory's weights in float32, as llama.cpp reads them."""
    import gguf
    from safetensors.numpy import load_file

    writer = gguf.GGUFWriter(str(file), "qwen2")
    writer.add_block_count(QWEN["num_hidden_layers"])
    writer.add_context_length(QWEN["max_position_embeddings"])
    writer.add_embedding_length(QWEN["hidden_size"])
    writer.add_feed_forward_length(QWEN["intermediate_size"])
    writer.add_head_count(QWEN["num_attention_heads"])
    writer.add_head_count_kv(QWEN["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(QWEN["rms_norm_eps"])
    writer.add_rope_freq_base(QWEN["rope_theta"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    tokens = [*words(), END]
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges([" ".join(MERGE)])
    writer.add_bos_token_id(QWEN["bos_token_id"])
    writer.add_eos_token_id(QWEN["eos_token_id"])
    weights: dict[str, NDArray[np.float32]] = load_file(directory / "model.safetensors")
    for name in shapes_of(QWEN):
        writer.add_tensor(gguf_name(name), weights[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    match sys.argv[1:]:
        case [directory]:
            write_directory(Path(directory))
        case [directory, file]:
            write_directory(Path(directory))
            write_gguf(Path(directory), Path(file))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
