"""Where compiled programs are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def enable_compilation_cache() -> None:
    """Keeps compiled programs between runs, in `JAX_COMPILATION_CACHE_DIR` or the user's cache directory."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "keye-jax" / "xla"))
