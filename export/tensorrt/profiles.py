"""Derives the optimization profiles from the limits that a server is started with.

    decode    every running row, one token each
    prefill   rows of a chunk of their prompts; logits of at most one row's tokens (scoring)
    verify    every running row, a few drafted tokens each, logits of all (speculative decoding)

TensorRT refuses a cache whose length is not fixed: the engine's slots have exactly `max_len` tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from runtime.artifact.manifest import ModelDims, StateTensor
from runtime.artifact.plan_files import PROFILES, Profile, Span
from runtime.errors import InvalidSetting
from runtime.settings import EngineSettings, check_at_least, setting

DEFAULT_MAX_LEN = 4096
"""Attention reads the whole slot at every step, so that a longer one costs speed whether it is used or not."""

_SETTINGS = EngineSettings()


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanLimits:
    """What an engine can run. Raises InvalidSetting for a value out of range."""

    max_batch: int = setting(_SETTINGS.max_batch, "most requests decoded together")
    prefill_chunk: int = setting(128, "most prompt tokens of a request in one run")
    max_len: int | None = setting(
        None, f"tokens of a KV slot, fixed in the engine; by default the artifact's limit, at most {DEFAULT_MAX_LEN}"
    )
    verify_tokens: int = setting(8, "most tokens of a request in one speculative verification")

    def __post_init__(self) -> None:
        check_at_least("max_batch", self.max_batch, 1)
        check_at_least("prefill_chunk", self.prefill_chunk, 1)
        check_at_least("max_len", self.max_len, 2)
        check_at_least("verify_tokens", self.verify_tokens, 1)


def derive_profiles(limits: PlanLimits, dims: ModelDims) -> tuple[Profile, ...]:
    """The three profiles, in the order of PROFILES; InvalidSetting for slots longer than the exported tables."""
    max_len = min(DEFAULT_MAX_LEN, dims.max_len) if limits.max_len is None else limits.max_len
    if max_len > dims.max_len:
        raise InvalidSetting(
            f"--max-len {max_len:,} is more than the {dims.max_len:,} tokens the artifact was exported for; "
            "export it again with a larger --max-len"
        )
    batch = limits.max_batch
    chunk, verified = min(limits.prefill_chunk, max_len), min(limits.verify_tokens, max_len)
    capacity = Span(max_len, max_len, max_len)
    rows = Span(1, batch, batch)
    sizes: Mapping[str, Profile] = {
        "decode": Profile(name="decode", rows=rows, tokens=Span(1, 1, 1), logits=rows, capacity=capacity),
        "prefill": Profile(
            name="prefill",
            rows=Span(1, 1, batch),
            tokens=Span(1, chunk, chunk),
            logits=Span(1, 1, max(chunk, batch)),
            capacity=capacity,
        ),
        "verify": Profile(
            name="verify",
            rows=rows,
            tokens=Span(1, verified, verified),
            logits=Span(1, batch * verified, batch * verified),
            capacity=capacity,
        ),
    }
    return tuple(sizes[name] for name in PROFILES)


def input_shape(
    name: str, dims: ModelDims, profile: Profile, end: int, states: Sequence[StateTensor] = ()
) -> tuple[int, ...]:
    """Shape of one graph input at one end of a profile: 0 smallest, 1 tuned for, 2 largest.

    states: those of the manifest
    """
    rows, tokens = profile.rows[end], profile.tokens[end]
    named = {
        "input_ids": (rows, tokens),
        "position_ids": (rows, tokens),
        "write_idx": (rows,),
        "query_len": (rows,),
        "logits_idx": (profile.logits[end],),
        **{state.past: (rows, *state.shape) for state in states},
    }
    return named.get(name, (rows, dims.num_kv_heads, profile.capacity[end], dims.head_dim))
