"""What workers tell is what the processor makes in one go."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from keye_jax.engine.media import Broken, Finished, MediaWorkers, Pixels, Planned
from keye_jax.errors import UserError
from keye_jax.testing import write_picture
from tests.keye_jax.engine.media.conftest import Told, follow, image, text, user, video

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    write_picture(path)
    return path


def assert_equal(told, inputs):
    """What workers told is what the processor made."""
    assert told.broken is None, told.broken
    for name in ("input_ids", "positions", "image_grids", "video_grids"):
        np.testing.assert_array_equal(getattr(told.prompt, name), getattr(inputs, name))
    assert told.prompt.position_delta == inputs.position_delta
    assert told.prompt.prompt_opens_thinking == inputs.prompt_opens_thinking
    np.testing.assert_array_equal(told.all_patches("image"), inputs.image_patches)
    np.testing.assert_array_equal(told.all_patches("video"), inputs.video_patches)
    assert len(told.prompt.frame_times) == len(inputs.frame_times)
    for got, expected in zip(told.prompt.frame_times, inputs.frame_times, strict=True):
        np.testing.assert_array_equal(got, expected)
    for got, expected in zip(told.decoded.undecodable_times, inputs.undecodable_times, strict=True):
        np.testing.assert_array_equal(got, expected)
    assert set(told.decoded.warnings) == set(inputs.warnings)


def requests(clip, picture):
    return {
        "text": user(text("What is a ball?")),
        "picture": user(image(picture), text("What is it?")),
        "video": user(video(clip), text("What happens?")),
        "mixed": user(
            text("One "), video(clip, fps=4), image(picture, max_pixels=28 * 28 * 8), text(" two "), image(picture),
            video(clip, num_frames=3),
        ),
        "frames": user({"type": "video", "video": [str(picture)] * 3, "sample_fps": 1}),
    }  # fmt: skip


def test_the_same_as_the_processor(workers, processor, clip, picture):
    asked = requests(clip, picture)
    for name, messages in asked.items():
        workers.submit(name, messages)
    told = follow(workers, asked)
    for name, messages in asked.items():
        assert_equal(told[name], processor.process(processor.plan(messages)))
    prompt = told["mixed"].prompt
    assert [medium.kind for medium in prompt.media] == ["video", "image", "image", "video"]
    assert prompt.text_tokens + prompt.image_tokens + prompt.video_tokens == len(prompt.input_ids)
    assert prompt.image_tokens == sum(medium.pads for medium in prompt.media if medium.kind == "image")
    assert not told["text"].pieces


def test_arrays_and_images_and_plans_of_the_caller(workers, processor, clips, clip, picture):
    frames = np.stack([clips.picture(index) for index in range(6)])
    with Image.open(picture) as opened:
        opened.load()
    asked = {
        "array": user({"type": "video", "video": frames, "sample_fps": 2}, text("?")),
        "image": user({"type": "image", "image": opened}, text("?")),
        "list": user({"type": "video", "video": list(frames)}),
    }
    for name, messages in asked.items():
        workers.submit(name, messages)
    workers.submit("plan", plan=processor.plan(requests(clip, picture)["mixed"]))
    told = follow(workers, [*asked, "plan"])
    for name, messages in asked.items():
        assert_equal(told[name], processor.process(processor.plan(messages)))
    assert_equal(told["plan"], processor.process(processor.plan(requests(clip, picture)["mixed"])))


def test_options_of_the_request(workers, processor, clip):
    options = {"mm_processor_kwargs": {"fps": 1}, "chat_template_kwargs": {"enable_thinking": False}}
    workers.submit("a", user(video(clip)), options)
    assert_equal(follow(workers, ["a"])["a"], processor.process(processor.plan(user(video(clip)), **options)))


def test_pieces_are_whole_frames_in_order(workers, clip):
    workers.submit("a", user(video(clip, fps=10), video(clip, fps=2)))
    told = follow(workers, ["a"])["a"]
    first, second = told.prompt.media
    most = 1024 // first.patches_per_frame
    assert 1 < most < first.frames
    assert told.pieces == [
        (number, start, min(most, medium.frames - start))
        for number, medium in enumerate((first, second))
        for start in range(0, medium.frames, most)
    ]


def test_frames_that_are_not_needed_are_left_out(workers, processor, clip):
    for name, skip in (("some", {0: 3}), ("all", {0: 8, 1: 1})):
        workers.submit(name, user(video(clip), video(clip, num_frames=1)))
        told = follow(workers, [name], skip=skip)[name]
        frames = [told.pieces[0][1] if told.pieces else None, sum(count for _, _, count in told.pieces)]
        assert frames == ([3, 6] if name == "some" else [None, 0])
        assert told.decoded.undecodable_times[0].tolist() == []
    inputs = processor.process(processor.plan(user(video(clip))))
    workers.submit("some", user(video(clip)))
    told = follow(workers, ["some"], skip={0: 5})["some"]
    np.testing.assert_array_equal(told.all_patches("video"), inputs.video_patches[5 * len(inputs.video_patches) // 8 :])


def test_a_damaged_video_states_the_times_that_are_shown(workers, processor, clips, tmp_path):
    path = clips.write_damaged(tmp_path / "a.mp4", 1, 2)
    workers.submit("a", user(video(path)))
    told = follow(workers, ["a"])["a"]
    plan = processor.plan(user(video(path)))
    inputs = processor.process(plan)
    np.testing.assert_array_equal(told.all_patches("video"), inputs.video_patches)
    assert len(told.decoded.undecodable_times[0]) == 2
    np.testing.assert_array_equal(told.prompt.frame_times[0], plan.videos[0].times)
    np.testing.assert_array_equal(told.prompt.input_ids, processor.expand(plan).input_ids)
    assert (told.decoded.frame_times[0] != plan.videos[0].times).sum() == 2
    workers.submit("b", user(video(path)))
    again = follow(workers, ["b"], skip={0: 8}, shown=told.decoded.shown)["b"]
    assert not again.pieces
    for decoded in (told.decoded, again.decoded):
        np.testing.assert_array_equal(decoded.frame_times[0], inputs.frame_times[0])
        np.testing.assert_array_equal(decoded.undecodable_times[0], inputs.undecodable_times[0])
        assert decoded.warnings == inputs.warnings
        restated = told.prompt.restated(decoded.tokens)
        np.testing.assert_array_equal(restated.input_ids, inputs.input_ids)
        np.testing.assert_array_equal(restated.positions, inputs.positions)
        assert restated.text_tokens + restated.video_tokens == len(inputs.input_ids)


def test_memory_is_bounded_and_decoding_waits(processor, clips, tmp_path):
    """Nothing is decoded beyond the budget until pieces are released; then the rest comes."""
    path = clips.write(tmp_path / "a.mp4", 200)
    with MediaWorkers(processor, 1, 1 << 20, piece_patches=512) as workers:
        workers.submit("a", user(video(path, fps=10)))
        held: list[Pixels] = []
        told, begin = Told(), time.monotonic()
        last = begin + 30  # when something came last
        while time.monotonic() < last + 0.5:
            for event in workers.poll():
                if isinstance(event, Pixels):
                    held.append(event)
                    last = time.monotonic()
                else:
                    told.take(event)
                    workers.decode("a")
            time.sleep(0.01)
        [medium] = told.prompt.media
        assert 0 < sum(event.patches.nbytes for event in held) <= 1 << 20
        assert medium.frames * medium.frame_bytes > 3 << 20
        while not told.ended:
            assert time.monotonic() < begin + 60
            for event in held or workers.poll():
                told.take(event)
            held.clear()
            time.sleep(0.001)
        assert sum(frames for _, _, frames in told.pieces) == medium.frames
        assert workers.arena.peak <= 1 << 20
        assert workers.arena.used == 0


def test_memory_does_not_grow_with_the_length_of_a_video(processor, clips, tmp_path):
    short, long = (clips.write(tmp_path / f"{frames}.mp4", frames) for frames in (100, 3000))
    size, peaks = 0, []
    with MediaWorkers(processor, 1, 8 << 20) as workers:
        for path in (short, long):
            workers.submit("a", user(video(path, fps=10)))
            finished = False
            while not finished:
                for event in workers.poll():
                    assert not isinstance(event, Broken), event
                    finished = isinstance(event, Finished)
                    if isinstance(event, Planned):
                        size = event.prompt.media[0].frames * event.prompt.media[0].frame_bytes
                        workers.decode("a")
                    elif isinstance(event, Pixels):
                        event.release()
                time.sleep(0.001)
            peaks.append(max(peak_memory(pid) for pid in workers.worker_pids))
        assert workers.arena.peak <= 8 << 20
    assert size > 400 << 20
    assert peaks[1] - peaks[0] < 32 << 20


def peak_memory(pid):
    """The most memory that a process has had, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise LookupError(pid)


