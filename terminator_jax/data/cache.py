"""Where files go that can be made again at any time."""

import os
from pathlib import Path


def user_cache() -> Path:
    """Returns this package's cache directory: `$XDG_CACHE_HOME` or `~/.cache`, then its name.

    It is not created here.

    Example:
        >>> user_cache().name
        'terminator_jax'
    """
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "terminator_jax"
