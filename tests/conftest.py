import os
from pathlib import Path

import pytest

# Compiled programs are kept beside the checkout, not in the user's cache.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / "build" / "compiled"))


def pytest_addoption(parser):
    parser.addoption("--interpret-all", action="store_true", help="interpret every test of what is for a TPU: minutes")


@pytest.fixture(scope="session")
def golden():
    """Directory of recorded reference data."""
    return Path(__file__).parent / "golden"
