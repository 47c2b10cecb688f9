"""Text in and out: incremental decoding against the library's, special tokens, stop strings."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, processors

from runtime.core import TextStream
from runtime.errors import InvalidArtifact, InvalidRequest
from runtime.text.stop_strings import RequestText, StopStrings
from runtime.text.tokenizer import Tokenizer
from tests.support.byte_tokenizer import CONFIG, byte_fallback_tokenizer, byte_level_hf, byte_tokenizer

SCRIPTS = [
    "The quick brown fox",
    "d\u00e9j\u00e0 vu, na\u00efve, \u0142\u00f3d\u017a",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440",
    "\u4f60\u597d\uff0c\u4e16\u754c \u3053\u3093\u306b\u3061\u306f \uc548\ub155",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    # A family, a flag and a skin tone: emoji joined by U+200D, by regional letters and by modifiers.
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1eb\U0001f1f7 \U0001f44d\U0001f3fd",
    "\U0001d54f \U00010348 a\u0301 \x00\x7f\t\r\n  two  spaces",
]

BYTE_LEVEL, BYTE_FALLBACK = byte_tokenizer(), byte_fallback_tokenizer()


def pieces_of(tokenizer: Tokenizer, ids: list[int], prompt_ids: list[int] | None = None) -> list[str]:
    detokenizer = tokenizer.detokenizer(prompt_ids or [])
    return [*(detokenizer.push(i) for i in ids), detokenizer.finish()]


def decoded_by_library(tokenizer: Tokenizer, ids: list[int]) -> str:
    text: str = tokenizer._hf.decode(ids, skip_special_tokens=True)
    return text


@settings(max_examples=400, deadline=None)
@given(st.lists(st.integers(0, 259), max_size=40))
def test_byte_level_pieces_of_random_ids_add_up_to_the_decoded_whole(ids: list[int]) -> None:
    assert "".join(pieces_of(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids) == decoded_by_library(BYTE_LEVEL, ids)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 292), max_size=40))
def test_byte_fallback_pieces_of_random_ids_are_the_text_of_their_bytes(ids: list[int]) -> None:
    """The library gives up a whole run of byte tokens if one is bad; a stream keeps good characters."""
    whole = b"".join(BYTE_FALLBACK.token_bytes(i) for i in ids).decode(errors="replace").removeprefix(" ")
    assert "".join(pieces_of(BYTE_FALLBACK, ids)) == whole
    if "\ufffd" not in whole:
        assert whole == BYTE_FALLBACK.decode(ids) == decoded_by_library(BYTE_FALLBACK, ids)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte-level", "byte-fallback"])
@pytest.mark.parametrize("text", SCRIPTS)
def test_text_in_many_scripts_survives_and_no_piece_has_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == text == tokenizer.decode(ids) == decoded_by_library(tokenizer, ids)
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.text(max_size=30))
def test_any_text_survives(text: str) -> None:
    assert "".join(pieces_of(BYTE_LEVEL, BYTE_LEVEL.encode(text, add_special_tokens=False))) in (
        text,
        # A special token written out in the text is taken for one, as in every server for these models.
        text.replace("<|begin|>", "").replace("<|end|>", ""),
    )


def test_bytes_that_cannot_become_a_character_come_out_as_soon_as_that_is_certain() -> None:
    by_byte = {BYTE_LEVEL.token_bytes(i): i for i in range(256)}
    ids = [by_byte[bytes([byte])] for byte in b"\xe4\xbda\xff\xf0\x9f"]
    assert pieces_of(BYTE_LEVEL, ids) == ["", "", "\ufffda", "\ufffd", "", "", "\ufffd"]


def test_the_space_before_the_first_word_goes_where_a_text_begins_and_stays_in_the_middle() -> None:
    cat, bos = BYTE_FALLBACK.encode("cat", add_special_tokens=False)[0], 288
    assert BYTE_FALLBACK.is_special(bos)
    ids = [283, 256]
    assert BYTE_FALLBACK.token_bytes(283) == b" the"
    assert "".join(pieces_of(BYTE_FALLBACK, ids)) == "thea"
    assert "".join(pieces_of(BYTE_FALLBACK, ids, [cat, bos])) == "thea"
    assert "".join(pieces_of(BYTE_FALLBACK, ids, [bos, cat])) == " thea"


def test_special_tokens_add_nothing_but_have_a_name() -> None:
    assert BYTE_LEVEL.encode("a<|end|>b")[1] == 257
    assert BYTE_LEVEL.token_bytes(257) == b""
    assert BYTE_LEVEL.token_text(257) == "<|end|>"
    assert BYTE_LEVEL.token_bytes(9999) == b""
    assert BYTE_LEVEL.vocab_size == 258


def test_added_tokens_that_are_not_special_are_text() -> None:
    hf = byte_level_hf()
    hf.add_tokens(["<think>", "\u4e2d\u4e2d"])
    tokenizer = Tokenizer(hf, CONFIG)
    ids = tokenizer.encode("<think>\u4e2d\u4e2d")
    assert ids == [258, 259]
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids) == "<think>\u4e2d\u4e2d"


def test_the_post_processor_and_add_bos_token_decide_about_bos() -> None:
    hf = byte_level_hf()
    assert Tokenizer(hf, CONFIG).encode("a") == Tokenizer(hf, CONFIG | {"add_bos_token": False}).encode("a")
    asked = Tokenizer(hf, CONFIG | {"add_bos_token": True})
    assert asked.encode("a")[0] == 256 and len(asked.encode("a")) == 2
    assert len(asked.encode("a", add_special_tokens=False)) == 1
    hf.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 256)])
    for config in (CONFIG, CONFIG | {"add_bos_token": True}):
        assert Tokenizer(hf, config).encode("a")[0] == 256
        assert len(Tokenizer(hf, config).encode("a")) == 2


def test_text_that_is_not_unicode_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="character 2"):
        BYTE_LEVEL.encode("ab\ud800")


def test_a_tokenizer_loads_from_its_files_and_a_broken_one_is_refused(tmp_path: Path) -> None:
    file, config_file = tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"
    with pytest.raises(InvalidArtifact, match=r"tokenizer\.json"):
        Tokenizer.from_files(file, None)
    byte_level_hf().save(str(file))
    assert Tokenizer.from_files(file, None).special_tokens == {}
    config_file.write_text(json.dumps(CONFIG))
    assert Tokenizer.from_files(file, config_file).special_tokens == {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    for broken in ("[]", "{"):
        config_file.write_text(broken)
        with pytest.raises(InvalidArtifact, match="tokenizer_config"):
            Tokenizer.from_files(file, config_file)


@pytest.mark.parametrize("kind", ["WordPiece", "none"])
def test_a_decoder_that_cannot_be_streamed_is_refused(kind: str) -> None:
    hf: HfTokenizer = byte_level_hf()
    hf.decoder = decoders.WordPiece() if kind == "WordPiece" else None
    with pytest.raises(InvalidArtifact, match=kind):
        Tokenizer(hf, CONFIG)


def naive_cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The text before the first stop string completed: look at every prefix in turn."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@settings(max_examples=400)
@given(
    chunks=st.lists(st.text("ab", max_size=4), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=6), max_size=3),
)
def test_stop_strings_cut_where_a_naive_search_cuts(chunks: list[str], stops: list[str]) -> None:
    stream, emitted, whole = StopStrings(stops), "", "".join(chunks)
    expected, is_stopped = naive_cut(whole, stops)
    for count, chunk in enumerate(chunks, start=1):
        piece = stream.push(chunk)
        emitted += piece.text
        assert expected.startswith(emitted)
        if piece.is_stopped:
            assert is_stopped and emitted == expected
            return
        seen = "".join(chunks[:count])
        held = seen[len(emitted) :]
        # No more is held back than could begin a stop string.
        assert held == "" or any(stop.startswith(held) for stop in stops)
    assert not is_stopped
    assert emitted + stream.finish() == whole


def test_a_request_text_joins_characters_before_it_looks_for_stops() -> None:
    stream: TextStream = RequestText(BYTE_LEVEL.detokenizer(), ("\u4e2d!",))
    results = [stream.push(i) for i in BYTE_LEVEL.encode("a\u4e2d?\u4e2d!b")]
    assert [r.text for r in results[:5]] == ["a", "", "", "", "\u4e2d?"]
    assert [r.is_stopped for r in results].index(True) == 8
    assert "".join(r.text for r in results[:9]) == "a\u4e2d?"


def test_a_stop_string_can_stay_in_the_text_and_does_not_count_at_first() -> None:
    def text_of(text: str, **settings: Any) -> str:
        stream, shown = RequestText(BYTE_LEVEL.detokenizer(), ("ab", "b!"), **settings), ""
        for token_id in BYTE_LEVEL.encode(text):
            piece = stream.push(token_id)
            shown += piece.text
            if piece.is_stopped:
                return shown + "|"
        return shown + stream.finish()

    assert text_of("xabab!", keeps_end=True) == "xab|"
    assert text_of("xab!", min_tokens=3) == "xa|", "the fourth token completes the second stop string"
    assert text_of("xabab!", min_tokens=4) == "xab|"
    assert text_of("xabab!", min_tokens=5) == "xaba|"
    assert text_of("xab", min_tokens=3) == text_of("xab", min_tokens=9) == "xab"


def test_the_text_of_the_token_at_the_end_is_part_of_it_if_that_is_asked_for() -> None:
    end_id, dot = 257, BYTE_LEVEL.encode(".")[0]

    def finished(end_id: int, *, skips_special: bool = True, **settings: Any) -> str:
        stream = RequestText(BYTE_LEVEL.detokenizer(skips_special=skips_special), ("<|end|>",), **settings)
        return "".join(stream.push(token_id).text for token_id in BYTE_LEVEL.encode("a\u4e2d")[:3]) + stream.finish(
            end_id
        )

    assert finished(dot) == finished(end_id) == "a\ufffd"
    assert finished(dot, keeps_end=True) == "a\ufffd."
    assert finished(end_id, keeps_end=True) == "a\ufffd"
    assert finished(end_id, keeps_end=True, end_texts={end_id: "<|end|>"}) == "a\ufffd<|end|>"
    assert finished(end_id, keeps_end=True, skips_special=False) == "a\ufffd<|end|>"


def test_special_tokens_are_written_by_their_names_unless_they_are_skipped() -> None:
    ids = BYTE_LEVEL.encode("<|begin|>a<|end|>b")
    shown, skipped = (BYTE_LEVEL.detokenizer(skips_special=skips) for skips in (False, True))
    assert "".join(map(shown.push, ids)) == "<|begin|>a<|end|>b" and "".join(map(skipped.push, ids)) == "ab"
    assert BYTE_LEVEL.special_id_of == {"<|begin|>": 256, "<|end|>": 257}
    assert BYTE_LEVEL.shown_bytes(9999) == b""


def test_what_is_held_back_comes_out_at_the_end() -> None:
    stream = RequestText(BYTE_LEVEL.detokenizer(), ("abc",))
    assert [stream.push(i).text for i in BYTE_LEVEL.encode("xab")] == ["x", "", ""]
    assert stream.finish() == "ab"
    broken = RequestText(BYTE_LEVEL.detokenizer(), ("abc",))
    ids = BYTE_LEVEL.encode("a\u4e2d")[:2]
    assert "".join(broken.push(i).text for i in ids) + broken.finish() == "a\ufffd"
