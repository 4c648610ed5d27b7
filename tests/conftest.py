import os
from pathlib import Path

import pytest

# Layouts of up to eight devices are tested on virtual ones.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Compiled programs are kept beside the checkout, not in the user's cache.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / "build" / "compiled"))


def pytest_addoption(parser):
    parser.addoption("--interpret-all", action="store_true", help="interpret every test of what is for a TPU: minutes")


@pytest.fixture(scope="session")
def golden():
    """Directory of recorded reference data."""
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def quick_to_compile():
    """For many programs, each run once."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
