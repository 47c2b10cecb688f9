"""What turns a model's tokens into text and back: tokenizer, chat template, tool-call format, grammars.

Needs no session, so it is made while the model loads (`open_text_model`). Knows nothing of engines.
"""

from runtime.grammar.grammar import GrammarCompiler
from runtime.settings import EngineSettings
from runtime.text.chat.prompt import ChatPrompts
from runtime.text.chat.template import ChatTemplate
from runtime.text.tokenizer import Tokenizer
from runtime.text.tools.formats import TOOL_FORMATS, detect_format


class ModelText:
    """One model's text. `chats` is None without a chat template. Safe to use from many threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        settings: EngineSettings,
        *,
        vocab_size: int,
        eos_ids: frozenset[int],
    ) -> None:
        """`vocab_size` is the model's, which may be padded beyond the tokenizer's."""
        self.tokenizer, self.chat_template = tokenizer, chat_template
        template = None if chat_template is None else chat_template.with_tools.source
        self.tool_format = TOOL_FORMATS.get(settings.tool_format) or detect_format(template)
        self.chats = None
        if chat_template is not None:
            trusts = settings.trust_special_tokens
            self.chats = ChatPrompts(tokenizer, chat_template, self.tool_format, trust_special_tokens=trusts)
        self.grammars = GrammarCompiler(tokenizer, vocab_size=vocab_size, eos_ids=eos_ids)

    def prepare(self) -> None:
        """Prepare for requests with constraints or control tokens; otherwise the first one holds up all others."""
        self.grammars.prepare()
        if self.chats is not None:
            self.chats.prepare()

    def close(self) -> None:
        """End the threads and the process that grammars use. Idempotent."""
        self.grammars.close()
