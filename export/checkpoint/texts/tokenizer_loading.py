"""The `tokenizers` library, with one error for everything that it can refuse."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from runtime.errors import InvalidCheckpoint

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_tokenizer(text: str, *, where: str = "tokenizer.json") -> "Tokenizer":
    """Load a tokenizer.json; InvalidCheckpoint, naming `where`, if the library cannot."""
    from tokenizers import Tokenizer

    with library_errors(f"{where} cannot be loaded", "download or copy it again"):
        return Tokenizer.from_str(text)


@contextmanager
def library_errors(what: str, advice: str) -> Iterator[None]:
    """Turn what the library raises inside into InvalidCheckpoint: what happened, the library's reason, what to do."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library raises bare Exception, and BaseException where its Rust code panics
        reason = " ".join(str(error).split())[:300]
        raise InvalidCheckpoint(f"{what}: {reason}; {advice}") from error
