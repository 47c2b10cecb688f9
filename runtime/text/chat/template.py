"""Renders a model's chat template, in a sandbox, as transformers does.

The template comes with the model and is not trusted: runtime/text/chat/sandbox.py limits its access, time and memory.
Knows nothing about tokens."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import InvalidArtifact, InvalidRequest
from runtime.text.chat.needs import adapted, milder_forms, probed
from runtime.text.chat.options import NO_VARIABLES, OWN_NAMES, REASONING, cut_at_open_end, opened, with_reasoning

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATE_FILE = "chat_template.jinja"
TOOL_USE = "tool_use"
"""The name of the template for conversations with tools, if a model has several."""

MAX_OUTPUT_CHARS = 16_000_000
"""Longest rendered prompt: beyond any context, and small for a server's memory."""


class _RefusedError(InvalidRequest):
    """The template refuses the messages."""


class ChatTemplate:
    """A compiled template. Safe to use from many threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, where: str = TEMPLATE_FILE) -> None:
        """Compile; InvalidArtifact if the template is not valid Jinja."""
        from jinja2 import TemplateError, meta, nodes

        from runtime.text.chat.sandbox import TemplateEnvironment

        self.source = source
        self._special_tokens = dict(special_tokens)
        try:
            self._environment = environment = TemplateEnvironment()
            self._template: Template = environment.from_string(source)
            parsed = environment.parse(source)
            self.reads = frozenset(meta.find_undeclared_variables(parsed))
            """The variables that it reads."""
            self._words = {node.attr for node in parsed.find_all(nodes.Getattr)}
            self._words |= {node.value for node in parsed.find_all(nodes.Const) if isinstance(node.value, str)}
            self._own_names = frozenset({*OWN_NAMES, *environment.globals, *special_tokens})
        except TemplateError as error:
            raise InvalidArtifact(f"the chat template in {where} does not compile: {error}") from error
        self.with_tools = self
        """The template for conversations with tools, which may be another one."""
        self._refuse_bomb(where)
        self._needs = probed(lambda messages, tools: self._rendered(self._values(messages, tools=tools)))

    def _refuse_bomb(self, where: str) -> None:
        """Refuse a template that exceeds a limit on a message of one word."""
        from runtime.text.chat.limits import TemplateLimitError

        try:
            self._rendered(self._values([{"role": "user", "content": "a"}]))
        except InvalidRequest as error:
            if isinstance(error.__cause__, TemplateLimitError):
                raise InvalidArtifact(
                    f"the chat template in {where} does more than one rendering may: {error.__cause__}"
                ) from error

    @property
    def knows_tools(self) -> bool:
        """Whether it reads the variable `tools`."""
        return "tools" in self.reads

    @property
    def knows_reasoning(self) -> bool:
        """Whether it reads the reasoning of earlier turns."""
        return not self._words.isdisjoint(REASONING)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] = NO_VARIABLES,
    ) -> str:
        """The prompt for a list of messages (`role`, `content`...), ending where the assistant is to speak, or inside
        the last message, which is to be continued.

        `tools` are functions in OpenAI's form; a template for which `knows_tools` is false ignores them. `variables`
        are the client's. If the template refuses the roles (no system message, or roles that must alternate), the
        messages are joined until it takes them, with no text left out. InvalidRequest if a client may not set one of
        the variables, or if the template refuses the messages, fails on them or writes too much."""
        for name in variables:
            if name in self._own_names:
                raise InvalidRequest(
                    f"chat_template_kwargs.{name} cannot be set: the server gives the template a value of its own",
                    param="chat_template_kwargs",
                )
        options: dict[str, Any] = {
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "variables": variables,
        }
        messages = self.adapted(messages)

        def rendered(messages: Sequence[Mapping[str, Any]]) -> str:
            if not continue_final_message:
                return self._rendered(self._values(messages, **options))
            return cut_at_open_end(self._rendered(self._values(opened(messages), **options)), messages[-1]["content"])

        try:
            return rendered(messages)
        except _RefusedError as refusal:
            for milder in milder_forms(messages):
                if milder != messages:
                    with suppress(_RefusedError):
                        return rendered(milder)
            raise refusal

    def adapted(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages with calls as this template needs them (runtime/text/chat/needs.py)."""
        return adapted(messages, self._needs)

    @property
    def has_short_ids(self) -> bool:
        """Whether the ids of calls have to be nine letters and digits."""
        return self._needs.short_ids

    def _values(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] = NO_VARIABLES,
    ) -> dict[str, Any]:
        return {
            **self._special_tokens,
            "documents": None,
            **variables,
            "messages": [with_reasoning(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": list(tools) or None,
        }

    def _rendered(self, values: Mapping[str, Any]) -> str:
        from runtime.text.chat.sandbox import TemplateRefusalError

        pieces, num_chars = [], 0
        try:
            with self._environment.metered():
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
        except TemplateRefusalError as error:
            raise _RefusedError(
                f"the model's chat template does not take these messages: {error}", param="messages"
            ) from error
        except Exception as error:  # the template is a program and can raise anything
            raise InvalidRequest(
                f"the model's chat template does not take these messages: {error}", param="messages"
            ) from error
        return "".join(pieces)


def load_chat_template(
    file: Path | None, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> ChatTemplate | None:
    """The template of `file`, the artifact's chat_template.jinja, or else `chat_template` of tokenizer_config.json.

    That field is a string, or a list of named templates: `default`, and `tool_use` for conversations with tools. None
    if the model has none.
    """
    found = _named_templates(config.get("chat_template"))
    places = dict.fromkeys(found, "tokenizer_config.json")
    if file is not None:
        try:
            found["default"], places["default"] = file.read_text(encoding="utf-8"), str(file)
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidArtifact(f"{file} cannot be read: {error}; export the model again") from error
    if "default" not in found:
        return None
    template = ChatTemplate(found["default"], special_tokens, where=places["default"])
    if TOOL_USE in found:
        template.with_tools = ChatTemplate(found[TOOL_USE], special_tokens, where=f"{places[TOOL_USE]}, {TOOL_USE}")
    return template


def _named_templates(value: Any) -> dict[str, str]:
    """The templates of tokenizer_config.json by their names. Raises InvalidArtifact."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if not isinstance(value, list):
        raise InvalidArtifact(f"chat_template of tokenizer_config.json is a {type(value).__name__}, not a string")
    named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
    return {name: source for name, source in named.items() if isinstance(name, str) and isinstance(source, str)}
