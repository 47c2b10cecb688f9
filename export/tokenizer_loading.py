"""tokenizer.json into the `tokenizers` library, with one error for everything that can go wrong there."""

from typing import TYPE_CHECKING

from runtime.errors import InvalidCheckpoint

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_tokenizer(text: str, *, where: str = "tokenizer.json") -> "Tokenizer":
    """Load a tokenizer.json; InvalidCheckpoint, naming `where`, if the library cannot."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library raises bare Exception, and BaseException where its Rust code panics
        reason = " ".join(str(error).split())[:300]
        raise InvalidCheckpoint(f"{where} cannot be loaded: {reason}; download or copy it again") from error
