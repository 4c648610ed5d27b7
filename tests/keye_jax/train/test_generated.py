"""Batches of the generated world."""

import contextlib
import dataclasses
import json
import multiprocessing

import numpy as np
import pytest

from keye_jax import presets
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.train.config import LongConfig, StageConfig
from keye_jax.train.generated import GeneratedBatches, read_options
from keye_jax.train.shapes.files import write_model_files

CONFIG = KeyeConfig.from_file(presets.EMBEDDED)


def stage(**shapes) -> StageConfig:
    batch = {"tokens": 1024, "length": 512, "row": 512}
    data = {"source": "shapes", "workers": 0, "shapes": {"frames": 8, **shapes}}
    return StageConfig.from_dict({"train": ["projector"], "steps": 1, "batch": batch, "data": data})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedded")
    write_model_files(folder)
    return folder


def test_restored_batches_are_the_same(files):
    batches = GeneratedBatches(files, CONFIG, stage())
    first = next(batches)
    state = json.loads(json.dumps(batches.state()))
    second = next(batches)
    again = GeneratedBatches(files, CONFIG, stage())
    again.restore(state)
    found = next(again)
    assert (found.ids == second.ids).all() and not (found.ids == first.ids).all()
    np.testing.assert_array_equal(found.images[0][0], second.images[0][0])
    assert (found.count == (found.ids != CONFIG.extra["bos_token_id"]).sum(1)).all()


def test_evaluations_end_and_have_other_scenes(files):
    batches = GeneratedBatches(files, CONFIG, stage(), held_out=True, count=1)
    found = next(batches)
    assert not (found.ids == next(GeneratedBatches(files, CONFIG, stage())).ids).all()
    with pytest.raises(StopIteration):
        next(batches)


def test_long_clips_come_evenly(files):
    """Of 8 steps of two batches, a quarter has rows of another length, and both batches of a step the same."""
    config = stage()
    long = LongConfig(share=0.25, length=1024, shapes={"frames": 16, "needle": 1})
    data, batch = dataclasses.replace(config.data, long=long), dataclasses.replace(config.batch, accumulation=2)
    batches = GeneratedBatches(files, CONFIG, dataclasses.replace(config, data=data, batch=batch))
    shapes = [next(batches).ids.shape for _ in range(16)]
    assert shapes == ([(2, 512)] * 6 + [(1, 1024)] * 2) * 2


def test_processes_make_the_same_batches(files):
    """Also after one of them was ended from outside."""
    config = stage()
    alone = GeneratedBatches(files, CONFIG, config)
    expected = [next(alone).ids for _ in range(4)]
    helped = GeneratedBatches(
        files, CONFIG, dataclasses.replace(config, data=dataclasses.replace(config.data, workers=1))
    )
    with contextlib.closing(helped):
        found = [next(helped).ids for _ in range(2)]
        [worker] = multiprocessing.active_children()
        worker.kill()
        worker.join()
        found += [next(helped).ids for _ in range(2)]
        [another] = multiprocessing.active_children()
        assert another.pid != worker.pid
    np.testing.assert_array_equal(found, expected)
    assert not multiprocessing.active_children()


def test_settings():
    config = stage(objects=[1, 2], turns=3)
    options, long = read_options(config)
    assert long is None
    assert (options.scenes.objects, options.turns, options.rows, options.tokens) == ((1, 2), 3, 2, 512)
    for shapes, message in (
        ({"frame": 3}, "data.shapes.frame is not known"),
        ({"frames": "many"}, "a wrong type"),
        ({"apart": 1}, "true or false"),
    ):
        with pytest.raises(UserError, match=message):
            read_options(stage(**shapes))
