"""Draws the cost of int8 for each linear layer in the terminal: a column for each decoder layer, a row for each kind.

    down      ▅▄▃▂▂▁▁▂▂▃▃█▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▂▆▆
              22         22           22      2: two int8 passes

Bars are logarithmic: one step is a factor of two. Reads the content of calibration.json; loads no model.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 64  # decoder layers in one block of rows


def sensitivity_lines(calibration: Mapping[str, Any], two_pass: Collection[str]) -> Iterator[str]:
    """Lines of the picture. `calibration`: calibration.json as read; `two_pass`: layers like `layers.11.down`."""
    layers = calibration["layers"]
    costs = {(entry["kind"], entry["layer"]): float(entry["kl"]) for entry in layers}
    kinds = list(dict.fromkeys(entry["kind"] for entry in layers))
    top = max(costs.values(), default=0.0)
    if top <= 0:
        return
    lowest = top / 2 ** (len(_BARS) - 1)
    yield f"cost of int8 by layer: {_BARS[-1]} = {top * 100:.3g} % perplexity, each step down half of it"
    deepest = max(layer for _, layer in costs)
    for start in range(0, deepest + 1, _WIDTH):
        stop = min(start + _WIDTH, deepest + 1)
        if deepest + 1 > _WIDTH:
            yield f"  layers {start} to {stop - 1}"
        for kind in kinds:
            row = [costs.get((kind, layer)) for layer in range(start, stop)]
            if any(cost is not None for cost in row):
                yield f"  {kind:10}" + "".join(_bar(cost, lowest) for cost in row).rstrip()
                marks = "".join("2" if f"layers.{layer}.{kind}" in two_pass else " " for layer in range(start, stop))
                if marks.strip():
                    yield f"  {'':10}{marks.rstrip()}   2: two int8 passes"
    worst = sorted(layers, key=lambda entry: -float(entry["kl"]))[:5]
    named = (f"layers.{entry['layer']}.{entry['kind']} {entry['kl'] * 100:.2g} %" for entry in worst)
    yield f"  {'worst':10}" + ", ".join(named)


def _bar(cost: float | None, lowest: float) -> str:
    if cost is None:
        return " "
    step = 0 if cost <= lowest else int(math.log2(cost / lowest) + 0.5)
    return _BARS[min(step, len(_BARS) - 1)]
