import json
import shutil

import pytest

from convert import convert
from convert.synthetic import write_checkpoint
from keye_jax.cli import app, run
from keye_jax.config import KeyeConfig
from keye_jax.testing import write_clip, write_picture, write_processor_files


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, golden):
    """A directory with a tiny random checkpoint of either kind, `hf` and `orbax`, `clip.mp4` and `picture.png`.

    It is in float32, whose rounding decides no choice of the tests' answers. Those have no end token.
    """
    directory = tmp_path_factory.mktemp("inputs")
    config = KeyeConfig.from_file(golden / "a")
    write_checkpoint(directory / "hf", config, seed=0, dtype="float32")
    write_processor_files(directory / "hf", config)
    generation = directory / "hf" / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"eos_token_id": []}))
    convert(directory / "hf", directory / "orbax")
    write_clip(directory / "clip.mp4", seconds=2, size=(160, 120))
    write_picture(directory / "picture.png", size=(84, 56))
    return directory


@pytest.fixture
def keye(capsys):
    """Runs `keye-jax` with arguments: exit code, stdout, stderr."""

    def call(*arguments):
        code = run(app, [str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def copy_of(tmp_path, inputs):
    """A copy of the safetensors checkpoint, for tests that damage it."""
    return shutil.copytree(inputs / "hf", tmp_path / "copy")
