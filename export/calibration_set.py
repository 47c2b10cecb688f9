"""What a model is calibrated on: token ids from one of several sources, and where they came from.

    built-in         this project's own texts (calibration_data/), through the model's chat template
    self             text the model itself writes
    PATH             .jsonl, .txt or .parquet
    owner/name       a dataset on the Hugging Face hub

The same source, tokenizer and seed give the same ids on every machine. Knows nothing about statistics or graphs.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

import calibration_data
from export.calibration_encoder import RecordEncoder
from export.calibration_packing import interleave, pack
from runtime.errors import InvalidSetting

BUILT_IN = "built-in"


@dataclass(frozen=True)
class CalibrationSet:
    """Token ids of each sequence, at most `length` of them, and a JSON-able account of their origin."""

    sequences: list[list[int]]
    provenance: dict[str, Any]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.sequences))


def load_calibration_set(
    source: str,
    texts: Mapping[str, str],
    *,
    num_samples: int = 128,
    length: int = 512,
    seed: int = 0,
) -> CalibrationSet:
    """At most `num_samples` sequences of at most `length` tokens from `source`, chosen by `seed`.

    `texts` is `Checkpoint.text_files()`. InvalidCheckpoint if they hold no tokenizer, InvalidSetting for a source
    that cannot be used.
    """
    encoder = RecordEncoder(texts)
    if source != BUILT_IN:
        raise InvalidSetting(f"--calib {source!r} is not a source of calibration text; use {BUILT_IN}")
    records, digest = _built_in(seed)
    sequences = pack(map(encoder.encode, records), num_samples=num_samples, length=length)
    provenance = {
        "source": source,
        "sha256": digest,
        "num_sequences": len(sequences),
        "num_tokens": sum(map(len, sequences)),
        "num_samples": num_samples,
        "length": length,
        "seed": seed,
        "sequences_sha256": sequences_digest(sequences),
        **encoder.hashes,
    }
    return CalibrationSet(sequences, provenance)


def sequences_digest(sequences: list[list[int]]) -> str:
    """A hash of the ids and of where each sequence ends."""
    digest = hashlib.sha256()
    for ids in sequences:
        digest.update(np.array([len(ids), *ids], "<i8").tobytes())
    return digest.hexdigest()


def _built_in(seed: int) -> tuple[list[dict[str, Any]], str]:
    groups = [calibration_data.calibration_records(group) for group in calibration_data.CALIBRATION_GROUPS]
    digest = hashlib.sha256(json.dumps(groups, ensure_ascii=False).encode()).hexdigest()
    return interleave(groups, Random(seed)), digest  # noqa: S311  # not for secrets
