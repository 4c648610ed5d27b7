from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden():
    """Directory of recorded reference data."""
    return Path(__file__).parent / "golden"
