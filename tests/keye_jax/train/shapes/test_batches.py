import dataclasses

import numpy as np
import pytest

from keye_jax.errors import UserError
from keye_jax.processor import Processor
from keye_jax.train.shapes.batches import Batches, BatchOptions
from keye_jax.train.shapes.questions import ask
from keye_jax.train.shapes.scene import HELD_OUT, RATES, SceneOptions, make_scene, sampled_times
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
    with pytest.raises(UserError, match="others are for evaluation"):
        batches.batch(HELD_OUT, 0)


def test_questions_apart_are_each_as_if_alone(files, config):
    """What the tokens of a branch are, and where they stand, is what a conversation of its own has behind the video."""
    apart = Batches(files, config, dataclasses.replace(OPTIONS, apart=True))
    scene = make_scene(5, SCENES)
    asked = ask(scene, 3, 0)
    batch = apart.of([scene], [asked])
    assert batch.branch is not None and batch.branch[0].max() == 3
    begin = int(np.argmax(batch.branch[0] > 0))
    for number, question in enumerate(asked, 1):
        alone = apart.of([scene], [[question]])
        assert alone.branch is not None
        of_branch, own = batch.branch[0] == number, alone.branch[0] == 1
        for name in ("ids", "targets"):
            np.testing.assert_array_equal(getattr(batch, name)[0, of_branch], getattr(alone, name)[0, own])
        np.testing.assert_array_equal(batch.positions[:, 0, of_branch], alone.positions[:, 0, own])
        np.testing.assert_array_equal(batch.ids[0, :begin], alone.ids[0, :begin])


def test_parts_of_clips_have_their_times(files, config):
    options = SceneOptions(frames=1, part_of=24, needle=0.0)
    scenes = [make_scene(0, options, number=number) for number in range(40)]
    times = {scene.times[0] for scene in scenes}
    assert len(times) > 10 and times <= {time for rate in RATES for time in sampled_times(24, rate)}
    assert {len(each.spans) for scene in scenes for each in scene.objects} == {1}
    batch = Batches(files, config, BatchOptions(options, rows=2, tokens=256, apart=True)).batch(0, 0)
    assert (batch.vision_index.max(1) == [35, 71]).all() and (batch.targets >= 0).any()


def test_a_question_that_does_not_fit_is_left_out(files, config):
    room = Batches(files, config, dataclasses.replace(OPTIONS, tokens=576, turns=8)).batch(0, 0)
    assert (room.lengths <= 576).all()
    assert ((room.targets >= 0).sum(1) > 0).all()
    with pytest.raises(UserError, match="tokens is 512; it must be at least"):
        Batches(files, config, dataclasses.replace(OPTIONS, tokens=512))
