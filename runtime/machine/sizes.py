"""Sizes in bytes: of numbers, of the KV cache of a token, and as text for people."""

from runtime.errors import InvalidSetting

_DTYPE_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int8": 1,
    "uint8": 1,
    "fp32": 4,
    "fp16": 2,
    "bf16": 2,
}


def kv_bytes_per_token(*, num_layers: int, num_kv_heads: int, head_dim: int, dtype: str) -> int:
    """Bytes of K and V that one token takes over all layers. InvalidSetting for an unknown dtype."""
    return 2 * num_layers * num_kv_heads * head_dim * item_bytes(dtype)


def item_bytes(dtype: str) -> int:
    """Bytes of one number. InvalidSetting for an unknown dtype."""
    if dtype not in _DTYPE_BYTES:
        raise InvalidSetting(
            f"KV cache dtype {dtype!r} is not one of {', '.join(_DTYPE_BYTES)}; export the model again"
        )
    return _DTYPE_BYTES[dtype]


def format_bytes(count: int) -> str:
    """A size for people, in powers of 1000: 11.3 GB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
