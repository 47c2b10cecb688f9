"""Checks a checkpoint's text files against its model, and finds the token ids that end a text."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from export.checkpoint.texts.chat_templates import chat_templates, check_template
from export.checkpoint.texts.reading import parse_json_object
from export.checkpoint.texts.special_tokens import FILES, special_token, special_tokens
from export.checkpoint.texts.tokenizer_loading import load_tokenizer
from export.model.description import ModelConfig
from export.model.families.config_values import token_ids
from runtime.errors import InvalidArtifact, InvalidCheckpoint
from runtime.text.tokenizer import TOKENIZER, TOKENIZER_CONFIG

if TYPE_CHECKING:
    from tokenizers import Tokenizer as HfTokenizer

GENERATION = "generation_config.json"


def check_texts(texts: Mapping[str, str], config: ModelConfig) -> tuple[int, ...]:
    """Find the token ids that end a text, from generation_config.json and the tokenizer's `eos_token`, sorted.

    InvalidCheckpoint if a file is not a JSON object, has a field of a wrong type or an id outside the vocabulary, or if
    the server could not load the tokenizer or the chat template.
    """
    objects = {
        name: parse_json_object(text, name)
        for name, text in texts.items()
        if name.endswith(".json") and name != TOKENIZER
    }
    generation = objects.get(GENERATION, {})
    where = f"{GENERATION}: eos_token_id"
    ends = set(token_ids(generation.get("eos_token_id"), where, vocab_size=config.vocab_size))
    special_tokens(objects)  # checks their types
    settings, special = objects.get(TOKENIZER_CONFIG, {}), {}
    if TOKENIZER in texts:
        tokenizer = load_tokenizer(texts[TOKENIZER])
        _check_vocabulary(tokenizer, config)
        special = _loaded_as_served(tokenizer, settings)
        ends |= _eos_of(tokenizer, objects, config)
    for name, source in chat_templates(texts, settings).items():
        check_template(name, source, special)
    return tuple(sorted(ends))


def _eos_of(tokenizer: "HfTokenizer", objects: Mapping[str, Mapping[str, Any]], config: ModelConfig) -> set[int]:
    """The ids of `eos_token`. One that the tokenizer does not know is ignored, because it is never generated."""
    found: set[int] = set()
    for file in FILES:
        text = special_token(objects.get(file, {}), "eos_token", file)
        token_id = None if text is None else tokenizer.token_to_id(text)
        if token_id is not None:
            found.update(token_ids(token_id, f"{file}: eos_token {text!r} with the id", vocab_size=config.vocab_size))
    return found


def _check_vocabulary(tokenizer: "HfTokenizer", config: ModelConfig) -> None:
    """InvalidCheckpoint if an ordinary token has no row in the embedding.

    Added tokens may have none: many fine-tunes have a `[PAD]` after the last row, which no text contains.
    """
    highest = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=-1)
    if highest >= config.vocab_size:
        raise InvalidCheckpoint(
            f"{TOKENIZER} has tokens up to id {highest:,}, and the model's vocabulary ends at "
            f"{config.vocab_size - 1:,}: the tokenizer is another model's"
        )


def _loaded_as_served(tokenizer: "HfTokenizer", config: Mapping[str, Any]) -> dict[str, str]:
    """Load a tokenizer as the server does, to find errors before it runs. Returns its special tokens."""
    from runtime.text.tokenizer import Tokenizer

    try:
        return Tokenizer(tokenizer, config).special_tokens
    except InvalidArtifact as error:
        raise InvalidCheckpoint(str(error)) from error
