"""Readers of calibration files: every record comes out, bad input is one line with its place, memory is bounded."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from export.calibration import records as calibration_files
from export.calibration.packing import Sample
from export.calibration.records import Record, read_records
from runtime.errors import InvalidSetting

TEXT = st.text(st.characters(codec="utf-8"), max_size=200)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXT}), min_size=1, max_size=4
)
RECORDS = st.lists(
    st.one_of(TEXT.map(lambda text: {"text": text}), MESSAGES.map(lambda m: {"messages": m})), max_size=8
)
HYPOTHESIS = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)


def records_of(file: Path, *, piece_chars: int = 10_000) -> list[dict[str, Any]]:
    return [dict(record.value) for record in read_records(file, piece_chars=piece_chars)]


def kept(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a reader gives for these: texts that are blank are no records."""
    return [record for record in records if "messages" in record or record["text"].strip()]


@HYPOTHESIS
@given(RECORDS, st.booleans(), st.booleans())
def test_jsonl_gives_back_what_was_written(
    tmp_path: Path, records: list[dict[str, Any]], is_ascii: bool, has_mark: bool
) -> None:
    file = tmp_path / "a.jsonl"
    text = "\n\n".join(json.dumps(record, ensure_ascii=is_ascii) for record in records)
    file.write_text(text, encoding="utf-8-sig" if has_mark else "utf-8", newline="")
    assert records_of(file) == kept(records)


@HYPOTHESIS
@given(st.lists(TEXT, max_size=8), st.sampled_from(["text", "content"]))
def test_parquet_gives_back_what_was_written(tmp_path: Path, texts: list[str], column: str) -> None:
    file = tmp_path / "a.parquet"
    table = pyarrow.table({"id": list(range(len(texts))), column: pyarrow.array(texts, pyarrow.string())})
    parquet.write_table(table, file, row_group_size=3)
    assert records_of(file) == kept([{"text": text} for text in texts])


