"""Makes tokenizer.json and the other text files from the `tokenizer.*` metadata of a GGUF file.

Knows the two kinds of vocabulary these families use, byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`),
and how text is split before BPE; nothing about tensors. A GGUF file names that split instead of spelling it
out: a name that is not in the table is refused, because a wrong split gives wrong tokens without an error.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from export.gguf_config import eos_ids
from runtime.errors import InvalidCheckpoint, UnsupportedModel

if TYPE_CHECKING:
    from tokenizers import Tokenizer

AGAIN = "convert the model again"

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_PUNCTUATION}[\r\n]*|{_SPACES}"
QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_PUNCTUATION}[\r\n]*|{_SPACES}"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}|{_PUNCTUATION}[\r\n/]*|{_SPACES}"
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """One row of the table: how text is split before byte-level BPE.

    splits: regular expressions, each applied to the pieces the one before left; matches become pieces
    is_nfc: the original tokenizer normalizes to NFC first, which GGUF does not record
    ignore_merges: a piece that is a token is taken whole
    adds_bos: whether a text starts with bos where the file does not say
    """

    splits: tuple[str, ...]
    is_nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType(
    {
        "gpt-2": PreTokenizer((GPT2,)),
        "smollm": PreTokenizer((r"\p{N}", GPT2)),
        "starcoder": PreTokenizer((r"\p{N}", GPT2)),
        "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
        "llama-bpe": PreTokenizer((LLAMA3,), ignore_merges=True, adds_bos=True),
        "llama3": PreTokenizer((LLAMA3,), ignore_merges=True, adds_bos=True),
        "llama-v3": PreTokenizer((LLAMA3,), ignore_merges=True, adds_bos=True),
        "qwen2": PreTokenizer((QWEN2,), is_nfc=True),
        "deepseek-r1-qwen": PreTokenizer((QWEN2,), is_nfc=True, adds_bos=True),
        "tekken": PreTokenizer((TEKKEN,), ignore_merges=True, adds_bos=True),
    }
)
"""By tokenizer.ggml.pre. The expressions are those of the models' own tokenizer.json files."""

_SPECIAL_TYPES = (2, 3)
"""gguf.TokenType UNKNOWN and CONTROL: matched whole in text, left out of decoded text."""
_USER_DEFINED = 4
"""Matched whole in text, and part of decoded text (`<think>`)."""


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """The lists of the file, checked: ids are positions; `types` and `scores` may be empty."""

    tokens: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[str]


