"""Encodes text to token ids and back with the `tokenizers` library. Knows nothing about requests or models.

The library encodes. It decodes only whole lists, and writes U+FFFD for a part of a character, so we decode single
tokens ourselves, as bytes. Two kinds of decoder cover the causal LMs of today:

    byte-level BPE (GPT-2, Llama 3, Qwen)     every character of a token stands for one byte
    SentencePiece  (Llama 2, Mistral, Gemma)  U+2581 stands for a space, <0xE2> for a byte that has no token

An artifact with another decoder is refused.
"""

import codecs
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from runtime.artifact.json_shape import read_json
from runtime.artifact.manifest import Artifact
from runtime.errors import InvalidArtifact
from runtime.text.bounded_encoding import BoundedEncoder
from runtime.text.control_tokens import AddedToken
from runtime.text.secret_spelling import SecretSpelling

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HfTokenizer

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
SPECIAL_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

SAME_TEXT = "headrace_same_text"
"""In tokenizer_config.json: ids of tokens whose text another token has too, with the id of that one. tokenizer.json can
hold only one of them."""

_TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens")
_BYTE_TOKEN_LEN = len("<0xE2>")


class Tokenizer:
    """A loaded tokenizer. Safe to use from many threads.

    `config` is tokenizer_config.json as parsed, `special_tokens` its bos_token, eos_token... as text.
    """

    def __init__(self, tokenizer: "HfTokenizer", config: Mapping[str, Any], *, where: str = TOKENIZER) -> None:
        self.config = config
        self.special_tokens = _special_tokens(config)
        self._hf = tokenizer
        self._hf.no_truncation()
        self._hf.no_padding()
        self._encoder = BoundedEncoder(tokenizer)
        parts = msgspec.json.decode(tokenizer.to_str())
        self._decode_steps = _flatten_decoder(parts.get("decoder"), where)
        self._is_byte_level = any(step["type"] == "ByteLevel" for step in self._decode_steps)
        self._literal_ids = _literal_ids(tokenizer, parts["model"]) if self._is_byte_level else frozenset()
        added = tokenizer.get_added_tokens_decoder().items()
        self._special_ids = frozenset(i for i, token in added if token.special)
        self.special_id_of: Mapping[str, int] = {token.content: i for i, token in added if token.special}
        """The ids of control tokens, by the text that names them."""
        self._same_text = _same_text(config, where)
        self._bytes: dict[int, bytes] = {}
        self._added_bos_id = self._bos_to_add()

    @classmethod
    def from_artifact(cls, artifact: Artifact) -> "Tokenizer":
        """Load the artifact's tokenizer.json and, if it has them, special_tokens_map.json and tokenizer_config.json.
        Raises InvalidArtifact."""
        file = artifact.listed(TOKENIZER)
        if file is None:
            raise InvalidArtifact(
                f"{artifact.path} has no {TOKENIZER}, so it takes no text; export a checkpoint that has one"
            )
        return cls.from_files(file, artifact.listed(SPECIAL_TOKENS_MAP), artifact.listed(TOKENIZER_CONFIG))

    @classmethod
    def from_files(cls, file: Path, *config_files: Path | None) -> "Tokenizer":
        """Load a tokenizer.json and the given files of special_tokens_map.json and tokenizer_config.json; the last one
        wins, as in transformers. Raises InvalidArtifact."""
        from tokenizers import Tokenizer as HfTokenizer

        try:
            tokenizer = HfTokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise InvalidArtifact(f"{file} cannot be loaded: {error}; export the model again") from error
        config: dict[str, Any] = {}
        for config_file in filter(None, config_files):
            config |= _read_config(config_file)
        return cls(tokenizer, config, where=str(file))

    @property
    def vocab_size(self) -> int:
        """One more than the highest id that the tokenizer knows; a model's vocabulary may be padded beyond it."""
        return max([*self._hf.get_vocab(with_added_tokens=True).values(), *self._same_text], default=-1) + 1

    def encode(self, text: str, *, add_special_tokens: bool = True, max_tokens: int | None = None) -> list[int]:
        """Token ids of a text.

        `add_special_tokens` adds the tokens of tokenizer.json's post-processor, and the beginning-of-text token where
        tokenizer_config.json says `add_bos_token`. Pass False for a rendered chat template, which has its own.
        `max_tokens` bounds the work, as runtime/text/bounded_encoding.py says. Raises PromptTooLong if the text
        certainly has more tokens, InvalidRequest if it is not valid Unicode, Overloaded if too much text is being
        tokenized.
        """
        ids = self._encoder.encode(text, add_special_tokens=add_special_tokens, max_tokens=max_tokens)
        bos_id = self._added_bos_id
        if add_special_tokens and bos_id is not None and ids[:1] != [bos_id]:
            ids.insert(0, bos_id)
        return ids

    @property
    def added_tokens(self) -> list[AddedToken]:
        """The tokens that are found anywhere in a text, before it is split into words."""
        decoder = self._hf.get_added_tokens_decoder()
        return [
            AddedToken(token_id, token.content, token.special)
            for token_id, token in decoder.items()
            if not token.single_word
        ]

    @property
    def named_tokens(self) -> frozenset[str]:
        """Texts of the special tokens that tokenizer_config.json names."""
        listed: list[Any] = []
        for name in _TOKEN_LISTS:
            value = self.config.get(name)
            listed += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return frozenset({*self.special_tokens.values(), *filter(None, map(_token_text, listed))})

    def spelled_secretly(self, ids: Mapping[str, int]) -> SecretSpelling:
        """A second tokenizer with secret spellings for the tokens `ids` (by their text)."""
        return SecretSpelling(self._hf, ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a whole list of ids, special tokens left out.

        As `tokenizers` decodes it, but for two things that a stream cannot have, or should not: in a run of byte tokens
        that is not UTF-8, only what is wrong becomes U+FFFD; and an added token is its own text (`_literal_ids`).
        """
        detokenizer = self.detokenizer()
        return "".join(map(detokenizer.push, ids)) + detokenizer.finish()

    def is_special(self, token_id: int) -> bool:
        """Whether a token is a control token, which adds no text."""
        return token_id in self._special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to the text, perhaps half a character; empty for a special or unknown token."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._compute_bytes(token_id)
        return found

    def token_text(self, token_id: int) -> str:
        """A token for people: a special token by its name, bytes that are no whole character as U+FFFD."""
        if token_id in self._special_ids:
            return str(self._hf.id_to_token(token_id))
        return self.token_bytes(token_id).decode(errors="replace")

    def shown_bytes(self, token_id: int) -> bytes:
        """As `token_bytes`, but a special token gives its name."""
        return self.token_bytes(token_id) or self.token_text(token_id).encode()

    def detokenizer(self, prompt_ids: Sequence[int] = (), *, skips_special: bool = True) -> "Detokenizer":
        """A decoder for the tokens that follow a prompt; it writes special tokens by their names unless it skips them.

        SentencePiece models write a space before the first word. It is dropped where a text begins: after no
        prompt, or one that ends in a special token, as a chat turn does.
        """
        is_beginning = not prompt_ids or self.is_special(prompt_ids[-1])
        token_bytes = self.token_bytes if skips_special else self.shown_bytes
        strips = is_beginning and any(
            step["type"] == "Strip" and step.get("start", 0) > 0 for step in self._decode_steps
        )
        first_bytes = self._first_bytes if is_beginning and self._metaspace is not None else None
        return Detokenizer(token_bytes, strip_first=strips, first_bytes=first_bytes)

    @property
    def _metaspace(self) -> str | None:
        """The character that a Metaspace decoder drops wherever it is in the first token."""
        for step in self._decode_steps:
            if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never":
                return str(step.get("replacement", "\u2581"))
        return None

    def _first_bytes(self, token_id: int) -> bytes:
        """The bytes of the first token of a text where a Metaspace decoder is."""
        assert self._metaspace is not None
        return str(self._hf.id_to_token(token_id) or "").replace(self._metaspace, "").encode()

    def _compute_bytes(self, token_id: int) -> bytes:
        token_id = self._same_text.get(token_id, token_id)
        token = None if token_id in self._special_ids else self._hf.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            if token_id in self._literal_ids:
                return str(token).encode()
            try:
                return str(token).translate(_BYTE_CHARS).encode("latin-1")
            except UnicodeEncodeError:  # an added token, written as it is
                return str(token).encode()
        for step in self._decode_steps:
            if step["type"] == "Replace":
                token = token.replace(step["pattern"]["String"], step["content"])
            elif step["type"] == "Metaspace":
                token = token.replace(step.get("replacement", "\u2581"), " ")
            elif step["type"] == "ByteFallback" and (byte := _byte_token(token)) is not None:
                return byte
        return str(token).encode()

    def _bos_to_add(self) -> int | None:
        """The beginning-of-text token, if the configuration says `add_bos_token: true`."""
        bos_token = self.special_tokens.get("bos_token")
        if self.config.get("add_bos_token") is not True or bos_token is None:
            return None
        bos_id: int | None = self._hf.token_to_id(bos_token)
        return bos_id


class Detokenizer:
    """Decodes a stream of tokens; never emits a part of a character.

    Bytes that can no longer become a character come out as U+FFFD, one for each maximal invalid part (Unicode
    16, section 3.9), as the decoder of byte-level tokenizers does. Time and memory are constant per token.
    """

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        *,
        strip_first: bool = False,
        first_bytes: Callable[[int], bytes] | None = None,
    ) -> None:
        """token_bytes: gives the bytes that a token adds to the text
        strip_first: whether a space at the beginning is dropped
        first_bytes: takes the place of token_bytes for the first token that adds something
        """
        self._token_bytes = token_bytes
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._strip_first, self._first_bytes = strip_first, first_bytes

    def push(self, token_id: int) -> str:
        """Add a token; return the characters that are now whole."""
        added = self._token_bytes(token_id)
        if self._first_bytes is not None and added:
            added, self._first_bytes = self._first_bytes(token_id), None
        return self._stripped(self._decode(added))

    def finish(self) -> str:
        """The rest of an unfinished character: U+FFFD or nothing."""
        return self._stripped(self._decode(b"", True))

    def _stripped(self, text: str) -> str:
        if self._strip_first and text:
            self._strip_first = False
            return text.removeprefix(" ")
        return text


def _read_config(file: Path) -> dict[str, Any]:
    """A JSON object."""
    config = read_json(file)
    if not isinstance(config, dict):
        raise InvalidArtifact(f"{file} is not a JSON object; export the model again")
    return config


def _same_text(config: Mapping[str, Any], where: str) -> dict[int, int]:
    found = config.get(SAME_TEXT, {})
    if not isinstance(found, dict) or not all(key.isdigit() and isinstance(i, int) for key, i in found.items()):
        raise InvalidArtifact(f"{where}: {SAME_TEXT} beside it must map ids to ids; export the model again")
    return {int(key): token_id for key, token_id in found.items()}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens as text. Each is written as a string or as an object with `content`."""
    found = {}
    for name in SPECIAL_TOKEN_NAMES:
        if (text := _token_text(config.get(name))) is not None:
            found[name] = text
    return found


def _token_text(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _flatten_decoder(decoder: Any, where: str) -> list[dict[str, Any]]:
    """The steps of tokenizer.json's decoder. InvalidArtifact for one that does not go token by token."""
    steps = decoder["decoders"] if decoder and decoder["type"] == "Sequence" else [decoder]
    for step in steps:
        kind = step["type"] if step else "none"
        is_known = kind in ("ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Strip") or (
            kind == "Replace" and "String" in step["pattern"]
        )
        if not is_known:
            raise InvalidArtifact(
                f"{where} has the decoder {kind!r}; only byte-level BPE and SentencePiece can be streamed"
            )
    return list(steps)


def _literal_ids(tokenizer: "HfTokenizer", model: Mapping[str, Any]) -> frozenset[int]:
    """Added tokens that stand for their own text although each of their characters also stands for a byte.

    An added token is found in a text by its own characters, so `\u00d6` in it is that letter and not the byte 0xD6, as
    the library's decoder takes it. Only a token that merges of bytes also lead to is left to the alphabet.
    """
    added = tokenizer.get_added_tokens_decoder().items()
    ids = {token.content: token_id for token_id, token in added if not token.content.isascii()}
    if not ids:
        return frozenset()
    merges = model.get("merges") or ()
    merged = {merge.replace(" ", "") if isinstance(merge, str) else "".join(merge) for merge in merges}
    own = tokenizer.get_vocab(with_added_tokens=False)
    return frozenset(i for text, i in ids.items() if text not in own or (text not in merged and len(text) > 1))


def _byte_level_alphabet() -> dict[int, int]:
    """GPT-2's table, for `str.translate`: printable bytes stand for themselves, the rest for characters from U+0100 on.
    Each becomes the character of its byte; those that stand for no byte become U+FFFD, which Latin-1 lacks."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return dict.fromkeys(others, 0xFFFD) | {0x100 + i: byte for i, byte in enumerate(others)}


_BYTE_CHARS = _byte_level_alphabet()


def _byte_token(token: str) -> bytes | None:
    if len(token) != _BYTE_TOKEN_LEN or not token.startswith("<0x") or not token.endswith(">"):
        return None
    try:
        return bytes([int(token[3:5], 16)])
    except ValueError:
        return None
