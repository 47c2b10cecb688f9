"""The decoder's configuration, in one shape for every family and every kind of checkpoint.

`export/model/architectures.py` makes a `ModelConfig` from config.json; `export/checkpoint/gguf/file.py` makes a
config.json from GGUF metadata first. Nothing here reads files.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: base frequency, and how it is stretched beyond the trained length.

    kind: default | linear | llama3 | yarn. Only the fields of that kind are read.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_max_len: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Dimensions and switches of a decoder. Lengths in tokens, sizes in elements."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    """Per layer the window in tokens, the token itself included; None attends to everything."""
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
