"""Texts written for this project: what exported models are verified on."""

import json
from importlib import resources


def verification_text() -> str:
    """Plain prose, dialogue, code and figures, about 1,500 tokens."""
    return (resources.files(__name__) / "verify.txt").read_text(encoding="utf-8")


def verification_prompts() -> list[str]:
    """Twenty short prompts for greedy generation."""
    lines = (resources.files(__name__) / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]
