"""What a model is calibrated on, from each source: sizes, repeatability, provenance, and what is refused."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import calibration_data
from export.calibration.dataset import (
    BUILT_IN,
    INT8_NUM_SAMPLES,
    SELF,
    CalibrationOptions,
    calibration_options,
    load_calibration_set,
    sequences_digest,
)
from export.calibration.encoder import RecordEncoder
from export.calibration.packing import interleave, pack
from export.calibration.records import Record
from export.calibration.self_samples import sample_continuations
from headrace import main
from runtime.errors import InvalidCheckpoint, InvalidSetting
from tests.support.byte_tokenizer import BOS, EOS, byte_level_hf
from tests.support.fake_session import FakeSession
from tests.unit.calibration.texts import TEMPLATE, decoded, texts_of

NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE


def test_the_built_in_set_fills_the_default_and_covers_every_group() -> None:
    calibration = load_calibration_set(BUILT_IN, texts_of())
    assert len(calibration.sequences) == 128
    assert all(0 < len(ids) <= 512 for ids in calibration.sequences)
    assert calibration.num_tokens > 0.9 * 128 * 512
    assert calibration.provenance["num_records"] >= 200
    assert set(calibration.provenance["groups"]) == set(calibration_data.CALIBRATION_GROUPS)
    assert json.loads(json.dumps(calibration.provenance)) == calibration.provenance
    assert all(entry["shared"] == 0 for entry in calibration.provenance["evaluation_overlap"].values())


def test_the_same_seed_gives_the_same_ids_and_another_others() -> None:
    first, again, other = (load_calibration_set(BUILT_IN, texts_of(), num_samples=8, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.sequences != other.sequences
    assert first.provenance["sequences_sha256"] == sequences_digest(first.sequences)
    assert first.provenance["sha256"] == other.provenance["sha256"]


def test_conversations_go_through_the_models_template_and_plain_text_does_not() -> None:
    calibration = load_calibration_set(BUILT_IN, texts_of(), num_samples=64)
    beginnings = [text[: len(BOS)] for text in decoded(calibration)]
    assert BOS in beginnings
    assert beginnings.count(BOS) < len(beginnings)
    plain = load_calibration_set(BUILT_IN, texts_of(None), num_samples=64)
    assert not any(BOS in text for text in decoded(plain))
    assert plain.provenance["chat_template_sha256"] is None


def test_a_template_without_system_role_gets_it_in_the_first_question() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    encoder = RecordEncoder(texts_of(NO_SYSTEM))
    ids = encoder.encode(Record({"messages": messages}))
    assert byte_level_hf().decode(ids, skip_special_tokens=False) == f"{BOS}user\nBe brief.\n\nWhy?{EOS}"


def test_every_built_in_record_is_well_formed() -> None:
    for group in calibration_data.CALIBRATION_GROUPS:
        for record in calibration_data.calibration_records(group):
            if "text" in record:
                assert record.keys() == {"text"}
                assert len(record["text"]) > 200
            else:
                roles = [message["role"] for message in record["messages"]]
                turns = roles[1:] if roles[0] == "system" else roles
                assert turns == ["user", "assistant"] * (len(turns) // 2)
                assert turns
                assert all(message["content"].strip() for message in record["messages"])


def write_lines(file: Path, num_lines: int, words: str = "Sentence number {} says little, but at some length.") -> Path:
    file.write_text("".join(json.dumps({"text": words.format(number)}) + "\n" for number in range(num_lines)))
    return file


def test_a_file_is_sampled_over_its_whole_length(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", 4000)
    calibration = load_calibration_set(str(file), texts_of(), num_samples=16, length=256)
    numbers = [int(text.split()[2]) for text in decoded(calibration)]
    assert calibration.num_tokens > 0.8 * 16 * 256
    assert min(numbers) < 1000
    assert max(numbers) > 3000
    assert calibration.provenance["num_records"] == 4000
    assert list(calibration.provenance["files"]) == ["a.jsonl"]
    assert calibration == load_calibration_set(str(file), texts_of(), num_samples=16, length=256)


def test_text_that_is_also_evaluation_text_is_told_with_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.txt"
    file.write_text(calibration_data.verification_text("prose"), encoding="utf-8")
    calibration = load_calibration_set(str(file), texts_of(), num_samples=16, length=256)
    overlap = calibration.provenance["evaluation_overlap"]
    assert overlap["prose"]["shared"] > 0.9 * overlap["prose"]["runs"]
    assert overlap["manual"]["shared"] == 0
    warning = capsys.readouterr().err
    assert f"holds {overlap['prose']['shared']:,} of the {overlap['prose']['runs']:,} runs of 8 words" in warning
    assert "'manual'" not in warning


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing by that name": ({"source": "no such file"}, "built-in, self, a .jsonl"),
    "a directory": ({"source": "."}, "is a directory"),
    "no samples": ({"num_samples": 0}, "--calibration-samples must be at least 1, got 0"),
    "no length": ({"length": 3}, "--calibration-length must be at least 16"),
    "longer than the model": ({"length": 512, "max_len": 256}, "longer than the model's longest sequence, 256"),
    "self without a model": ({"source": SELF}, "needs the model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_settings_of_a_calibration_set_are_refused(case: str) -> None:
    changes, words = REFUSED[case]
    with pytest.raises(InvalidSetting, match=words):
        load_calibration_set(**{"source": BUILT_IN, "texts": texts_of(), **changes})


@pytest.mark.parametrize("text", ["", "\n\n", '{"text": "Just this."}\n'], ids=["empty", "blank", "tiny"])
def test_a_file_with_next_to_nothing_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(text)
    with pytest.raises(InvalidSetting, match=r"gives \d+ tokens, too few to calibrate on; give at least 2,048"):
        load_calibration_set(str(file), texts_of())


def test_a_record_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    lines = [{"messages": [{"role": role, "content": "words " * 50}]} for role in ("user", "critic")]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + TEMPLATE
    with pytest.raises(InvalidSetting, match=r"a\.jsonl:2: .*user first"):
        load_calibration_set(str(file), texts_of(strict), num_samples=4, length=64)


@pytest.mark.parametrize(
    "broken",
    [{}, {"tokenizer.json": "{}"}, {**texts_of(), "tokenizer_config.json": "["}],
    ids=["none", "empty", "json"],
)
def test_a_checkpoint_without_a_good_tokenizer_is_refused(broken: Mapping[str, str]) -> None:
    with pytest.raises(InvalidCheckpoint, match="tokenizer"):
        load_calibration_set(BUILT_IN, broken)


@given(st.lists(st.lists(st.integers(0, 9), max_size=70), max_size=30), st.integers(1, 6), st.integers(1, 40))
def test_packing_keeps_records_whole_and_in_bounds(records: list[list[int]], num_samples: int, length: int) -> None:
    packed = pack(records, num_samples=num_samples, length=length)
    assert len(packed) <= num_samples
    assert all(0 < len(ids) <= length for ids in packed)
    total = sum(map(len, records))
    assert sum(map(len, packed)) <= total
    if len(packed) < num_samples:
        assert sum(map(len, packed)) == total, "with room for another sequence nothing is left out"


@given(st.lists(st.integers(0, 20), min_size=1, max_size=5), st.integers(0, 9))
def test_interleaving_keeps_every_item_and_any_beginning_balanced(sizes: list[int], seed: int) -> None:
    groups = [[(group, item) for item in range(size)] for group, size in enumerate(sizes)]
    mixed = interleave(groups, Random(seed))
    assert sorted(mixed) == sorted(item for group in groups for item in group)
    for end in range(1, len(mixed) + 1):
        for group, size in enumerate(sizes):
            share = sum(item[0] == group for item in mixed[:end])
            assert abs(share - size * end / len(mixed)) <= len(sizes)


def test_self_starts_conversations_and_texts_and_writes_to_the_full_length() -> None:
    seen: list[Sequence[Sequence[int]]] = []

    def generate(starts: Sequence[Sequence[int]], length: int, seed: int) -> list[list[int]]:
        seen.append(starts)
        session = FakeSession(num_slots=4, capacity=length, vocab_size=258)
        return sample_continuations(session, starts, length, seed)

    calibration = load_calibration_set(SELF, texts_of(), num_samples=10, length=64, seed=3, generate=generate)
    starts = {byte_level_hf().decode(list(ids), skip_special_tokens=False) for ids in seen[0]}
    assert starts == {f"{BOS}user\n", BOS}
    assert [len(ids) for ids in calibration.sequences] == [64] * 10
    assert len({tuple(ids) for ids in calibration.sequences}) == 10
    assert 257 in {token_id for ids in calibration.sequences for token_id in ids}, "an end of text is gone past"
    again = load_calibration_set(SELF, texts_of(), num_samples=10, length=64, seed=3, generate=generate)
    assert again == calibration


def test_the_flags_are_refused_where_they_change_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert calibration_options("fp32", None, None, None) == CalibrationOptions()
    assert calibration_options("w8a8", None, None, None).num_samples == INT8_NUM_SAMPLES
    assert calibration_options("w4a16", None, None, None) == CalibrationOptions()
    assert calibration_options("w8a8", "a.txt", 7, None) == CalibrationOptions(source="a.txt", num_samples=7)
    assert main(["export", "nothing", "--precision", "fp32", "--calibration-text", "a.txt"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("headrace export: calibration flags have no effect on fp32")
    assert message.count("\n") == 1
