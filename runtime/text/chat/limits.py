"""Limits on the work of one rendering of a chat template, and the code that counts it.

    steps       rounds of loops, calls, operations and filters; a long operand counts as several
    characters  of every text that is made, counted before it is made

`Instrument` adds counting to a parsed template where Jinja has no hook. Knows nothing of messages.
"""

from collections.abc import ItemsView, KeysView, ValuesView
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_STEPS = 1_000_000
"""Some seconds at most. Long ordinary prompts (thousands of messages, a hundred tools) take a tenth of it."""
MAX_CHARS = 128_000_000
"""Characters of all texts made in one rendering: eight times the longest prompt, for templates that build it in
stages."""
MAX_REPEAT = 1_000_000
"""Longest string that `*` makes, most values in a list, and largest whole number given to a filter."""
MAX_POWER = 1_000
"""Largest base and exponent of `**`."""
MAX_BITS = 4_096
"""Longest product of whole numbers."""
MAX_WIDTH = 9_999
"""Largest width of a padded or formatted value, and of an indent."""
NODE_CHARS = 8
"""Counted for each value in a list or object, in addition to its text."""
CHARS_PER_STEP = 4_096
ITEMS_PER_STEP = 16


class TemplateLimitError(SecurityError):
    """The template exceeds a limit."""


class Meter:
    """Counts the work of one rendering."""

    def __init__(self) -> None:
        self.steps = 0
        self.chars = 0

    def charge(self, *, steps: int = 1, chars: int = 0) -> None:
        """Count work. Raises TemplateLimitError where it is too much."""
        self.steps += steps + chars // CHARS_PER_STEP
        self.chars += chars
        if self.steps > MAX_STEPS:
            raise TemplateLimitError(f"it takes more than {MAX_STEPS:,} steps")
        if self.chars > MAX_CHARS:
            raise TemplateLimitError(f"it makes more than {MAX_CHARS:,} characters of text")


def weight(value: Any) -> int:
    """The approximate length of a value as text. A list that is twice in another one counts twice, as in the text.

    Raises TemplateLimitError for more than MAX_REPEAT values: a few nested lists can have a text of any length.
    """
    if isinstance(value, str):
        return len(value)
    total, num_nodes, stack = 0, 0, [value]
    while stack:
        item = stack.pop()
        num_nodes += 1
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, dict):
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, list | tuple | set | frozenset | ItemsView | KeysView | ValuesView):
            stack.extend(item)
        elif isinstance(item, Namespace):
            stack.append(object.__getattribute__(item, "_Namespace__attrs"))
        elif isinstance(item, int):
            total += item.bit_length() // 3
        if num_nodes + len(stack) > MAX_REPEAT:
            raise TemplateLimitError(f"a value holds more than {MAX_REPEAT:,} others")
    return total + num_nodes * NODE_CHARS


class Instrument(NodeTransformer):
    """Puts calls of the environment's `tick`, `concatenated`, `weighed` and `sliced` into a parsed template: into every
    round of a loop, and around operations that the sandbox does not intercept."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802  # as in Jinja
        num_chars = _num_literal_chars(node.body)
        self.generic_visit(node)
        node.body.insert(0, _tick(num_chars, node.lineno))
        if node.test is not None:
            node.test = nodes.And(_call("tick", [nodes.Const(0)], node.lineno), node.test, lineno=node.lineno)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802  # as in Jinja
        num_chars = _num_literal_chars(node.body)
        self.generic_visit(node)
        node.body.insert(0, _tick(num_chars, node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802  # as in Jinja
        self.generic_visit(node)
        return _call("concatenated", node.nodes, node.lineno)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802  # as in Jinja
        self.generic_visit(node)
        operands: list[nodes.Compare | nodes.Operand] = [node, *node.ops]
        # A comparison with a constant is fast, however large the other side; a search in it is not.
        is_short = any(isinstance(operand.expr, nodes.Const) for operand in operands)
        if not is_short or any(operand.op in ("in", "notin") for operand in node.ops):
            for operand in operands:
                if not isinstance(operand.expr, nodes.Const):
                    operand.expr = _call("weighed", [operand.expr], node.lineno)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802  # as in Jinja
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _call("sliced", [node.node], node.lineno)
        return node


def _call(name: str, args: list[nodes.Expr], lineno: int) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name, lineno=lineno), args, [], None, None, lineno=lineno)


def _tick(num_chars: int, lineno: int) -> nodes.ExprStmt:
    return nodes.ExprStmt(_call("tick", [nodes.Const(num_chars)], lineno), lineno=lineno)


def _num_literal_chars(body: list[nodes.Node]) -> int:
    """Characters of the template's own text in a body, inner loops included."""
    return sum(len(data.data) for node in body for data in node.find_all(nodes.TemplateData))