def test_one_request_does_not_keep_the_memory_of_another(processor, clips, tmp_path):
    path = clips.write(tmp_path / "a.mp4", 100)
    with MediaWorkers(processor, 2, 1 << 20, piece_patches=256) as workers:
        workers.submit("held", user(video(path, fps=10)))
        held, other = [], []
        begin = time.monotonic()
        while "finished" not in other:
            assert time.monotonic() < begin + 30
            for event in workers.poll():
                if isinstance(event, Pixels):
                    if event.job_id == "held":
                        if not held:
                            workers.submit("other", user(video(path, num_frames=8)))
                        held.append(event)
                    else:
                        other.append("piece")
                        event.release()
                elif hasattr(event, "prompt"):
                    workers.decode(event.job_id)
                else:
                    assert event.job_id == "other"
                    other.append("finished")
            time.sleep(0.001)
        workers.cancel("held")
        for event in held:
            event.release()


def test_a_picture_larger_than_the_budget(processor, picture):
    with MediaWorkers(processor, 1, 1 << 16) as workers:
        workers.submit("a", user(image(picture)))
        broken = follow(workers, ["a"])["a"].broken
        assert broken.kind == "too_large"
        assert broken.message.endswith("byte_budget is 65,536, and must be at least that")


def test_cancelled_requests_tell_nothing_more(workers, clips, clip, tmp_path):
    path = clips.write(tmp_path / "a.mp4", 400)
    for name in ("waits", "early", "late"):
        workers.submit(name, user(video(path, fps=10)))
    workers.submit("other", user(video(clip)))
    workers.cancel("early")
    told = follow(workers, ["waits", "late", "other"], until=lambda told: len(told["late"].pieces) > 1)
    workers.cancel("late")
    workers.cancel("waits")
    workers.cancel("unknown")
    seen = told["other"]
    if not seen.ended:
        begin = time.monotonic()
        while not seen.ended:
            assert time.monotonic() < begin + 30
            for event in workers.poll():
                assert event.job_id == "other"
                seen.take(event)
                if seen.prompt is not None and not seen.pieces and hasattr(event, "prompt"):
                    workers.decode("other")
            time.sleep(0.002)
    begin = time.monotonic()
    while workers.arena.used:
        assert time.monotonic() < begin + 5
        time.sleep(0.01)
    assert workers.poll() == []
    workers.submit("late", user(video(clip)))  # the name is free
    assert follow(workers, ["late"])["late"].decoded


