"""Reads and checks a checkpoint's config, text files and tensors, before any weight is read."""

from dataclasses import replace

from export.checkpoint.protocol import Checkpoint
from export.model.checks.tensors import check_tensors
from export.model.checks.texts import check_texts
from export.model.description import ModelConfig
from export.model.families.architectures import as_described, parse_config


def read_model(checkpoint: Checkpoint) -> ModelConfig:
    """Read the config, and check that fields, text files and tensors fit each other.

    The end-of-text ids are those of config.json, generation_config.json and the tokenizer's `eos_token`, or the
    family's default if there are none. Raises InvalidCheckpoint or UnsupportedModel.
    """
    config = parse_config(checkpoint.config)
    ends = check_texts(checkpoint.text_files(), config)
    check_tensors(as_described(checkpoint), config)
    listed = config.eos_ids if "eos_token_id" in checkpoint.config or not ends else ()
    return replace(config, eos_ids=tuple(sorted({*listed, *ends})))
