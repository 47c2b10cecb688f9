"""Reads calibration text from one of four sources, as token ids with a record of their origin.

    built-in         this project's own texts (calibration_data/), through the model's chat template
    self             text sampled from the model itself
    PATH             .jsonl, .txt or .parquet
    owner/name       a dataset on the Hugging Face hub, see hub_dataset.py

The same source, tokenizer and seed give the same ids on every machine (`self`: on machines with the same arithmetic).
Knows nothing about statistics or graphs.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np

import calibration_data
from export.calibration.encoder import RecordEncoder
from export.calibration.overlap import RUN_WORDS, overlaps
from export.calibration.packing import Sample, interleave, pack
from export.calibration.records import FLAG, Record, read_records
from runtime.errors import InvalidSetting

BUILT_IN = "built-in"
SELF = "self"
DEFAULT_NUM_SAMPLES = 128
DEFAULT_LENGTH = 512
INT8_NUM_SAMPLES = 32
"""Default of w8a8, whose statistics take all of the text. In one run each on SmolLM2-135M, the receipt's KL was 0.0047
with 128 sequences and 0.0044 with 32; the pass that collects statistics takes time in proportion."""

CALIBRATED = ("w8a8", "w4a16", "auto")
"""The precisions that need calibration text."""

MIN_LENGTH = 16
"""Shorter sequences are mostly first tokens, whose activations are not typical."""

MIN_TOKENS = 2_048
"""With fewer tokens, rarely active channels get no range. Refused, unless the user asked for less than twice this."""

# Enough text for twice the tokens wanted: English has about 4 characters a token, most other languages fewer.
_CHARS_PER_TOKEN = 8
# One record may fill a sequence but not a whole set.
_PIECE_SEQUENCES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions:
    """The user's choice of calibration text: its source, and how many sequences of how many tokens.

    length: None is DEFAULT_LENGTH, or the model's longest sequence if that is shorter
    """

    source: str = BUILT_IN
    num_samples: int = DEFAULT_NUM_SAMPLES
    length: int | None = None

    def length_within(self, max_len: int) -> int:
        """Tokens of a sequence. The default is cut to `max_len`; a length that the user gave is not."""
        return min(DEFAULT_LENGTH, max_len) if self.length is None else self.length


def calibration_options(
    precision: str, source: str | None, num_samples: int | None, length: int | None, *, for_kv: int | None = None
) -> CalibrationOptions:
    """Options from the command line; None is a flag that was not given. InvalidSetting for a flag without effect.

    for_kv: default number of sequences where only an int8 KV cache is calibrated; None without such a cache
    """
    given = {"source": source, "num_samples": num_samples, "length": length}
    given = {name: value for name, value in given.items() if value is not None}
    if precision == "w8a8":
        given = {"num_samples": INT8_NUM_SAMPLES, **given}
    elif precision not in CALIBRATED and for_kv is not None:
        given = {"num_samples": for_kv, **given}
    elif given and precision not in CALIBRATED:
        raise InvalidSetting(
            f"calibration flags have no effect on {precision}, which is not calibrated; leave out --calibration-*, or "
            f"choose --precision {' or '.join(CALIBRATED)}, or --kv int8"
        )
    return CalibrationOptions(**given)  # type: ignore[arg-type]  # one dict of two types


Generate = Callable[[Sequence[Sequence[int]], int, int], list[list[int]]]
"""(starts, length, seed) -> each start continued at temperature 1 to `length` ids, the start included."""


@dataclass(frozen=True)
class CalibrationSet:
    """Token ids of each sequence, and a JSON-able record of their origin."""

    sequences: list[list[int]]
    provenance: dict[str, Any]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.sequences))


class _Source(NamedTuple):
    """Records in the order of their use, and their entries in the provenance."""

    records: Sequence[Record]
    account: dict[str, Any]


def load_calibration_set(
    source: str,
    texts: Mapping[str, str],
    *,
    num_samples: int = DEFAULT_NUM_SAMPLES,
    length: int = DEFAULT_LENGTH,
    seed: int = 0,
    max_len: int | None = None,
    generate: Generate | None = None,
) -> CalibrationSet:
    """At most `num_samples` sequences of at most `length` tokens from `source`, chosen by `seed`.

    `texts` is `Checkpoint.text_files()`, `max_len` the model's longest sequence, `generate` what `self` samples with.
    Memory does not grow with the size of a file. A file that shares runs of words with the evaluation texts is used,
    with a warning on standard error. InvalidCheckpoint if `texts` hold no tokenizer; InvalidSetting for a source that
    does not exist, cannot be read or has too little text, and for sizes that do not fit the model.
    """
    check_sizes(num_samples, length, max_len)
    encoder = RecordEncoder(texts)
    if source == SELF:
        sequences, account = _sampled_from_itself(encoder, num_samples, length, seed, generate)
        used = [encoder.tokenizer.decode(ids) for ids in sequences]
    else:
        found = _built_in(seed) if source == BUILT_IN else _from_files(source, num_samples, length, seed)
        sequences = pack(map(encoder.encode, found.records), num_samples=num_samples, length=length)
        account, used = found.account, [_text_of(record) for record in found.records]
    num_tokens = sum(map(len, sequences))
    if num_tokens < min(MIN_TOKENS, num_samples * length // 2):
        raise InvalidSetting(
            f"{FLAG} {source} gives {num_tokens:,} tokens, too few to calibrate on; give at least {MIN_TOKENS:,}, "
            f"better {num_samples * length:,}, or use {FLAG} {BUILT_IN}"
        )
    provenance = {
        # This goes into the artifact: a file's name, not its path.
        "source": Path(source).name if Path(source).expanduser().is_file() else source,
        **account,
        "num_sequences": len(sequences),
        "num_tokens": num_tokens,
        "num_samples": num_samples,
        "length": length,
        "seed": seed,
        "sequences_sha256": sequences_digest(sequences),
        **encoder.hashes,
        "evaluation_overlap": _checked_overlap(source, used),
    }
    return CalibrationSet(sequences, provenance)


def sequences_digest(sequences: Iterable[Sequence[int]]) -> str:
    """A hash of the ids and of where each sequence ends."""
    digest = hashlib.sha256()
    for ids in sequences:
        digest.update(np.array([len(ids), *ids], "<i8").tobytes())
    return digest.hexdigest()


def check_sizes(num_samples: int, length: int, max_len: int | None) -> None:
    """InvalidSetting for a set that is empty, too short to learn from, or longer than the model."""
    if num_samples < 1:
        raise InvalidSetting(f"--calibration-samples must be at least 1, got {num_samples}")
    if length < MIN_LENGTH:
        raise InvalidSetting(f"--calibration-length must be at least {MIN_LENGTH} tokens, got {length}")
    if max_len is not None and length > max_len:
        raise InvalidSetting(
            f"--calibration-length {length:,} is longer than the model's longest sequence, {max_len:,} tokens; "
            f"give at most {max_len:,}"
        )


def _built_in(seed: int) -> _Source:
    groups = {group: calibration_data.calibration_records(group) for group in calibration_data.CALIBRATION_GROUPS}
    digest = hashlib.sha256(json.dumps(groups, ensure_ascii=False).encode()).hexdigest()
    values = interleave(groups.values(), Random(seed))  # noqa: S311  # not for secrets
    account = {
        "sha256": digest,
        "num_records": len(values),
        "groups": {name: len(all_) for name, all_ in groups.items()},
    }
    return _Source([Record(value, "built-in") for value in values], account)


def _from_files(source: str, num_samples: int, length: int, seed: int) -> _Source:
    from export.calibration.hub_dataset import fetch_dataset, is_dataset_id

    path = Path(source).expanduser()
    if path.is_file():
        files, names, more = [path], [path.name], {}
    elif not path.exists() and is_dataset_id(source):
        fetched = fetch_dataset(source)
        files, names, more = fetched.files, fetched.names, {"commit": fetched.commit}
    else:
        what = "is a directory" if path.is_dir() else "does not exist"
        raise InvalidSetting(
            f"{FLAG} {source} {what}; give {BUILT_IN}, {SELF}, a .jsonl, .txt or .parquet file, "
            "or a dataset of the hub like owner/name"
        )
    rng = Random(seed)  # noqa: S311  # not for secrets
    sample = Sample(budget_chars=num_samples * length * _CHARS_PER_TOKEN, rng=rng)
    for file in files:
        sample.add(read_records(file, piece_chars=_PIECE_SEQUENCES * length * _CHARS_PER_TOKEN))
    hashes = {name: _sha256(file) for name, file in zip(names, files, strict=True)}
    records = sample.records()
    account = {"files": hashes, **more, "num_records": sample.num_seen, "num_sampled": len(records)}
    return _Source(records, account)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sampled_from_itself(
    encoder: RecordEncoder, num_samples: int, length: int, seed: int, generate: Generate | None
) -> tuple[list[list[int]], dict[str, Any]]:
    """Half of the sequences begin as a conversation, half as a text (after LLM-QAT, arXiv:2305.17888)."""
    if generate is None:
        raise InvalidSetting(f"{FLAG} {SELF} needs the model to write text, which this step cannot; use {BUILT_IN}")
    starts = encoder.starts(length // 2)
    chosen = [starts[number % len(starts)] for number in range(num_samples)]
    return generate(chosen, length, seed), {"num_records": num_samples, "starts": len(starts), "temperature": 1.0}


def _text_of(record: Record) -> str:
    if "text" in record.value:
        return str(record.value["text"])
    return "\n".join(message["content"] for message in record.value["messages"])


def _checked_overlap(source: str, texts: Iterable[str]) -> dict[str, dict[str, int]]:
    """How much of the evaluation texts the calibration text contains; warns if it contains any."""
    found = overlaps(texts, calibration_data.evaluation_texts())
    for name, overlap in found.items():
        if overlap.num_shared:
            sys.stderr.write(
                f"warning: {source} holds {overlap.num_shared:,} of the {overlap.num_runs:,} runs of {RUN_WORDS} words "
                f"of the evaluation text {name!r} ({overlap.share:.1%}): figures on that text will look too good\n"
            )
    return {name: {"shared": overlap.num_shared, "runs": overlap.num_runs} for name, overlap in found.items()}
