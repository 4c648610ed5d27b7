import dataclasses

import numpy as np
import pytest

from keye_jax.errors import UserError
from keye_jax.processor import Processor
from keye_jax.train.shapes.batches import Batches, BatchOptions
from keye_jax.train.shapes.questions import ask
from keye_jax.train.shapes.scene import RATES, SceneOptions, make_scene
from keye_jax.train.shapes.video import clip_pixels, write_video

SCENES = SceneOptions(frames=12)
OPTIONS = BatchOptions(SCENES, rows=3, tokens=704, turns=4)


@pytest.fixture(scope="module")
def batches(files, config):
    return Batches(files, config, OPTIONS)


@pytest.mark.parametrize("rate", RATES)
def test_a_row_is_what_the_processor_makes_of_the_file(batches, files, config, tmp_path, rate):
    scene = make_scene(5, dataclasses.replace(SCENES, rate=rate))
    asked = ask(scene, 3, 0)
    batch = batches.of([make_scene(6, SCENES), scene], [asked, asked])
    write_video(tmp_path / "clip.mp4", scene)
    processor = Processor.from_checkpoint(files, config)
    messages, length, answer, video = [], 0, np.empty(0), np.empty(0)
    for number, question in enumerate(asked):
        text = {"type": "text", "text": question.text}
        clip = [{"type": "video", "video": str(tmp_path / "clip.mp4")}] if number == 0 else []
        messages.append({"role": "user", "content": [*clip, text]})
        with processor.plan(messages) as plan:
            inputs = processor.process(plan)
        assert not inputs.warnings
        length, video = len(inputs.input_ids), inputs.video_patches
        np.testing.assert_array_equal(batch.ids[1, :length], inputs.input_ids)
        np.testing.assert_array_equal(batch.positions[:, 1, :length], inputs.positions)
        assert (batch.positions[:, 1, length] == length + inputs.position_delta).all()
        # From the end of a prompt on, the targets are its answer and the end of the turn.
        answer = batch.targets[1, length - 1 :]
        answer = answer[: np.argmax(answer == -1)]
        assert processor.detokenize(answer, skip_special_tokens=False) == question.answer + "<|im_end|>"
        np.testing.assert_array_equal(batch.ids[1, length : length + len(answer)], answer)
        messages.append({"role": "assistant", "content": question.answer})
    assert batch.lengths[1] == length + len(answer)
    assert (batch.targets[1] >= 0).sum() == sum(
        len(processor._tokenizer.encode_text(each.answer)) + 1 for each in asked
    )

    pads = batch.ids[1] == config.video_token_id
    np.testing.assert_array_equal(pads, batch.vision_index[1] >= 0)
    np.testing.assert_array_equal(batch.vision_index[1][pads], 12 * 36 + np.arange(12 * 36))
    # The compressed file shows what is drawn.
    shown = video.reshape(12, 12, 12, 3, 14, 14).transpose(0, 1, 4, 2, 5, 3).reshape(12, 168, 168, 3)
    sampled = [round(time * rate) for time in scene.times]
    assert np.abs(shown.astype(int) - clip_pixels(scene)[sampled]).mean() < 6


def test_batches_follow_from_the_seed_and_do_not_share_scenes(batches):
    batch, again, after = batches.batch(0, 1), batches.batch(0, 1), batches.batch(0, 2)
    np.testing.assert_array_equal(batch.ids, again.ids)
    np.testing.assert_array_equal(batch.scenes.clock, again.scenes.clock)
    assert not set(batch.scenes.clock.tolist()) & set(after.scenes.clock.tolist())
    assert batch.ids.shape == batch.targets.shape == batch.vision_index.shape == (3, 704)
    assert batch.positions.shape == (3, 3, 704)


def test_a_question_that_does_not_fit_is_left_out(files, config):
    room = Batches(files, config, dataclasses.replace(OPTIONS, tokens=576, turns=8)).batch(0, 0)
    assert (room.lengths <= 576).all()
    assert ((room.targets >= 0).sum(1) > 0).all()
    with pytest.raises(UserError, match="tokens is 512; it must be at least"):
        Batches(files, config, dataclasses.replace(OPTIONS, tokens=512))
