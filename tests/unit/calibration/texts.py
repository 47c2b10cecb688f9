"""The text files of a checkpoint with the byte tokenizer, and the texts of a calibration set."""

import json

from export.calibration.dataset import CalibrationSet
from tests.support.byte_tokenizer import CONFIG, byte_level_hf

TEMPLATE = "{% for m in messages %}<|begin|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"


def texts_of(template: str | None = TEMPLATE) -> dict[str, str]:
    texts = {"tokenizer.json": byte_level_hf().to_str(), "tokenizer_config.json": json.dumps(CONFIG)}
    return texts if template is None else texts | {"chat_template.jinja": template}


def decoded(calibration: CalibrationSet) -> list[str]:
    hf = byte_level_hf()
    return [hf.decode(ids, skip_special_tokens=False) for ids in calibration.sequences]
