"""Turns calibration records into token ids, with the model's own chat template and tokenizer.

Knows nothing about files or samples.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from export.calibration.records import FLAG, Record
from export.checkpoint.texts.chat_templates import DEFAULT, chat_templates
from runtime.errors import InvalidCheckpoint, InvalidRequest, InvalidSetting
from runtime.text.chat.template import ChatTemplate
from runtime.text.tokenizer import TOKENIZER, TOKENIZER_CONFIG, Tokenizer

Messages = Sequence[Mapping[str, Any]]

# Takes the place of a message's text, to find what the template puts before it. No template changes it.
_MARK = "headrace0calibration"


class RecordEncoder:
    """Encodes records for one checkpoint. `texts` is what `Checkpoint.text_files()` gives."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        """Raises InvalidCheckpoint if there is no tokenizer or it cannot be loaded."""
        from tokenizers import Tokenizer as HfTokenizer

        if TOKENIZER not in texts:
            raise InvalidCheckpoint(f"the checkpoint has no {TOKENIZER}: calibration text cannot become tokens; add it")
        try:
            library = HfTokenizer.from_str(texts[TOKENIZER])
        except Exception as error:  # the library raises plain Exception
            raise InvalidCheckpoint(f"{TOKENIZER} of the checkpoint cannot be loaded: {error}") from error
        self.tokenizer = Tokenizer(library, _parsed_config(texts.get(TOKENIZER_CONFIG) or "{}"))
        source = chat_templates(texts, self.tokenizer.config).get(DEFAULT)
        self._template = None if source is None else ChatTemplate(source, self.tokenizer.special_tokens)
        self.hashes = {
            "tokenizer_sha256": hashlib.sha256(texts[TOKENIZER].encode()).hexdigest(),
            "chat_template_sha256": None if source is None else hashlib.sha256(source.encode()).hexdigest(),
        }

    def encode(self, record: Record) -> list[int]:
        """Token ids of one record. InvalidSetting, with its place, if the model's template does not take it."""
        value = record.value
        if "messages" not in value:
            return self.tokenizer.encode(value["text"])
        if self._template is None:
            return self.tokenizer.encode("\n\n".join(str(message["content"]) for message in value["messages"]))
        try:
            text = self._render(value["messages"])
        except InvalidRequest as error:
            raise InvalidSetting(f"{FLAG} {record.where}: {error}; fix or remove the record") from error
        return self.tokenizer.encode(text, add_special_tokens=False)

    def starts(self, max_len: int) -> list[list[int]]:
        """Beginnings of text to sample: an opened conversation, if there is a template, and a plain text.

        The conversation ends before the user's first words, so that the model writes both sides. A text
        begins with the beginning-of-text token, or after an end-of-text token, or with a line end if there is neither.
        """
        opened = [] if self._template is None else [self._opened_conversation()]
        special = self.tokenizer.special_tokens
        begin = special.get("bos_token") or special.get("eos_token") or "\n"
        text = self.tokenizer.encode("") or self.tokenizer.encode(begin, add_special_tokens=False)
        return [start for start in (*opened, text) if 0 < len(start) <= max_len]

    def _opened_conversation(self) -> list[int]:
        assert self._template is not None
        before, mark, _ = self._template.render([{"role": "user", "content": _MARK}]).partition(_MARK)
        return self.tokenizer.encode(before, add_special_tokens=False) if mark else []

    def _render(self, messages: Messages) -> str:
        """Some templates refuse a system role; it then opens the first user message, as their authors advise."""
        assert self._template is not None
        try:
            return self._template.render(messages, add_generation_prompt=False)
        except InvalidRequest:
            if messages[0].get("role") != "system" or len(messages) < 2:
                raise
        system, first, *rest = messages
        merged = {**first, "content": f"{system['content']}\n\n{first['content']}"}
        return self._template.render([merged, *rest], add_generation_prompt=False)


def _parsed_config(text: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError as error:
        raise InvalidCheckpoint(f"{TOKENIZER_CONFIG} of the checkpoint is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InvalidCheckpoint(f"{TOKENIZER_CONFIG} of the checkpoint is not a JSON object")
    return config
