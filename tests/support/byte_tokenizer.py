"""Small real tokenizers: one token per byte, byte-level like GPT-2's or with byte fallback like Llama 2's."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer
from tokenizers.models import BPE

from runtime.text.tokenizer import Tokenizer

BOS, EOS = "<|begin|>", "<|end|>"
SPECIALS = [BOS, EOS]
CONFIG = {"bos_token": BOS, "eos_token": {"content": EOS, "special": True}}


def byte_level_hf() -> HfTokenizer:
    """256 bytes as tokens 0 to 255 in the order of GPT-2's alphabet, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = HfTokenizer(BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    return tokenizer


def byte_fallback_hf() -> HfTokenizer:
    """256 byte tokens <0x00>..., then the lower-case letters, the space sign and a few words."""
    words = [*"abcdefghijklmnopqrstuvwxyz", "\u2581", "\u2581the", "\u2581cat", "ing", "\u00e9", "\u4e2d"]
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {w: 256 + i for i, w in enumerate(words)}
    tokenizer = HfTokenizer(BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<0x00>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    return tokenizer


def byte_tokenizer(config: dict[str, Any] | None = None) -> Tokenizer:
    """The byte-level one, wrapped. EOS has the id 257."""
    return Tokenizer(byte_level_hf(), CONFIG if config is None else config)


def write_byte_tokenizer(directory: Path) -> None:
    """Give a checkpoint directory the byte-level tokenizer."""
    (directory / "tokenizer.json").write_text(byte_level_hf().to_str())
    (directory / "tokenizer_config.json").write_text(json.dumps(CONFIG))


def byte_fallback_tokenizer() -> Tokenizer:
    """The SentencePiece-like one, wrapped."""
    return Tokenizer(byte_fallback_hf(), CONFIG)
