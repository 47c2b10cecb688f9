"""How many bytes of weights an export has, from the model's dimensions and the scheme alone."""

from export.model.description import Linear, ModelConfig
from export.quantize.int4.model import keeps_8_bits
from export.schemes.registry import SCHEMES
from export.schemes.scheme import CalibrationNeed, Storage
from runtime.artifact.manifest import Estimate


def layer_bytes(config: ModelConfig, storage: Storage) -> int:
    """Of the linear layers of all blocks, scales included."""
    return int(sum(_bytes(config, storage, linear) for linear in config.linears if linear != config.head.linear))


def weight_bytes(config: ModelConfig, storage: Storage) -> int:
    """The same with embedding and LM head; norms and biases are some thousandths of it."""
    table = config.vocab_size * config.hidden_size
    embedding = table * storage.embedding.bytes_per_weight(config.hidden_size, storage.compute)
    head = 0.0 if config.tie_word_embeddings else _bytes(config, storage, config.head.linear)
    return int(layer_bytes(config, storage) + embedding + head)


def estimates_of(config: ModelConfig) -> dict[str, dict[str, Estimate]]:
    """Of every scheme, for the `ort` graph and for the standard ones ("trt"): what `headrace fit` compares."""
    found: dict[str, dict[str, Estimate]] = {"ort": {}, "trt": {}}
    for name, scheme in SCHEMES.items():
        # Calibrated int8 has an LM head of its own: a tied one cannot take the smoothing of its input.
        own = config.untied() if scheme.calibration is CalibrationNeed.INT8 else config
        for kind, storage in (("ort", scheme.ort), ("trt", scheme.standard)):
            if storage is not None:
                found[kind][name] = Estimate(weights=weight_bytes(own, storage), kv=storage.compute)
    return found


def _bytes(config: ModelConfig, storage: Storage, linear: Linear) -> float:
    n, k = linear.shape
    form = storage.form_of(linear.role)
    if storage.int4_blocks_of(linear.role) is not None and keeps_8_bits(config, linear):
        form = storage.eight_bit_blocks(k)
    return n * k * form.bytes_per_weight(k, storage.compute)
