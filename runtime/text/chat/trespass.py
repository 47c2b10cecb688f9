"""Refuses chat templates that reach for what the sandbox forbids, when a model is exported.

A server renders such a template safely, and refuses every request: better to know it before. Knows nothing of messages
but one of a single word.
"""

from collections.abc import Iterator

from jinja2 import nodes
from jinja2.exceptions import SecurityError

from runtime.errors import InvalidArtifact, InvalidRequest
from runtime.text.chat.sandbox import TemplateEnvironment
from runtime.text.chat.template import ChatTemplate

_PRIVATE = "__"
_KEY_FILTERS = ("attr", "map")


def refuse_trespass(template: ChatTemplate, where: str) -> None:
    """InvalidArtifact if the template reads other files, names Python's own attributes, or exceeds what one rendering
    may do or touch on a message of one word."""
    parsed = TemplateEnvironment().parse(template.source)
    files = next(parsed.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)), None)
    if files is not None:
        raise InvalidArtifact(
            f"the chat template in {where}, line {files.lineno}, reads another file ({type(files).__name__.lower()}); "
            "a template must be whole"
        )
    for node, name in _names(parsed):
        if name.startswith(_PRIVATE):
            raise InvalidArtifact(
                f"the chat template in {where}, line {node.lineno}, reaches for {name!r}, which a template may not"
            )
    try:
        template.render([{"role": "user", "content": "a"}])
    except InvalidRequest as error:
        cause = error.__cause__
        if isinstance(cause, OverflowError | RecursionError | MemoryError):
            raise InvalidArtifact(f"the chat template in {where} does more than one rendering may: {cause}") from error
        if isinstance(cause, SecurityError):
            raise InvalidArtifact(f"the chat template in {where} does what a template may not: {cause}") from error


def _names(parsed: nodes.Template) -> Iterator[tuple[nodes.Node, str]]:
    """Attributes and keys that the template names, however it writes them."""
    for attribute in parsed.find_all(nodes.Getattr):
        yield attribute, attribute.attr
    keys: list[tuple[nodes.Node, nodes.Node]] = [(item, item.arg) for item in parsed.find_all(nodes.Getitem)]
    for applied in parsed.find_all(nodes.Filter):
        if applied.name in _KEY_FILTERS:
            keys += [(applied, argument) for argument in applied.args]
    for node, key in keys:
        if isinstance(key, nodes.Const) and isinstance(key.value, str):
            yield node, key.value
