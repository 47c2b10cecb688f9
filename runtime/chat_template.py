"""A model's chat template: messages to the text of the prompt, rendered in a sandbox as transformers does it.

The template comes with the model and is not trusted: no attribute access to internals, nothing mutable,
bounded ranges, repetitions and output. Knows nothing about tokens.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import InvalidArtifact, InvalidRequest

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATE_FILE = "chat_template.jinja"

MAX_OUTPUT_CHARS = 16_000_000
"""Longest rendered prompt: far beyond any context, yet small beside the memory of a server."""
MAX_REPEAT = 1_000_000
"""Longest string or list a template may make with `*`."""
MAX_POWER = 1_000
"""Largest base and exponent of `**`: the result has at most 10,000 bits."""


class ChatTemplate:
    """A compiled template. Safe to use from many threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, where: str = TEMPLATE_FILE) -> None:
        """Compile; InvalidArtifact if the template is not valid Jinja."""
        from jinja2 import TemplateError, meta

        self.source = source
        self._special_tokens = dict(special_tokens)
        try:
            environment = _environment()
            self._template: Template = environment.from_string(source)
            self.knows_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))
        except TemplateError as error:
            raise InvalidArtifact(f"the chat template in {where} does not compile: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt for a list of messages (`role`, `content`...), ending where the assistant is to speak.

        `tools` are functions in OpenAI's form; a template for which `knows_tools` is false ignores them.
        InvalidRequest if the template refuses the messages, fails on them or writes too much.
        """
        values = {
            **self._special_tokens,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": list(tools) or None,
            "documents": None,
        }
        pieces, num_chars = [], 0
        try:
            for piece in self._template.generate(values):
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > MAX_OUTPUT_CHARS:
                    raise InvalidRequest(
                        f"the prompt has more than {MAX_OUTPUT_CHARS:,} characters; send shorter messages",
                        param="messages",
                    )
        except InvalidRequest:
            raise
        except Exception as error:  # the template is a program of the model's author: it can raise anything
            raise InvalidRequest(
                f"the model's chat template does not take these messages: {error}", param="messages"
            ) from error
        return "".join(pieces)


def load_chat_template(
    file: Path | None, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> ChatTemplate | None:
    """The template of `file`, the artifact's chat_template.jinja, or else `chat_template` of tokenizer_config.json.

    That field is a string, or a list of named templates of which `default` is taken. None if the model has none.
    """
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidArtifact(f"{file} cannot be read: {error}; export the model again") from error
        return ChatTemplate(text, special_tokens, where=str(file))
    source = config.get("chat_template")
    if isinstance(source, list):
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default")
    if source is None:
        return None
    if not isinstance(source, str):
        raise InvalidArtifact(f"chat_template of tokenizer_config.json is a {type(source).__name__}, not a string")
    return ChatTemplate(source, special_tokens, where="tokenizer_config.json")


def _environment() -> "ImmutableSandboxedEnvironment":
    """Jinja set up as transformers sets it up, so that a template gives the same text."""
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """{% generation %}...{% endgeneration %} marks what to train on; here it does nothing."""

        tags = {"generation"}  # noqa: RUF012  # jinja2 declares it so

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**" and max(abs(left), abs(right)) > MAX_POWER:
                raise SecurityError(f"{left} ** {right} is too large")
            if operator == "*":
                for value, count in ((left, right), (right, left)):
                    if isinstance(value, str | list | tuple) and len(value) * count > MAX_REPEAT:
                        raise SecurityError(f"a repetition of {len(value)} * {count} is too long")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
