"""Reading a text in pieces: nothing lost, bounded, and tokenized as the whole text would be."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from runtime.errors import InvalidSetting
from runtime.text.text_file import check_readable, pieces_of

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PROSE = (
    "He said: ten.\n\nNone left.\n\n  - boats, 2024\r\n\n\tNeuf \u00e0 voiles\nand  one.\n \nIt's so\n" * 12
)  # an empty line before a word, before spaces, before a tab


@pytest.fixture(scope="module", params=[GPT2, LLAMA3], ids=["gpt2", "llama3"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Byte-level BPE trained on the prose, so that its merges join spaces and line ends."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(request.param), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet)
    made.train_from_iterator([PROSE], trainer)
    return made


@pytest.mark.parametrize("piece_bytes", [40, 64, 200, 1000])
def test_pieces_are_tokenized_as_the_whole(tokenizer: Tokenizer, tmp_path: Path, piece_bytes: int) -> None:
    file = tmp_path / "text"
    file.write_bytes(PROSE.encode())
    pieces = list(pieces_of(file, piece_bytes=piece_bytes))
    assert len(pieces) > 1
    assert [token for piece in pieces for token in tokenizer.encode(piece).ids] == tokenizer.encode(PROSE).ids


@given(st.text(alphabet="a.\n \u00e9\U0001f600", max_size=200), st.integers(1, 40))
def test_nothing_is_lost_and_pieces_are_bounded(
    tmp_path_factory: pytest.TempPathFactory, text: str, piece_bytes: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "pieces.txt"
    file.write_bytes(text.encode())
    pieces = list(pieces_of(file, piece_bytes=piece_bytes))
    assert "".join(pieces) == text
    assert all(len(piece.encode()) <= 4 * piece_bytes + 4 for piece in pieces)


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 100])
@pytest.mark.parametrize(("content", "offset"), [(b"ab\xc3\xa9\xffz", 4), (b"abc\xe2\x82", 3), (b"a\xe2\x82z", 1)])
def test_the_offset_of_a_bad_byte_does_not_depend_on_the_pieces(
    tmp_path: Path, content: bytes, offset: int, piece_bytes: int
) -> None:
    file = tmp_path / "text"
    file.write_bytes(content)
    with pytest.raises(InvalidSetting, match=f"byte 0x{content[offset]:02x} at offset {offset};"):
        list(pieces_of(file, piece_bytes=piece_bytes))


@pytest.mark.parametrize(("name", "message"), [("none", "No such file"), (".", "is a directory")])
def test_what_is_no_file_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(InvalidSetting, match=message):
        check_readable(tmp_path / name)
