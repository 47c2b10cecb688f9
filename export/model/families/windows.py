"""Reads from config.json which layers have a sliding window."""

from export.checkpoint.config_fields import shown
from export.model.families.config_values import flag, integer
from export.model.families.row import Defaults, Raw, Sizes
from runtime.errors import InvalidCheckpoint, UnsupportedModel


def windows(raw: Raw, sliding: str, sizes: Sizes, defaults: Defaults, *, pattern: int = 0) -> tuple[int | None, ...]:
    """The window of each layer, None for layers without one.

    sliding: the family's rule, which a `layer_types` list in the config overrides:
        always        every layer, if sliding_window is set
        uniform       the same, and layer_types must agree
        flagged       with use_sliding_window, from layer max_window_layers on
        patterned     all but every `pattern`-th layer; the field sliding_window_pattern overrides it
        never         no layer
    """
    num_layers = sizes.num_layers
    layer_types = raw.get("layer_types")
    kinds = ("full_attention", "sliding_attention")
    if layer_types is not None and not (
        isinstance(layer_types, list)
        and len(layer_types) == num_layers
        and all(isinstance(kind, str) and kind in kinds for kind in layer_types)
    ):
        raise UnsupportedModel(
            f"config.json: layer_types must name {' or '.join(kinds)} for each of the {num_layers} layers, got "
            f"{shown(layer_types)}"
        )
    is_on = flag(raw, "use_sliding_window", default=sliding in ("always", "uniform", "patterned"))
    window = _window(raw, sliding, defaults, is_on=is_on)
    if layer_types is not None:
        if window is None and "sliding_attention" in layer_types:
            raise InvalidCheckpoint(
                "config.json: layer_types has sliding_attention, and no window is switched on: sliding_window is "
                f"{shown(raw.get('sliding_window'))}, use_sliding_window {shown(raw.get('use_sliding_window'))}"
            )
        if sliding == "uniform" and window is not None and "full_attention" in layer_types:
            raise UnsupportedModel(
                f"config.json: layer_types {shown(layer_types)} is not supported for model_type "
                f"{raw['model_type']!r}, which has sliding_window in every layer"
            )
        return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    if sliding == "patterned":
        every = integer(raw, "sliding_window_pattern", pattern)
        return tuple(window if (layer + 1) % every else None for layer in range(num_layers))
    if sliding != "flagged":
        return (window,) * num_layers
    first = integer(raw, "max_window_layers", defaults.max_window_layers, minimum=0)
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _window(raw: Raw, sliding: str, defaults: Defaults, *, is_on: bool) -> int | None:
    """The window length; None if the window is switched off.

    UnsupportedModel for a setting that the family does not have (a window for Llama, a switch for Mistral), because
    transformers ignores it and other programs do not.
    """
    if raw.get("sliding_window", defaults.window) is None:
        return None
    window = integer(raw, "sliding_window", defaults.window or 0)
    if sliding == "flagged":
        return window if is_on else None
    if sliding in ("always", "uniform", "patterned") and not is_on:
        raise UnsupportedModel(
            f"config.json: use_sliding_window is false and sliding_window is {window}, which {raw['model_type']} would "
            "use all the same; set sliding_window to null if there is none"
        )
    if sliding == "never" and raw.get("use_sliding_window") is not False:
        raise UnsupportedModel(
            f"config.json: sliding_window = {window} is not supported for model_type {raw['model_type']!r}; supported: "
            "null"
        )
    return window if is_on else None
