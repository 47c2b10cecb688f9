"""Evaluation text does not occur in calibration text, and the check finds text that was planted there."""

from hypothesis import given
from hypothesis import strategies as st

import calibration_data
from export.calibration.overlap import RUN_WORDS, Overlap, overlaps

WORDS = st.lists(
    st.sampled_from(["the", "mill", "stood", "where", "valley", "narrows", "and", "stream", "that", "drove", "it"]),
    max_size=60,
)


def built_in_texts() -> list[str]:
    return [
        record.get("text") or "\n".join(message["content"] for message in record["messages"])
        for group in calibration_data.CALIBRATION_GROUPS
        for record in calibration_data.calibration_records(group)
    ]


def test_the_built_in_texts_share_nothing_with_the_evaluation_texts() -> None:
    found = overlaps(built_in_texts(), calibration_data.evaluation_texts())
    assert set(found) == {"prose", "manual", "prompts"}
    assert found["prose"].num_runs > 800
    assert found["manual"].num_runs > 800
    assert {overlap.num_shared for overlap in found.values()} == {0}


def test_the_two_evaluation_texts_share_nothing_either() -> None:
    texts = calibration_data.evaluation_texts()
    assert overlaps([texts["prose"]], {"manual": texts["manual"]})["manual"].num_shared == 0


def test_a_borrowed_passage_is_found_whatever_its_case_and_punctuation() -> None:
    text = calibration_data.verification_text("manual")
    passage = text[text.index("The program never") : text.index("A request that arrives")]
    num_words = len(passage.split())
    found = overlaps(["Something else.", f"Quoted: {passage.upper().replace(',', ' --')}"], {"manual": text})
    assert found["manual"].num_shared == num_words - RUN_WORDS + 1
    assert 0 < found["manual"].share < 0.1


@given(WORDS, WORDS)
def test_against_a_plain_count(left: list[str], right: list[str]) -> None:
    def runs(words: list[str]) -> set[str]:
        return {" ".join(words[at : at + RUN_WORDS]) for at in range(len(words)) if at + RUN_WORDS <= len(words)}

    expected = Overlap(len(runs(left) & runs(right)), len(runs(right)))
    assert overlaps([" ".join(left)], {"text": ", ".join(right)}) == {"text": expected}


def test_a_text_shorter_than_a_run_has_no_share() -> None:
    assert overlaps(["a b c"], {"short": "a b c"})["short"] == Overlap(0, 0)
    assert Overlap(0, 0).share == 0.0
