"""The timing cache of `tensorrt`: measured kernel times on this GPU, so that the next build measures less.

TensorRT-RTX measures at run time and has no cache. A cache is of use only on its own GPU; one that does not fit is
replaced.
"""

import sys
from pathlib import Path
from typing import Any

from export.artifact.writer import file_entry
from export.storage.whole_file import write_whole
from runtime.artifact.manifest import FileEntry
from runtime.artifact.plan_files import PlanIdentity

SUFFIX = ".timings"


def timings_file(directory: Path, identity: PlanIdentity) -> Path:
    """The cache file of one library release and GPU."""
    return directory / f"{identity.target}-{'+'.join(identity.gpus)}-{identity.version}{SUFFIX}"


def attach_timings(config: Any, file: Path, listed: FileEntry | None) -> bool:
    """Give a builder config the cache of a file, or an empty one; False, with a message, if the file does not fit.

    A file is read only if it is the one that the manifest has `listed`.
    """
    is_known = listed is not None and file.is_file() and file_entry(file) == listed
    kept = file.read_bytes() if is_known else b""
    cache = config.create_timing_cache(kept)
    if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
        return True
    sys.stderr.write(f"{file} is of another GPU or release, or damaged: not used, and measured again\n")
    config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    return False


def keep_timings(config: Any, file: Path) -> None:
    """Write the kernel times that the build measured."""
    cache = config.get_timing_cache()
    if cache is not None:
        write_whole(file, bytes(cache.serialize()))
