"""What tests of several packages ask about."""

import pytest

from convert.synthetic import write_checkpoint
from keye_jax.config import KeyeConfig
from keye_jax.testing import write_clip, write_picture, write_processor_files


@pytest.fixture(scope="session")
def files(tmp_path_factory, golden):
    """A directory with a checkpoint of a tiny model, `clip.mp4` and `picture.png`."""
    directory = tmp_path_factory.mktemp("files")
    config = KeyeConfig.from_file(golden / "a")
    write_checkpoint(directory / "checkpoint", config, seed=0)
    write_processor_files(directory / "checkpoint", config)
    write_clip(directory / "clip.mp4", seconds=2, size=(160, 120))
    write_picture(directory / "picture.png", size=(84, 56))
    return directory
