"""What a request tells the chat template in addition to its messages: variables, and where the prompt ends.

The names are those of transformers, vLLM and llama.cpp. Knows nothing of Jinja, tokens or HTTP.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from runtime.errors import InvalidRequest

OWN_NAMES = frozenset({"messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template"})
"""Variables that have a request field of their own, or that only the server sets."""
MAX_VARIABLES = 64
NO_VARIABLES: Mapping[str, Any] = MappingProxyType({})
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names that templates use for the reasoning of an earlier turn; it is passed under all of them, as in transformers."""
_OPEN_END = "THE_FINAL_MESSAGE_GOES_ON_HERE "
"""Appended to a message that is to be continued, to find that place again. A template that trims removes its space."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """How a conversation becomes a prompt. Raises InvalidRequest for values that exclude each other.

    add_generation_prompt: end with what introduces the assistant's turn
    continue_final_message: end inside the last message, which the answer continues
    enable_thinking, reasoning_effort: variables of the template, None: not set. The effort "none" switches thinking off
        where the template reads `enable_thinking` alone
    variables: further ones, by name
    """

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.add_generation_prompt and self.continue_final_message:
            raise InvalidRequest(
                "add_generation_prompt begins another message and continue_final_message goes on with the last one; "
                "set one of them",
                param="continue_final_message",
            )
        if len(self.variables) > MAX_VARIABLES:
            raise InvalidRequest(
                f"chat_template_kwargs has {len(self.variables)} names; at most {MAX_VARIABLES} are taken",
                param="chat_template_kwargs",
            )
        for name, value in self._named().items():
            if name in self.variables and self.variables[name] != value:
                raise InvalidRequest(
                    f"{name} is {json.dumps(value)}, and chat_template_kwargs.{name} is not; give one of them",
                    param=name,
                )

    def values(self, reads: Collection[str]) -> dict[str, Any]:
        """The variables for a template that reads `reads`."""
        values = {**self.variables, **self._named()}
        if self._stands_for_thinking(reads):
            values.setdefault("enable_thinking", False)
        return values

    def unread(self, reads: Collection[str]) -> list[str]:
        """The fields that have no effect because the template does not read them."""
        fields = [f"chat_template_kwargs.{name}" for name in self.variables if name not in reads]
        fields += [name for name in self._named() if name not in reads]
        if self._stands_for_thinking(reads):
            fields.remove("reasoning_effort")
        return fields

    def _named(self) -> dict[str, Any]:
        values = {"enable_thinking": self.enable_thinking, "reasoning_effort": self.reasoning_effort}
        return {name: value for name, value in values.items() if value is not None}

    def _stands_for_thinking(self, reads: Collection[str]) -> bool:
        """Whether the effort "none" reaches the template as `enable_thinking`."""
        return self.reasoning_effort == "none" and "reasoning_effort" not in reads and "enable_thinking" in reads


DEFAULT_CHAT = ChatOptions()


def with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a message with its reasoning under every name that templates use."""
    reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
    if reasoning is None:
        return dict(message)
    return {**message, **{name: reasoning for name in REASONING if message.get(name) is None}}


def opened(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages with a mark appended to the last one. InvalidRequest if that cannot be continued."""
    last = messages[-1]
    if not isinstance(last.get("content"), str) or last.get("tool_calls"):
        raise InvalidRequest(
            "continue_final_message: the last message has no text, or calls tools, and cannot be continued",
            param="continue_final_message",
        )
    return [*messages[:-1], {**last, "content": last["content"] + _OPEN_END}]


def cut_at_open_end(prompt: str, content: str) -> str:
    """The prompt up to the mark that `opened` appended to the last message's `content`.

    InvalidRequest if the template leaves the message out or changes it. If the template trimmed the space after the
    mark, the spaces at the end of the content are dropped as well, as in transformers.
    """
    place = prompt.rfind(_OPEN_END.strip())
    if place < 0 or content.strip() not in prompt:
        raise InvalidRequest(
            "continue_final_message: the model's chat template does not write the last message as it is",
            param="continue_final_message",
        )
    return prompt[:place] if prompt.startswith(_OPEN_END, place) else prompt[:place].rstrip()
