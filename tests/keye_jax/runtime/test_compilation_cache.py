"""Where compiled programs are kept: nowhere for a user without a home directory, and that is no mistake."""

import jax
import pytest

from convert import buckets
from keye_jax.runtime import compilation_cache


def test_a_user_without_a_home_or_a_name(monkeypatch):
    for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    # As in a container that runs with a number that nobody has given a name.
    monkeypatch.setattr("os.getuid", lambda: 123_456_789)
    before = jax.config.jax_compilation_cache_dir
    compilation_cache.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before
    with pytest.raises(RuntimeError):
        compilation_cache.cache_directory()
    assert buckets.cache_directory().name == "keye-jax-123456789"
