"""The chat templates of a checkpoint, by name: `default`, and for some models `tool_use` and others.

One template is a file, chat_template.jinja; several are `chat_template` of tokenizer_config.json, a list of named ones.
"""

from collections.abc import Mapping
from typing import Any

from runtime.errors import InvalidArtifact, InvalidCheckpoint
from runtime.text.chat.template import TEMPLATE_FILE, ChatTemplate
from runtime.text.chat.trespass import refuse_trespass

TEMPLATE = TEMPLATE_FILE
DEFAULT = "default"


def chat_templates(texts: Mapping[str, str], tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The templates in the text files; empty if there are none. InvalidCheckpoint for one of another shape."""
    return {DEFAULT: texts[TEMPLATE]} if TEMPLATE in texts else embedded_templates(tokenizer_config)


def embedded_templates(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Templates inside tokenizer_config.json: a string, or a list (or object) of named ones."""
    value = tokenizer_config.get("chat_template")
    if value is None:
        return {}
    pairs: list[tuple[Any, Any]]
    if isinstance(value, list):
        pairs = [(item.get("name"), item.get("template")) if isinstance(item, dict) else (None, None) for item in value]
    else:
        pairs = list(value.items()) if isinstance(value, dict) else [(DEFAULT, value)]
    if not all(isinstance(part, str) for pair in pairs for part in pair):
        raise InvalidCheckpoint(
            "tokenizer_config.json: chat_template must be a template, or a list of objects with name and template, got "
            f"{value!r:.120}"
        )
    return dict(pairs)


def check_template(name: str, source: str, special_tokens: Mapping[str, str]) -> None:
    """InvalidCheckpoint if a template is empty, does not compile, or does what a template may not."""
    if not source.strip():
        raise InvalidCheckpoint(f"the chat template {name!r} is empty; download it again, or remove it")
    try:
        where = f"the checkpoint ({name})"
        refuse_trespass(ChatTemplate(source, special_tokens, where=where), where)
    except InvalidArtifact as error:
        raise InvalidCheckpoint(str(error)) from error
    except RecursionError as error:
        raise InvalidCheckpoint(f"the chat template {name!r} is nested too deep to be compiled") from error
