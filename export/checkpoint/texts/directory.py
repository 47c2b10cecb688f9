"""The text files of a Hugging Face directory: tokenizer, templates, generation settings.

A setting that may stand in several files is moved to one. A template inside tokenizer_config.json becomes
chat_template.jinja; several templates become one list there; tokens that only added_tokens.json or
tokenizer_config.json name are added to tokenizer.json. checks/texts.py checks whether the files fit the model.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.checkpoint.texts.added_tokens import TOKENIZER, TOKENIZER_CONFIG, named_tokens, with_named_tokens
from export.checkpoint.texts.chat_templates import DEFAULT, TEMPLATE, embedded_templates
from export.checkpoint.texts.reading import parse_json_object, read_text
from export.checkpoint.texts.special_tokens import special_tokens
from runtime.errors import InvalidCheckpoint

TEMPLATE_DIRECTORY = "additional_chat_templates"
TEXT_FILES = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    TEMPLATE,
    "generation_config.json",
)

_OTHER_TOKENIZERS = ("tokenizer.model", "spiece.model", "tekken.json", "vocab.json", "vocab.txt")


def read_directory_texts(path: Path) -> dict[str, str]:
    """The directory's text files by name, as export and the artifact use them.

    chat_template.jinja is there if the model has one template; if it has several (`tool_use` beside `default`), all
    are in `chat_template` of tokenizer_config.json, a list of named ones. Raises InvalidCheckpoint for a file that
    cannot be read, is empty, or has another shape than its kind.
    """
    files = {name: read_text(path / name) for name in TEXT_FILES if (path / name).exists()}
    objects = {
        name: parse_json_object(text, path / name)
        for name, text in files.items()
        if name.endswith(".json") and name != TOKENIZER  # which the library parses, in a tenth of the memory
    }
    if TOKENIZER in files:
        named = named_tokens(objects, special_tokens(objects))
        files[TOKENIZER] = with_named_tokens(files[TOKENIZER], named)
    else:
        _refuse_other_tokenizers(path)
    return _with_templates(path, files, objects.get(TOKENIZER_CONFIG, {}))


def _with_templates(path: Path, files: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, str]:
    """The files with all templates in one place."""
    embedded = embedded_templates(config)
    templates = _template_files(path, files) or embedded
    others = {name: text for name, text in files.items() if name != TEMPLATE}
    if templates.keys() - {DEFAULT}:
        listed = [{"name": name, "template": template} for name, template in templates.items()]
        return {**others, TOKENIZER_CONFIG: json.dumps({**config, "chat_template": listed}, indent=2) + "\n"}
    if embedded.keys() - {DEFAULT}:  # a file stands for all of them
        others[TOKENIZER_CONFIG] = json.dumps({**config, "chat_template": None}, indent=2) + "\n"
    return {**others, TEMPLATE: templates[DEFAULT]} if templates else others


def _template_files(path: Path, files: Mapping[str, str]) -> dict[str, str]:
    """Templates in files of their own, by name. They win over those in tokenizer_config.json, as in transformers."""
    found = {DEFAULT: files[TEMPLATE]} if TEMPLATE in files else {}
    directory = path / TEMPLATE_DIRECTORY
    if directory.is_dir():
        found |= {file.stem: read_text(file) for file in sorted(directory.glob("*.jinja"))}
    return found


def _refuse_other_tokenizers(path: Path) -> None:
    """InvalidCheckpoint if the directory has a tokenizer of another kind: the model could take no text."""
    for name in _OTHER_TOKENIZERS:
        if (path / name).exists():
            raise InvalidCheckpoint(
                f"{path} has {name}, and no tokenizer.json, the only kind of tokenizer that is read; make one with "
                "transformers (AutoTokenizer.from_pretrained, then save_pretrained)"
            )
