"""Makes tokenizer.json and the other text files from the `tokenizer.*` metadata of a GGUF file.

Knows byte-level BPE (`gpt2`), SentencePiece BPE (`llama`) and Unigram (`t5`); nothing about tensors. A GGUF file only
names how text is split before byte-level BPE. A name that is not in the table of pre_tokenizers.py is refused, because
a wrong split gives wrong tokens.

A string may be there twice. The last of its ids is the one that text is encoded to, as in llama.cpp; the others are
only decoded (`SAME_TEXT` of tokenizer_config.json).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from export.checkpoint.config_fields import shown
from export.checkpoint.gguf.config import eos_ids
from export.checkpoint.gguf.metadata import AGAIN, GgufMetadata
from export.checkpoint.gguf.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from export.checkpoint.texts.chat_templates import DEFAULT, TEMPLATE
from export.checkpoint.texts.tokenizer_loading import library_errors
from runtime.errors import InvalidCheckpoint, UnsupportedModel
from runtime.text.tokenizer import SAME_TEXT

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_PIECE_LEN = 1024
"""Characters of a SentencePiece token. Training stops at 16; the search for merges takes their square."""

_SPECIAL_TYPES = (2, 3)
"""gguf.TokenType UNKNOWN and CONTROL: matched whole in text, left out of decoded text."""
_BYTE = 6
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
    elif kind == "t5":
        tokenizer, adds_bos = _unigram(vocabulary, m), False
    else:
        raise UnsupportedModel(
            f"{where}: tokenizer.ggml.model {shown(kind)} is not supported; supported: gpt2, llama, t5"
        )
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
    if same := _same_text(vocabulary.tokens):
        settings[SAME_TEXT] = same
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
    for name, values in (("token_type", types), ("scores", scores)):
        if values and len(values) != len(tokens):
            raise InvalidCheckpoint(
                f"{m.where}: tokenizer.ggml.{name} has {len(values)} entries for {len(tokens)} tokens; {AGAIN}"
            )
    return _Vocabulary(tokens, types, scores, m.texts("tokenizer.ggml.merges"))


def _same_text(tokens: Sequence[str]) -> dict[str, int]:
    """The id that stands for a string's others, by each of those; JSON has keys of text."""
    last = {token: token_id for token_id, token in enumerate(tokens)}
    return {str(token_id): last[token] for token_id, token in enumerate(tokens) if last[token] != token_id}


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


def _unigram(vocabulary: _Vocabulary, m: GgufMetadata) -> "Tokenizer":
    """SentencePiece Unigram in the form that transformers gives it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if not vocabulary.scores:
        raise InvalidCheckpoint(f"{m.where} has no tokenizer.ggml.scores; {AGAIN}")
    if len(set(vocabulary.tokens)) != len(vocabulary.tokens):
        raise UnsupportedModel(f"{m.where}: a Unigram vocabulary with a string twice is not supported")
    unknown = m.integer("tokenizer.ggml.unknown_token_id")
    pairs = list(zip(vocabulary.tokens, map(float, vocabulary.scores), strict=True))
    has_bytes = _BYTE in vocabulary.types
    with library_errors(f"{m.where}: the tokenizer's scores cannot be used", AGAIN):
        tokenizer = Tokenizer(models.Unigram(pairs, unk_id=unknown, byte_fallback=has_bytes))
        steps: list[normalizers.Normalizer] = []
        if chart := m.numbers("tokenizer.ggml.precompiled_charsmap"):
            steps.append(normalizers.Precompiled(bytes(int(value) & 255 for value in chart)))
    if m.flag("tokenizer.ggml.remove_extra_whitespaces", default=False):
        steps += [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "\u2581")]
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    prefix = "always" if m.flag("tokenizer.ggml.add_space_prefix", default=True) else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix)
    spaces = decoders.Metaspace(prepend_scheme=prefix)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), spaces]) if has_bytes else spaces
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
