"""Memory for K and V that the operating system commits page by page, as tokens are written.

numpy's own large arrays ask for huge pages, which commit 2 MB of each head at its first token: 16 requests of 130
tokens on Qwen2.5-0.5B took 1,508 MB with them and 70 MB without, at the same speed. And arrays below glibc's mmap
threshold, which grows to 32 MB, come from its heap, which keeps what was once used when a model is replaced.
"""

import math
import mmap
from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike, NDArray


def lazy_zeros(shape: Sequence[int], dtype: DTypeLike) -> NDArray[np.generic]:
    """Zeros `shape`, of any dtype; all of its memory goes back to the operating system with the last view of it.

    Raises MemoryError if there are not even so many addresses.
    """
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{num_bytes:,} bytes cannot be mapped: {error}") from error
    return np.frombuffer(pages, dtype).reshape(shape)
