"""Makes tokenizer.json and the other text files from the `tokenizer.*` metadata of a GGUF file.

Knows byte-level BPE (`gpt2`), SentencePiece BPE (`llama`), and how text is split before BPE; nothing about tensors. A
GGUF file only names the split. A name that is not in the table is refused, because a wrong split gives wrong tokens.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from export.checkpoint.config_fields import shown
from export.checkpoint.gguf.config import eos_ids
from export.checkpoint.gguf.metadata import AGAIN, GgufMetadata
from export.checkpoint.texts.chat_templates import DEFAULT, TEMPLATE
from export.checkpoint.texts.tokenizer_loading import library_errors
from runtime.errors import InvalidCheckpoint, UnsupportedModel

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_PIECE_LEN = 1024
"""Characters of a SentencePiece token. Training stops at 16; the search for merges takes their square."""

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
    types: Sequence[float]
    scores: Sequence[float]
    merges: Sequence[str]


def text_files(metadata: Mapping[str, Any], where: str) -> dict[str, str]:
    """The text files of a checkpoint from the metadata of a GGUF file.

    Raises UnsupportedModel for a kind of tokenizer or split that is not in the tables, InvalidCheckpoint for
    lists that are missing or do not fit together. `where` names the file in errors.
    """
    m = GgufMetadata(metadata, where)
    vocabulary = _vocabulary(m)
    kind = m.text("tokenizer.ggml.model")
    if kind == "gpt2":
        row = _pre_tokenizer_row(m)
        tokenizer, adds_bos = _byte_level(vocabulary, row, where), row.adds_bos
    elif kind == "llama":
        has_prefix = m.flag("tokenizer.ggml.add_space_prefix", default=True)
        tokenizer, adds_bos = _sentencepiece(vocabulary, m, has_prefix=has_prefix), True
    else:
        raise UnsupportedModel(f"{where}: tokenizer.ggml.model {shown(kind)} is not supported; supported: gpt2, llama")
    adds_bos = m.flag("tokenizer.ggml.add_bos_token", default=adds_bos)
    adds_eos = m.flag("tokenizer.ggml.add_eos_token", default=False)
    named = {
        f"{name}_token": _token_of(m, key, vocabulary.tokens)
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    with library_errors(f"{where}: the tokenizer's special tokens cannot be used", AGAIN):
        _add_whole_tokens(tokenizer, vocabulary)
        _add_template(tokenizer, named["bos_token"] if adds_bos else None, named["eos_token"] if adds_eos else None)
    eos = eos_ids(metadata, where)
    generation = {
        "bos_token_id": m.integer("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "pad_token_id": m.integer("tokenizer.ggml.padding_token_id"),
    }
    settings: dict[str, Any] = {**named, "tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {"clean_up_tokenization_spaces": False, "add_bos_token": adds_bos, "add_eos_token": adds_eos}
    templates = _templates(m)
    if templates.keys() - {DEFAULT}:
        settings["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    files = {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": _to_json(settings),
        "generation_config.json": _to_json(generation),
    }
    return files if templates.keys() != {DEFAULT} else {**files, TEMPLATE: templates[DEFAULT]}


def _templates(m: GgufMetadata) -> dict[str, str]:
    """The chat templates by name; the key of the default one has no name at its end."""
    found = {DEFAULT: m.text("tokenizer.chat_template")}
    found |= {name: m.text(f"tokenizer.chat_template.{name}") for name in m.texts("tokenizer.chat_templates")}
    return {name: text for name, text in found.items() if text}


def _to_json(values: Mapping[str, Any]) -> str:
    present = {key: value for key, value in values.items() if value is not None and value != []}
    return json.dumps(present, indent=2, ensure_ascii=False) + "\n"


def _vocabulary(m: GgufMetadata) -> _Vocabulary:
    tokens = m.texts("tokenizer.ggml.tokens")
    types, scores = m.numbers("tokenizer.ggml.token_type"), m.numbers("tokenizer.ggml.scores")
    if not tokens:
        raise InvalidCheckpoint(f"{m.where} has no tokenizer.ggml.tokens; convert the model with its tokenizer")
    seen: set[str] = set()
    for token in tokens:
        if token in seen:
            raise InvalidCheckpoint(f"{m.where}: token {shown(token)} is in tokenizer.ggml.tokens twice; {AGAIN}")
        seen.add(token)
    for name, values in (("token_type", types), ("scores", scores)):
        if values and len(values) != len(tokens):
            raise InvalidCheckpoint(
                f"{m.where}: tokenizer.ggml.{name} has {len(values)} entries for {len(tokens)} tokens; {AGAIN}"
            )
    return _Vocabulary(tokens, types, scores, m.texts("tokenizer.ggml.merges"))


def _pre_tokenizer_row(m: GgufMetadata) -> PreTokenizer:
    name = m.text("tokenizer.ggml.pre")
    if name is None:
        raise UnsupportedModel(
            f"{m.where} has no tokenizer.ggml.pre, so how it splits text is unknown; convert the model "
            "with a llama.cpp of May 2024 or later"
        )
    if name not in PRE_TOKENIZERS:
        raise UnsupportedModel(
            f"{m.where}: tokenizer.ggml.pre {shown(name)} is not supported; supported: {', '.join(PRE_TOKENIZERS)}"
        )
    return PRE_TOKENIZERS[name]


def _byte_level(vocabulary: _Vocabulary, row: PreTokenizer, where: str) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges = []
    for merge in vocabulary.merges:
        left, space, right = merge.partition(" ")
        if not space:
            raise InvalidCheckpoint(f"{where}: merge {shown(merge)} is not two parts; {AGAIN}")
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


def _sentencepiece(vocabulary: _Vocabulary, m: GgufMetadata, *, has_prefix: bool) -> "Tokenizer":
    """SentencePiece BPE in the form that Hugging Face's Llama 2 and Mistral files have."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    if not vocabulary.scores:
        raise InvalidCheckpoint(f"{m.where} has no tokenizer.ggml.scores; {AGAIN}")
    longest = max(vocabulary.tokens, key=len)
    if len(longest) > MAX_PIECE_LEN:
        raise InvalidCheckpoint(
            f"{m.where}: token {shown(longest)} has {len(longest):,} characters, more than {MAX_PIECE_LEN:,}; {AGAIN}"
        )
    unknown = _token_of(m, "unknown", vocabulary.tokens)
    tokenizer = Tokenizer(
        _bpe(
            models.BPE,
            vocabulary,
            merges_by_score(vocabulary.tokens, vocabulary.scores),
            m.where,
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
        cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [(left, right) for left, right in cuts if left in ids and right in ids]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def _bpe(model: Any, vocabulary: _Vocabulary, merges: list[tuple[str, str]], where: str, **options: Any) -> Any:
    """Build the library's BPE model; a merge of tokens that are not in the vocabulary is its only error."""
    vocab = {token: token_id for token_id, token in enumerate(vocabulary.tokens)}
    with library_errors(f"{where}: the tokenizer's merges do not fit its tokens", AGAIN):
        return model(vocab=vocab, merges=merges, **options)


def _add_whole_tokens(tokenizer: "Tokenizer", vocabulary: _Vocabulary) -> None:
    """All at once: the library builds its matcher again at every call."""
    from tokenizers import AddedToken

    kinds = list(zip(vocabulary.tokens, vocabulary.types, strict=False))
    special = [AddedToken(token, normalized=False, special=True) for token, kind in kinds if kind in _SPECIAL_TYPES]
    plain = [AddedToken(token, normalized=False, special=False) for token, kind in kinds if kind == _USER_DEFINED]
    if special:
        tokenizer.add_special_tokens(special)
    if plain:
        tokenizer.add_tokens(plain)


def _add_template(tokenizer: "Tokenizer", bos: str | None, eos: str | None) -> None:
    """What encoding with special tokens adds at the ends of a text."""
    from tokenizers import processors

    ends = [(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token is not None]
    if ends:
        single = f"{bos + ' ' if bos else ''}$A{' ' + eos if eos else ''}"
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)


def _token_of(m: GgufMetadata, key: str, tokens: Sequence[str]) -> str | None:
    token_id = m.integer(f"tokenizer.ggml.{key}_token_id")
    if token_id is None or (key == "padding" and not 0 <= token_id < len(tokens)):  # -1 and its like: no padding
        return None
    if not 0 <= token_id < len(tokens):
        raise InvalidCheckpoint(
            f"{m.where}: tokenizer.ggml.{key}_token_id is {token_id}, and there are {len(tokens)} tokens"
        )
    return tokens[token_id]
