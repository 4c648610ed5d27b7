"""Where compiled programs are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def enable_compilation_cache() -> None:
    """Keeps compiled programs between runs, in `JAX_COMPILATION_CACHE_DIR` or the user's cache directory."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", cache_directory())


def cache_directory() -> str:
    """The directory of compiled programs, which may also be a bucket's URL. Raises RuntimeError without a home."""
    if given := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return given
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return str(home / "keye-jax" / "xla")
