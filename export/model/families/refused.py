"""Model types that people ask for and that have no row, with the reason."""

from collections.abc import Mapping
from types import MappingProxyType

_IMAGES = "it has images beside text; give a checkpoint of its text model alone"

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "apertus": "its activation, xIELU, has weights of its own in each layer",
        "codegen": "its matrix of queries, keys and values is in eight parts, by training device",
        "gemma3": _IMAGES,
        "gemma3n": _IMAGES,
        "gemma3n_text": "it has several residual streams (AltUp), embeddings for each layer and shared K and V",
        "gemma4": _IMAGES,
        "gemma4_text": "it has embeddings for each layer, shared K and V, and heads of two sizes",
        "llama4": _IMAGES,
        "llama4_text": "it has attention in chunks",
        "minicpm3": "it has latent attention with MiniCPM's multipliers",
        "ministral3": "it scales queries by their position",
        "mistral3": _IMAGES,
        "nanochat": "it turns the rotary embedding's pairs the other way, and has a norm behind the embedding",
        "persimmon": "it has layer norms over queries and keys with a matrix in which heads take turns",
    }
)
