"""Keeps compiled programs on disk, so that a second start need not compile."""

import os

import jax

from terminator_jax.data.cache import user_cache


def enable() -> None:
    """Turns on JAX's compilation cache, in the user's cache directory.

    JAX's own settings come first: a directory that `JAX_COMPILATION_CACHE_DIR` or `jax.config`
    names stays, and so does `JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS`.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(user_cache() / "xla"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # The many small programs of the initial values too, which take seconds together.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
