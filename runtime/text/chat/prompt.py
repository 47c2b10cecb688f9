"""Encodes a conversation with chat template and tokenizer. Only the template can write control tokens.

An ordinary conversation is rendered and encoded as in transformers. If a message contains a character that marks a
control token, it is rendered a second time, masked (runtime/text/control_tokens.py). If the two renderings differ in
their control tokens, it is encoded in the secret spelling. Knows nothing of engines or HTTP.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from runtime.errors import InvalidRequest
from runtime.text.bounded_encoding import num_bytes_of
from runtime.text.chat.options import ChatOptions
from runtime.text.chat.template import ChatTemplate
from runtime.text.control_tokens import ControlTokens
from runtime.text.secret_spelling import SecretSpelling
from runtime.text.tokenizer import Tokenizer
from runtime.text.tools.formats import Tool, ToolFormat, plain_messages

_PLAIN = (
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
)


class ChatPrompts:
    """Encodes the conversations of one model. Safe to use from many threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        tool_format: ToolFormat,
        *,
        trust_special_tokens: bool = False,
    ) -> None:
        """`trust_special_tokens`: control tokens count wherever they are written, in messages too."""
        self._tokenizer = tokenizer
        self._template = template
        self._tool_format = tool_format
        self._control = None if trust_special_tokens else _control_tokens(tokenizer, template)
        self._lock = threading.Lock()
        self._secret: SecretSpelling | None = None

    def prepare(self) -> None:
        """Make the second tokenizer now instead of at the first message with a control token."""
        if self._control is not None:
            self._spelled(self._control)

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Tool],
        options: ChatOptions,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Token ids of a conversation. Raises InvalidRequest as the template does, PromptTooLong for one that certainly
        has more than `max_tokens`, Overloaded if too much text is being tokenized.

        Tools, calls and results go through the template if it reads `tools`, else into plain messages.
        """
        template = self._template.with_tools if tools or _has_calls(messages) else self._template
        if not template.knows_tools:
            messages, tools = plain_messages(messages, tools, self._tool_format), ()
        values: dict[str, Any] = {
            "messages": template.adapted(messages),
            "tools": [tool.as_json() for tool in tools],
            "variables": options.values(template.reads),
        }

        def render(values: Mapping[str, Any]) -> str:
            return template.render(
                **values,
                add_generation_prompt=options.add_generation_prompt,
                continue_final_message=options.continue_final_message,
            )

        text = render(values)
        control = self._control
        if control is None:
            return self._tokenizer.encode(text, add_special_tokens=False, max_tokens=max_tokens)
        num_bytes_of(text)  # refuses surrogates of the client's own: below, surrogates are masks
        masked = control.masked(values)
        prompt = text if masked == values else _trusted(text, values, masked, control, render)
        if control.places(prompt) == control.places(text):
            ids = self._tokenizer.encode(text, add_special_tokens=False, max_tokens=max_tokens)
            # A normalizer may turn other characters into such a token.
            if control.num_ids(ids) <= len(control.places(prompt)):
                return ids
        secret = self._spelled(control)
        return secret.encode(control.unmasked(control.spelled(prompt, secret.spelling)), max_tokens=max_tokens)

    def _spelled(self, control: ControlTokens) -> SecretSpelling:
        with self._lock:
            if self._secret is None:
                self._secret = self._tokenizer.spelled_secretly(control.ids)
            return self._secret


def _control_tokens(tokenizer: Tokenizer, template: ChatTemplate) -> ControlTokens:
    sources = {template.source, template.with_tools.source}
    try:
        plain = template.render(_PLAIN, add_generation_prompt=False)
    except InvalidRequest:
        plain = ""
    return ControlTokens(
        tokenizer.added_tokens, template="\n".join(sources), plain=plain, named=frozenset(tokenizer.named_tokens)
    )


def _trusted(
    text: str, values: Any, masked: Any, control: ControlTokens, render: Callable[[Mapping[str, Any]], str]
) -> str:
    """The prompt whose control tokens are the template's own; `text` itself if it contains no others."""
    try:
        prompt = render(masked)
    except InvalidRequest as error:
        if _holds_tokens(values, masked, control):
            raise InvalidRequest(
                "the messages contain the text of a control token, and the model's chat template does not take that as "
                "plain text",
                param="messages",
            ) from error
        return text
    # A template that reads these characters renders something else; an ordinary conversation must keep its prompt.
    is_same = control.unmasked(prompt) == text
    return prompt if is_same or _holds_tokens(values, masked, control) else text


def _has_calls(messages: Sequence[Mapping[str, Any]]) -> bool:
    return any(message.get("tool_calls") or message["role"] == "tool" for message in messages)


def _holds_tokens(value: Any, masked: Any, control: ControlTokens) -> bool:
    """Whether a string of the conversation contains a token that masking hides."""
    if isinstance(value, str):
        return value != masked and control.places(value) != control.places(masked)
    if isinstance(value, Mapping):
        return any(
            _holds_tokens(key, hidden_key, control) or _holds_tokens(item, hidden, control)
            for (key, item), (hidden_key, hidden) in zip(value.items(), masked.items(), strict=True)
        )
    if isinstance(value, list | tuple):
        return any(_holds_tokens(item, hidden, control) for item, hidden in zip(value, masked, strict=True))
    return False
