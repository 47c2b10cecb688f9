"""Compares a checkpoint's tensors with those that its config requires, before any weight is read.

Every tensor is used, or has no effect, or is named in an error. The graph and the numpy reference read the same config,
so without this check, a bias that config.json does not mention would be missing in both, and no gate would fail.
"""

import hashlib
import re

from export.checkpoint.config_fields import shown_names
from export.checkpoint.protocol import Checkpoint
from export.model.description import ModelConfig
from runtime.errors import InvalidCheckpoint, UnsupportedModel

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"

_BUFFER = re.compile(
    r"(.*\.)?(rotary_emb\.\w*(inv_freq|cos_cached|sin_cached)|(masked_bias|causal_mask|position_ids)|h\.\d+\.attn\.bias)"
)
"""Tables and masks that older releases of transformers saved with the weights. They are computed, not read."""

_NO_WEIGHTS = re.compile(r"BOOL|[UIC]\d+|F64|F[468]_\w+")
"""Types of safetensors that no weight has. GGUF's types are checked when the file is opened."""


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that a graph of this config reads."""
    tensors: dict[str, tuple[int, ...]] = {f"{config.embedding.name}.weight": (config.vocab_size, config.hidden_size)}
    if config.embedding.positions is not None:
        tensors[f"{config.embedding.positions}.weight"] = (config.embedding.num_positions, config.hidden_size)
    for norm in config.norms:
        if norm.has_weight:
            tensors[f"{norm.name}.weight"] = (norm.size,)
        if norm.has_bias:
            tensors[f"{norm.name}.bias"] = (norm.size,)
    for block in config.blocks:
        tensors |= block.vectors
        for mixer in block.mixers:
            tensors |= mixer.tensors
    for linear in config.linears:
        for part in linear.parts:
            tensors[f"{part.name}.weight"] = (part.num_rows, linear.num_inputs)
            if linear.has_bias:
                tensors[f"{part.name}.bias"] = (part.num_rows,)
    return tensors


def check_tensors(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """InvalidCheckpoint names tensors that are missing, of another shape, or not part of the model.

    An extra tensor is read only to find out whether it has an effect: a bias may be zero, as some quantization tools
    write it, and an LM head may equal the embedding that it is tied to.
    """
    expected = expected_tensors(config)
    found = checkpoint.tensors
    missing = [name for name in expected if name not in found]
    extra = [
        name
        for name in found
        if name not in expected and not _BUFFER.fullmatch(name) and not re.fullmatch(config.unused, name)
    ]
    unused = [name for name in extra if not _has_no_effect(checkpoint, name, expected, config)]
    if missing or unused:
        raise InvalidCheckpoint(_told(checkpoint, config, missing, unused))
    vectors = {name for block in config.blocks for name in block.vectors}
    for name, shape in expected.items():
        found_shape = _without_ones(found[name].shape) if name in vectors else found[name].shape
        if found_shape != shape:
            raise InvalidCheckpoint(
                f"{_named(checkpoint, name)} has the shape {list(found[name].shape)}, and config.json means "
                f"{list(shape)}{_shape_advice(name, found[name].shape, config)}"
            )
        if _NO_WEIGHTS.fullmatch(found[name].dtype):
            raise UnsupportedModel(
                f"{_named(checkpoint, name)} is stored as {found[name].dtype}; supported: F32, F16 and BF16, and "
                "what quantization tools write with their configuration"
            )


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without leading dimensions of 1, with which some families store a vector."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _named(checkpoint: Checkpoint, name: str) -> str:
    stored, file = checkpoint.stored_name(name), checkpoint.file_of(name)
    if stored != name:
        return f"{name} ({stored} in {file or 'the file'})"
    return name if file is None else f"{file}: {name}"


def _has_no_effect(
    checkpoint: Checkpoint, name: str, expected: dict[str, tuple[int, ...]], config: ModelConfig
) -> bool:
    embedding = f"{config.embedding.name}.weight"
    if name == LM_HEAD and config.tie_word_embeddings and embedding in checkpoint.tensors:
        return _is_tied(checkpoint, embedding)
    weight = f"{name.removesuffix('.bias')}.weight"
    info = checkpoint.tensors[name]
    is_bias = name.endswith(".bias") and weight in expected and info.shape == expected[weight][:1]
    return is_bias and not _NO_WEIGHTS.fullmatch(info.dtype) and not checkpoint.load(name).any()


def _is_tied(checkpoint: Checkpoint, embedding: str) -> bool:
    """Whether embedding and LM head are equal. If not, releases of transformers differ in which one they use."""
    is_equal = checkpoint.tensors[embedding].shape == checkpoint.tensors[LM_HEAD].shape
    # Compared by hash, so that only one of the two matrices is in memory.
    if is_equal and _hash_of(checkpoint, embedding) == _hash_of(checkpoint, LM_HEAD):
        return True
    raise InvalidCheckpoint(
        f"{LM_HEAD} differs from {embedding}, and config.json says tie_word_embeddings: set that to false if the LM "
        f"head is meant, as transformers 5 takes it, or remove {LM_HEAD} if it is left over, as transformers 4 does"
    )


def _hash_of(checkpoint: Checkpoint, name: str) -> bytes:
    return hashlib.blake2b(checkpoint.load(name).data).digest()


def _told(checkpoint: Checkpoint, config: ModelConfig, missing: list[str], unused: list[str]) -> str:
    """The message: missing and unused tensors, by their names in the files, and advice for the most likely cause."""
    gone, extra = (list(dict.fromkeys(map(checkpoint.stored_name, names))) for names in (missing, unused))
    parts = []
    if missing:
        parts.append(f"there is no tensor {shown_names(gone)}")
    if unused:
        parts.append(f"a {config.model_type} model with this config.json has no place for {shown_names(extra)}")
    return "; ".join((*parts, _advice(config, missing, unused)))


def _advice(config: ModelConfig, missing: list[str], unused: list[str]) -> str:
    """What to do about the most likely cause."""

    def has(names: list[str], *parts: str) -> bool:
        return any(part in name for name in names for part in parts)

    layers = [int(match[1]) for name in unused if (match := re.match(r"model\.layers\.(\d{1,9})\.", name))]
    causes = (
        (
            missing == [LM_HEAD],
            "set tie_word_embeddings to true in config.json if the embedding is the LM head; else the checkpoint lacks "
            "it",
        ),
        (has(unused, "lora_", "base_model.model."), "that is an adapter: merge it into its base model"),
        (
            has(unused, ".qweight", ".weight_packed", "_scale", ".absmax", ".qzeros"),
            "these are quantized weights that config.json's quantization_config does not describe",
        ),
        (
            has(missing, "model.embed_tokens") and has(unused, "embed_tokens", "wte"),
            "the names are those of another class of model: save it as a causal language model with transformers "
            "(AutoModelForCausalLM, then save_pretrained)",
        ),
        (
            any(layer >= config.num_layers for layer in layers),
            "num_hidden_layers is too small, or those layers are for something else than the next token",
        ),
        (
            has(unused, ".bias"),
            "these biases are not zero: set attention_bias or mlp_bias in config.json if the model is to use them",
        ),
        (has(unused, "_norm."), "the model is of another family than model_type says, or of one that is not supported"),
    )
    default = "config.json belongs to another model, or the checkpoint is incomplete"
    return next((text for applies, text in causes if applies), default)


def _shape_advice(name: str, shape: tuple[int, ...], config: ModelConfig) -> str:
    if name in (EMBEDDING, LM_HEAD) and shape[1:] == (config.hidden_size,):
        return f": {shape[0]} rows, and vocab_size is {config.vocab_size}; set vocab_size to the number of rows"
    return ""
