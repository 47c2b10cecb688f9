"""The table of supported architectures. A family's row is in a file of its own, or beside its relatives'."""

from collections.abc import Mapping
from types import MappingProxyType

from export.model.families.dense.cohere import COHERE
from export.model.families.dense.gemma import GEMMA2
from export.model.families.dense.gpt2 import GPT2
from export.model.families.dense.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from export.model.families.dense.phi3 import PHI3
from export.model.families.experts.mixtral import MIXTRAL
from export.model.families.row import Architecture

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "cohere": COHERE,
        "gemma2": GEMMA2,
        "gpt2": GPT2,
        "llama": LLAMA,
        "mistral": MISTRAL,
        "mixtral": MIXTRAL,
        "phi3": PHI3,
        "qwen2": QWEN2,
        "qwen3": QWEN3,
    }
)
"""By config.json's `model_type`."""
