"""Plans the KV cache: its share of the free memory, and how many slots that is. Of models it knows only sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import InvalidSetting
from runtime.machine.available_memory import available_memory
from runtime.machine.sizes import format_bytes

FREE_FRACTION = 0.6
"""Share of the free memory for the cache: the rest is for activations, prepacked weights, page cache."""
PREFIX_CACHE_FRACTION = 0.1
"""Share for prompt beginnings kept for reuse."""

DEVICE_FREE_FRACTION = 0.8
"""The same of a GPU's memory once the model is loaded: the rest is for what libraries allocate as they run."""


def kv_budget(free: int, fraction: float) -> int:
    """Bytes for the KV cache, of `free` bytes once the weights are loaded; 0 if they do not fit."""
    return max(0, int(free * fraction))


def fitting_slots(*, max_batch: int, capacity: int, bytes_per_token: int, budget: int, state_bytes: int = 0) -> int:
    """How many slots of `capacity` tokens, and states, fit `budget` bytes, at most `max_batch`; 0 if none does."""
    return min(max_batch, budget // (capacity * bytes_per_token + state_bytes))


def plan_slots(*, max_batch: int, capacity: int, bytes_per_token: int, budget: int) -> int:
    """Slots of `capacity` tokens that fit `budget` bytes, at most `max_batch`.

    InvalidSetting with the sums if not even one fits.
    """
    num_slots = fitting_slots(max_batch=max_batch, capacity=capacity, bytes_per_token=bytes_per_token, budget=budget)
    if num_slots < 1:
        slot_bytes = capacity * bytes_per_token
        fitting = budget // bytes_per_token
        raise InvalidSetting(
            f"one KV slot of {capacity:,} tokens takes {format_bytes(slot_bytes)} ({bytes_per_token:,} bytes "
            f"a token) and only {format_bytes(budget)} may be used; "
            f"set --max-len {fitting:,} or less, or a larger --kv-memory"
        )
    return num_slots


def default_budget(*, weight_bytes: int = 0, fraction: float = FREE_FRACTION, root: Path = Path("/")) -> int:
    """Bytes the KV cache may take: by default 60 % of what is free once the weights are loaded.

    `root` is where /proc and /sys are found. InvalidSetting where the kernel does not say.
    """
    return kv_budget(available_memory(root) - weight_bytes, fraction)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryShare:
    """What one of several models in a process may take by default, without --kv-memory.

    host_kv: bytes of the machine's memory for its KV cache; counted once for all, since caches there fill slowly, and
        each model would count the same memory as free
    num_to_load: models that are still to take a GPU's memory, this one included. A cache there is allocated whole at
        once, so that what is free afterwards stays free
    weights_to_come: bytes that the weights of the models loaded after this one will take on it
    """

    host_kv: int
    num_to_load: int
    weights_to_come: int

    def of_device(self, free: int) -> int:
        """Bytes of a GPU's memory for the KV cache, of `free` once this model's weights are there."""
        return kv_budget(free - self.weights_to_come, DEVICE_FREE_FRACTION) // self.num_to_load


ALONE = MemoryShare(host_kv=0, num_to_load=1, weights_to_come=0)
"""The one model of its process, on a GPU."""


def shares_of(
    host_weights: Sequence[int], device_weights: Sequence[int], *, root: Path = Path("/")
) -> list[MemoryShare]:
    """A share for each of several models, loaded in this order, by the bytes of weights here and on a GPU."""
    count = len(host_weights)
    host_kv = max(1, default_budget(weight_bytes=sum(host_weights), root=root) // count)
    return [
        MemoryShare(host_kv=host_kv, num_to_load=count - idx, weights_to_come=sum(device_weights[idx + 1 :]))
        for idx in range(count)
    ]
