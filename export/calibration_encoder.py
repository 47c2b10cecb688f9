"""Records to token ids as the model itself would read them: its own chat template and its own tokenizer.

A record is `{"messages": [{"role", "content"}...]}` or `{"text": ...}`. Knows nothing about files or samples.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from runtime.chat_template import TEMPLATE_FILE, ChatTemplate
from runtime.errors import InvalidCheckpoint, InvalidRequest
from runtime.tokenizer import TOKENIZER, TOKENIZER_CONFIG, Tokenizer

Messages = Sequence[Mapping[str, Any]]


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
        config = json.loads(texts.get(TOKENIZER_CONFIG) or "{}")
        self.tokenizer = Tokenizer(library, config)
        source = texts.get(TEMPLATE_FILE)
        self._template = None if source is None else ChatTemplate(source, self.tokenizer.special_tokens)
        self.hashes = {
            "tokenizer_sha256": hashlib.sha256(texts[TOKENIZER].encode()).hexdigest(),
            "chat_template_sha256": None if source is None else hashlib.sha256(source.encode()).hexdigest(),
        }

    def encode(self, record: Mapping[str, Any]) -> list[int]:
        """Token ids of one record. InvalidRequest if the template takes its messages in no form."""
        if "messages" not in record:
            return self.tokenizer.encode(record["text"])
        if self._template is None:
            return self.tokenizer.encode("\n\n".join(str(message["content"]) for message in record["messages"]))
        return self.tokenizer.encode(self._render(record["messages"]), add_special_tokens=False)

    def chat_start(self, question: str | None = None) -> list[int]:
        """The tokens a conversation begins with; after `question`, up to where the assistant is to speak.

        Without a template: what the tokenizer puts before a text, which can be nothing.
        """
        if self._template is None or question is None:
            return self.tokenizer.encode("")
        messages = [{"role": "user", "content": question}]
        return self.tokenizer.encode(self._template.render(messages), add_special_tokens=False)

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