def text_files(metadata: Mapping[str, Any], where: str) -> dict[str, str]:
    """The text files of a checkpoint from the metadata of a GGUF file.

    Raises UnsupportedModel for a kind of tokenizer or split that is not in the tables, InvalidCheckpoint for
    lists that are missing or do not fit together. `where` names the file in errors.
    """
    vocabulary = _vocabulary(metadata, where)
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        row = _pre_tokenizer_row(metadata, where)
        tokenizer, adds_bos = _byte_level(vocabulary, row, where), row.adds_bos
    elif kind == "llama":
        has_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        tokenizer, adds_bos = _sentencepiece(vocabulary, metadata, where, has_prefix=has_prefix), True
    else:
        raise UnsupportedModel(f"{where}: tokenizer.ggml.model {kind!r} is not supported; supported: gpt2, llama")
    _add_whole_tokens(tokenizer, vocabulary)
    adds_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", adds_bos))
    adds_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    named = {
        f"{name}_token": _token_of(metadata, key, vocabulary.tokens, where)
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    _add_template(tokenizer, named["bos_token"] if adds_bos else None, named["eos_token"] if adds_eos else None)
    eos = eos_ids(metadata)
    generation = {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    settings = named | {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {"add_bos_token": adds_bos, "add_eos_token": adds_eos}
    files = {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": _to_json(settings),
        "generation_config.json": _to_json(generation),
    }
    if metadata.get("tokenizer.chat_template"):
        files["chat_template.jinja"] = metadata["tokenizer.chat_template"]
    return files


def _to_json(values: Mapping[str, Any]) -> str:
    present = {key: value for key, value in values.items() if value is not None and value != []}
    return json.dumps(present, indent=2, ensure_ascii=False) + "\n"


def _vocabulary(metadata: Mapping[str, Any], where: str) -> _Vocabulary:
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    types = metadata.get("tokenizer.ggml.token_type") or []
    scores = metadata.get("tokenizer.ggml.scores") or []
    if not tokens:
        raise InvalidCheckpoint(f"{where} has no tokenizer.ggml.tokens; convert the model with its tokenizer")
    if len(set(tokens)) != len(tokens):
        twice = next(token for position, token in enumerate(tokens) if tokens.index(token) != position)
        raise InvalidCheckpoint(f"{where}: token {twice!r} is in tokenizer.ggml.tokens twice; convert the model again")
    for name, values in (("token_type", types), ("scores", scores)):
        if values and len(values) != len(tokens):
            raise InvalidCheckpoint(
                f"{where}: tokenizer.ggml.{name} has {len(values)} entries for {len(tokens)} tokens; {AGAIN}"
            )
    return _Vocabulary(tokens, types, scores, metadata.get("tokenizer.ggml.merges") or [])


def _pre_tokenizer_row(metadata: Mapping[str, Any], where: str) -> PreTokenizer:
    name = metadata.get("tokenizer.ggml.pre")
    if name is None:
        raise UnsupportedModel(
            f"{where} has no tokenizer.ggml.pre, so how it splits text is unknown; convert the model "
            "with a llama.cpp of May 2024 or later"
        )
    if name not in PRE_TOKENIZERS:
        raise UnsupportedModel(
            f"{where}: tokenizer.ggml.pre {name!r} is not supported; supported: {', '.join(PRE_TOKENIZERS)}"
        )
    return PRE_TOKENIZERS[name]


def _byte_level(vocabulary: _Vocabulary, row: PreTokenizer, where: str) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges = []
    for merge in vocabulary.merges:
        left, space, right = merge.partition(" ")
        if not space:
            raise InvalidCheckpoint(f"{where}: merge {merge!r} is not two parts; {AGAIN}")
        merges.append((left, right))
    tokenizer = Tokenizer(_bpe(models.BPE, vocabulary, merges, where, ignore_merges=row.ignore_merges))
    if row.is_nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(split), behavior="isolated") for split in row.splits
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(
    vocabulary: _Vocabulary, metadata: Mapping[str, Any], where: str, *, has_prefix: bool
) -> "Tokenizer":
    """SentencePiece BPE in the form that Hugging Face's Llama 2 and Mistral files have."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    if not vocabulary.scores:
        raise InvalidCheckpoint(f"{where} has no tokenizer.ggml.scores; {AGAIN}")
    unknown = _token_of(metadata, "unknown", vocabulary.tokens, where)
    tokenizer = Tokenizer(
        _bpe(
            models.BPE,
            vocabulary,
            merges_by_score(vocabulary.tokens, vocabulary.scores),
            where,
            unk_token=unknown,
            fuse_unk=unknown is not None,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if has_prefix else spaces
    steps: list[decoders.Decoder] = [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if has_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def merges_by_score(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The BPE merges that a SentencePiece vocabulary implies, best first.

    SentencePiece joins the two neighbours whose union has the highest score; so each way to cut a token into
    two tokens is a merge, ranked by the token's score (of equal scores, the token listed first).
    """
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    ranked = sorted(range(len(tokens)), key=lambda token_id: (-scores[token_id], token_id))
    merges = []
    for token_id in ranked:
        token = tokens[token_id]
        cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(left, right) for left, right in cuts if left in ids and right in ids]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def _bpe(model: Any, vocabulary: _Vocabulary, merges: list[tuple[str, str]], where: str, **options: Any) -> Any:
    """Build the library's BPE model; a merge of tokens that are not in the vocabulary is its only error."""
    vocab = {token: token_id for token_id, token in enumerate(vocabulary.tokens)}
    try:
        return model(vocab=vocab, merges=merges, **options)
    except Exception as error:  # the library raises bare Exception
        raise InvalidCheckpoint(f"{where}: the tokenizer's merges do not fit its tokens ({error})") from error


def _add_whole_tokens(tokenizer: "Tokenizer", vocabulary: _Vocabulary) -> None:
    from tokenizers import AddedToken

    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=False):
        if kind in _SPECIAL_TYPES:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])


def _add_template(tokenizer: "Tokenizer", bos: str | None, eos: str | None) -> None:
    """What encoding with special tokens adds at the ends of a text."""
    from tokenizers import processors

    ends = [(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token is not None]
    if ends:
        single = f"{bos + ' ' if bos else ''}$A{' ' + eos if eos else ''}"
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)


def _token_of(metadata: Mapping[str, Any], key: str, tokens: Sequence[str], where: str) -> str | None:
    token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
    if token_id is None:
        return None
    if not 0 <= token_id < len(tokens):
        raise InvalidCheckpoint(
            f"{where}: tokenizer.ggml.{key}_token_id is {token_id}, and there are {len(tokens)} tokens"
        )
    return str(tokens[token_id])
