import pytest

from keye_jax.config import KeyeConfig
from keye_jax.train.shapes.files import write_model_files
from keye_jax.train.shapes.scene import Object, Scene, Span, sampled_times


@pytest.fixture
def scene():
    """A square that turns from red to blue, a star that comes later, and a ring that is seen for two frames."""
    return Scene(
        rate=2.0,
        times=sampled_times(16, 2.0),
        objects=(
            Object("square", (Span(1, 4, "red"), Span(5, 9, "blue")), centre=(40.0, 84.0)),
            Object("star", (Span(4, 15, "green"),), centre=(84.0, 84.0)),
            Object("ring", (Span(12, 13, "yellow"),), centre=(128.0, 84.0)),
        ),
        word="moon",
        word_frames=(3, 8),
        clock=59.5625,
    )


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """The folder of the embedded model's files, without weights."""
    directory = tmp_path_factory.mktemp("embedded")
    write_model_files(directory)
    return directory


@pytest.fixture(scope="session")
def config(files):
    return KeyeConfig.from_file(files)