def test_parquet_with_conversations_and_holes(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    messages = [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Ja, früher."}]
    parquet.write_table(pyarrow.table({"text": ["x", "y"], "messages": [messages, None]}), file)
    assert records_of(file) == [{"messages": messages}]


@HYPOTHESIS
@given(TEXT, st.integers(16, 300))
def test_txt_loses_nothing_but_blank_pieces(tmp_path: Path, text: str, piece_chars: int) -> None:
    file = tmp_path / "a.txt"
    file.write_text(text, encoding="utf-8", newline="")
    pieces = [record["text"] for record in records_of(file, piece_chars=piece_chars)]
    assert "".join("".join(pieces).split()) == "".join(text.removeprefix("\ufeff").split())
    assert all(piece.strip() for piece in pieces)


@HYPOTHESIS
@given(TEXT, st.integers(2, 40))
def test_long_texts_come_in_pieces_cut_between_words(tmp_path: Path, text: str, piece_chars: int) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": text}))
    pieces = [record["text"] for record in records_of(file, piece_chars=piece_chars)]
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(len(piece) <= piece_chars for piece in pieces)


def test_a_piece_ends_before_a_space() -> None:
    words = "alpha beta gamma delta epsilon"
    record = Record({"text": words})
    pieces = [piece.value["text"] for piece in calibration_files._bounded(record, 12)]
    assert pieces == ["alpha beta", " gamma delta", " epsilon"]


def test_a_long_conversation_keeps_its_beginning(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    messages = [{"role": "user", "content": "a" * 30}, {"role": "assistant", "content": "b" * 30}]
    file.write_text(json.dumps({"messages": [*messages, {"role": "user", "content": "c"}]}))
    (record,) = records_of(file, piece_chars=40)
    assert [message["content"] for message in record["messages"]] == ["a" * 30, "b" * 10]


BAD_LINES = {
    '{"text": "fine"': ["a.jsonl:3", "not JSON"],
    "[" * 100_000: ["a.jsonl:3", "not JSON"],
    "9" * 5000: ["a.jsonl:3", "not JSON"],
    '["text"]': ["a.jsonl:3", "list"],
    '{"prompt": "x", "answer": "y"}': ["a.jsonl:3", "'prompt', 'answer'", "messages, text, content"],
    '{"text": 5}': ["a.jsonl:3", "int"],
    '{"text": "\\ud800"}': ["a.jsonl:3", "surrogate"],
    '{"messages": []}': ["a.jsonl:3", "at least one"],
    '{"messages": [{"role": "user"}]}': ["a.jsonl:3", "message 1", "role and content"],
    '{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": [{"type": "text"}]}]}': ["message 2"],
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(InvalidSetting) as caught:
        records_of(file)
    message = str(caught.value)
    assert all(words in message for words in BAD_LINES[line]), message
    assert "\n" not in message
    assert len(message) < 400


def write_bytes(data: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(data)


BAD_FILES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "latin-1 text": ("a.txt", write_bytes("Orléans".encode("latin-1")), "not UTF-8: byte 0xe9 at offset 3"),
    "utf-16 text": ("a.txt", write_bytes("text".encode("utf-16")), "not UTF-8"),
    "latin-1 json": ("a.jsonl", write_bytes('{"text": "é"}'.encode("latin-1")), "a.jsonl:1 is not UTF-8"),
    "no suffix that is read": ("a.csv", write_bytes(b"text"), ".jsonl, .txt, .parquet"),
    "missing": ("a.txt", lambda _: None, "cannot be read"),
    "directory": ("a.txt", lambda file: file.mkdir(), "is a directory"),
    "no parquet": ("a.parquet", write_bytes(b"PAR1 but not really"), "cannot be read as Parquet"),
    "empty parquet": ("a.parquet", write_bytes(b""), "cannot be read as Parquet"),
    "no text column": (
        "a.parquet",
        lambda file: parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), file),
        "no column called messages, text, content; it has body, id",
    ),
    "text column of numbers": (
        "a.parquet",
        lambda file: parquet.write_table(pyarrow.table({"text": [1, 2]}), file),
        "row 1: text is a int",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_one_line(tmp_path: Path, case: str) -> None:
    name, make, words = BAD_FILES[case]
    make(tmp_path / name)
    with pytest.raises(InvalidSetting) as caught:
        records_of(tmp_path / name)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_parquet_file_is_one_line(tmp_path: Path) -> None:
    whole = tmp_path / "whole.parquet"
    parquet.write_table(pyarrow.table({"text": [f"text {number}" * 9 for number in range(5000)]}), whole)
    data = bytearray(whole.read_bytes())
    data[200:6000] = bytes(5800)
    (tmp_path / "torn.parquet").write_bytes(data)
    with pytest.raises(InvalidSetting, match="cannot be read as Parquet"):
        records_of(tmp_path / "torn.parquet")


def test_a_line_without_end_is_refused_before_it_fills_memory(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    with file.open("wb") as stream:
        stream.truncate(calibration_files.MAX_LINE_BYTES + 2)
    with pytest.raises(InvalidSetting, match=r"a\.jsonl:1: the line is longer than"):
        records_of(file)


@given(st.lists(st.integers(0, 500), max_size=120), st.integers(1, 3000), st.integers(0, 5))
def test_a_sample_fits_its_budget_and_does_not_depend_on_how_it_was_fed(
    sizes: list[int], budget: int, seed: int
) -> None:
    records = [Record({"text": "x" * size}, str(number)) for number, size in enumerate(sizes)]
    whole, halves = (Sample(budget_chars=budget, rng=Random(seed)) for _ in range(2))
    whole.add(records)
    halves.add(records[: len(sizes) // 2])
    halves.add(records[len(sizes) // 2 :])
    chosen = whole.records()
    assert chosen == halves.records()
    assert len({record.where for record in chosen}) == len(chosen)
    assert whole.num_seen == len(sizes)
    costs = [record.num_chars + 64 for record in chosen]
    assert sum(costs[:-1]) < budget
    assert sum(costs) >= budget or len(chosen) == len(sizes)


def test_every_record_is_as_likely_as_any_other() -> None:
    records = [Record({"text": "x" * 36}, str(number)) for number in range(20)]
    counts = dict.fromkeys((record.where for record in records), 0)
    for seed in range(600):
        sample = Sample(budget_chars=500, rng=Random(seed))
        sample.add(records)
        for record in sample.records():
            counts[record.where] += 1
    # Five of twenty in each of 600 draws: 150 expected, standard deviation 10.6; five of those either way.
    assert set(counts.values()) <= set(range(97, 204))


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def peak(num_lines: int) -> int:
        file = tmp_path / f"{num_lines}.jsonl"
        with file.open("w") as stream:
            for number in range(num_lines):
                stream.write(json.dumps({"text": f"line {number} " * 20}) + "\n")
        tracemalloc.start()
        sample = Sample(budget_chars=20_000, rng=Random(0))
        sample.add(read_records(file, piece_chars=1000))
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    few = peak(1000)
    # The budget is filled within the first 100 lines, so thirty times the lines may add nothing but noise.
    assert peak(30_000) < few + 50_000
