"""How each family splits text before byte-level BPE, by the name that a GGUF file gives for it.

The expressions are those of the models' own tokenizer.json files. llama.cpp rewrites some of them, to the same effect.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_PUNCTUATION}[\r\n]*|{_SPACES}"
QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_PUNCTUATION}[\r\n]*|{_SPACES}"
QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}|{_PUNCTUATION}[\r\n/]*|{_SPACES}"
)
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_PUNCTUATION}[\r\n/]*|{_SPACES}"
)
_ASCII_PUNCTUATION = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    rf"{_ASCII_PUNCTUATION}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
)
_DIGITS = r"\p{N}"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One row of the table.

    splits: regular expressions, each applied to the pieces the one before left; matches become pieces
    is_nfc: the original tokenizer normalizes to NFC first, which GGUF does not record
    ignore_merges: a piece that is a token is taken whole
    adds_bos: whether a text starts with bos where the file does not say
    """

    splits: tuple[str, ...]
    is_nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


_LLAMA3 = PreTokenizer((LLAMA3,), ignore_merges=True, adds_bos=True)
_SINGLE_DIGITS = PreTokenizer((_DIGITS, GPT2))
_NEOX = PreTokenizer((GPT2,), is_nfc=True)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType(
    {
        **dict.fromkeys(("gpt-2", "phi-2"), PreTokenizer((GPT2,))),
        **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "minerva-7b"), _SINGLE_DIGITS),
        "command-r": PreTokenizer((_DIGITS, GPT2), is_nfc=True),
        **dict.fromkeys(("olmo", "mpt"), _NEOX),
        "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
        "bloom": PreTokenizer((" ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+",)),
        **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "lfm2"), _LLAMA3),
        **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), PreTokenizer((LLAMA3,))),
        "qwen2": PreTokenizer((QWEN2,), is_nfc=True),
        "qwen35": PreTokenizer((QWEN35,), is_nfc=True),
        "stablelm2": PreTokenizer((QWEN2,)),
        "deepseek-r1-qwen": PreTokenizer((QWEN2,), is_nfc=True, adds_bos=True),
        "deepseek-v3": PreTokenizer(DEEPSEEK_V3, adds_bos=True),
        "hunyuan-dense": PreTokenizer(DEEPSEEK_V3),
        "tekken": PreTokenizer((TEKKEN,), ignore_merges=True, adds_bos=True),
        "gpt-4o": PreTokenizer((GPT4O,)),
        "llama4": PreTokenizer((GPT4O,), adds_bos=True),
    }
)
"""By tokenizer.ggml.pre."""
