"""The int8 KV cache of an export: which exports can have one, and the calibration that its scales come from.

w8a8's calibration has the statistics of K and V, w4a16's has the text for them. Other precisions read some text for K
and V alone. The statistics are saved in the artifact, so that another export can reuse them.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from export.checkpoint.protocol import Checkpoint
from export.model.description import ModelConfig, Site
from export.quantize.int8.saved import Calibration, load_calibration
from export.quantize.int8.smoothquant import SmoothedCheckpoint
from export.quantize.statistics.activation_stats import Statistics
from export.quantize.statistics.collect import collect_statistics
from export.quantize.statistics.kv_scales import KvScales, kv_scales
from runtime.artifact.manifest import dialect_name, kind_of
from runtime.errors import InvalidSetting

COMPUTE, INT8 = "compute", "int8"
KV_TYPES = (COMPUTE, INT8)
"""Values of --kv: the type that the precision computes in, or int8."""

_KINDS = ("k", "v")

NUM_SEQUENCES = 32
"""Default number of sequences when text is read for K and V alone: 16,000 tokens. Scales from four times as many differ
by a few per cent."""


def check_kv(kv: str, dialects: Sequence[str], precision: str) -> None:
    """InvalidSetting for a cache type that is unknown or that this export cannot have. Called before files are read."""
    if kv not in KV_TYPES:
        raise InvalidSetting(f"--kv {kv} is unknown; choose from {', '.join(KV_TYPES)}")
    if kv == COMPUTE:
        return
    if others := [dialect for dialect in dialects if kind_of(dialect) != "ort"]:
        raise InvalidSetting(
            f"--kv {INT8} is for ort and native graphs, not for {', '.join(map(dialect_name, others))}: TensorRT's "
            f"cache update takes fp32, fp16 and bf16; leave --kv out, or export the dialects separately"
        )
    if precision in ("fp16", "bf16"):
        raise InvalidSetting(
            f"--kv {INT8} needs float32 attention, and {precision} computes in half precision; choose another "
            f"--precision, like w8a16"
        )


def load_kv_calibration(path: Path, config: ModelConfig) -> Calibration:
    """Read an earlier calibration for K and V. InvalidSetting if it belongs to a model of another shape."""
    found = load_calibration(path, config.vocab_size)
    size = config.num_kv_heads * config.head_dim
    stored = _of_kv(found.statistics)
    layers = {site.layer for site in stored}
    if (layers and layers != {block.layer for block in config.attention_blocks}) or any(
        entry.absmax.shape[1] != size for entry in stored.values()
    ):
        raise InvalidSetting(f"--reuse-calibration {path} belongs to a model of another shape; calibrate this one")
    return found


def unrotated(found: Calibration) -> Calibration:
    """The calibration for the checkpoint without rotation: of the rotated checkpoint's, only the text is kept."""
    return replace(found, statistics={}, ranges={}, costs=[], is_rotated=False) if found.is_rotated else found


def has_kv_statistics(found: Calibration, config: ModelConfig) -> bool:
    """Whether a calibration covers K and V of every layer that has them."""
    return all(Site(block.layer, kv) in found.statistics for block in config.attention_blocks for kv in _KINDS)


def with_kv_statistics(
    checkpoint: Checkpoint, config: ModelConfig, found: Calibration, workdir: Path, *, limit: int | None = None
) -> Calibration:
    """Add statistics of K and V if there are none, from a run over at most `limit` of its sequences."""
    if has_kv_statistics(found, config):
        return found
    run = collect_statistics(checkpoint, config, found.sequences[:limit], workdir / "kv")
    return replace(found, statistics={**found.statistics, **_of_kv(run)})


def for_kv_alone(found: Calibration) -> Calibration:
    """Remove everything but K and V's statistics, for an export whose linear layers are not calibrated."""
    return replace(found, statistics=_of_kv(found.statistics), ranges={}, costs=[])


def _of_kv(statistics: Statistics) -> Statistics:
    return {site: entry for site, entry in statistics.items() if site.kind in _KINDS}


def scales_of(found: Calibration, checkpoint: Checkpoint, config: ModelConfig) -> dict[int, KvScales]:
    """The scales by layer; `checkpoint` is the one that the graph is written from, smoothed or not."""
    if not isinstance(checkpoint, SmoothedCheckpoint):
        return kv_scales(found.statistics, config)
    names = {block.layer: f"{block.attention.qkv.parts[-1].name}.weight" for block in config.attention_blocks}
    divisors = {layer: checkpoint.row_divisor(name) for layer, name in names.items()}
    return kv_scales(found.statistics, config, divisors)
