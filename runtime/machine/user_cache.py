"""Where the user's cache is: files that can be fetched or computed again."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """$HEADRACE_CACHE, or headrace under $XDG_CACHE_HOME, or under ~/.cache."""
    own = os.environ.get("HEADRACE_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headrace"