def test_a_name_that_is_in_use(workers, clip):
    workers.submit("a", user(video(clip)))
    with pytest.raises(ValueError, match="job_id is 'a'; another request has this name"):
        workers.submit("a", user(video(clip)))
    follow(workers, ["a"])


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [("processes", -1, "not be negative"), ("byte_budget", 0, "be positive"), ("timeout", 0, "be positive")],
)
def test_numbers_that_are_not_allowed(processor, name, value, rule):
    numbers: dict[str, Any] = {name: value}
    with pytest.raises(UserError, match=f"{name} is {value}; it must {rule}"):
        MediaWorkers(processor, **numbers)


def test_without_worker_processes(processor, clip, picture):
    with MediaWorkers(processor, 0, hashes=False) as workers:
        workers.submit("a", requests(clip, picture)["mixed"])
        told = follow(workers, ["a"])["a"]
        assert not workers.worker_pids
        assert {medium.hash for medium in told.prompt.media} == {b""}
    assert_equal(told, processor.process(processor.plan(requests(clip, picture)["mixed"])))


def test_notify_and_no_processes_left(processor, clip):
    told = []
    workers = MediaWorkers(processor, 1, notify=lambda: told.append(1))
    workers.submit("a", user(video(clip)))
    follow(workers, ["a"])
    assert told
    pids = workers.worker_pids
    assert pids
    workers.close()
    workers.close()  # does nothing
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


PROGRAM = """
import sys
import keye_jax.engine.media
import keye_jax.engine.media.worker
print(*{"jax", "flax", "orbax"} & sys.modules.keys())
"""


def test_workers_need_no_jax():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not done.stdout.strip()
