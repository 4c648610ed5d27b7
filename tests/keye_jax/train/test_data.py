"""Batches of a file: packing, order, position, and samples that cannot be read."""

import json
import os

import numpy as np
import pytest

from keye_jax import presets
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.processor import Processor
from keye_jax.testing import write_clip, write_picture, write_processor_files
from keye_jax.train.config import BatchConfig, StageConfig
from keye_jax.train.data import FileBatches, check_groups
from keye_jax.train.packing import Packer, whole_problem
from keye_jax.train.reading import Broken, Reader, Settings

CONFIG = KeyeConfig.from_file(presets.TINY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a clip, a picture, a damaged clip, and the processor's files."""
    folder = tmp_path_factory.mktemp("data")
    write_processor_files(folder, CONFIG)
    write_clip(folder / "clip.mp4", seconds=2, size=(160, 96))
    write_picture(folder / "picture.png", (112, 84))
    (folder / "damaged.mp4").write_bytes(b"not a video")
    return folder


@pytest.fixture(scope="module")
def processor(folder):
    return Processor.from_checkpoint(folder, CONFIG, defaults={"min_pixels": 784, "max_pixels": 24 * 784})


def sample(question: str, answer: str, **columns):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **columns}


def stage(**values) -> StageConfig:
    batch = {"tokens": 512, "length": 256, "row": 64, "images": {96: 8}} | values.pop("batch", {})
    data = {"workers": 0, "lookahead": 4} | values.pop("data", {})
    return StageConfig.from_dict({"train": ["*"], "steps": 1, "batch": batch, "data": data} | values)


@pytest.fixture
def batches(folder, processor, tmp_path):
    """Makes the batches of some samples."""
    opened = []

    def make(samples, config, **settings) -> FileBatches:
        path = folder / f"{tmp_path.name}.jsonl"
        path.write_text("".join(json.dumps(each) + "\n" for each in samples))
        opened.append(FileBatches(path, processor, CONFIG, config, **settings))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


TEXTS = [sample("Say it.", "word " * (3 + 5 * index)) for index in range(6)]


class TestBatches:
    def test_a_video_lies_where_its_pads_are(self, batches, processor, folder):
        made = sample("<video>What moves?", "A ball.", videos=["clip.mp4"])
        batch = next(batches([made], stage(), epochs=1))
        video = {"type": "video", "video": folder / "clip.mp4"}
        messages = [
            {"role": "user", "content": [video, {"type": "text", "text": "What moves?"}]},
            {"role": "assistant", "content": "A ball."},
        ]
        plan = processor.plan(messages, learn=[False, True])
        inputs = processor.process(plan)
        length = len(inputs.input_ids)
        assert batch.count.sum() == length and (batch.start[:3] == [0, 64, 128]).all()
        assert (batch.ids.reshape(-1)[:length] == inputs.input_ids).all()
        assert (batch.positions.reshape(3, -1)[:, :length] == inputs.positions).all()
        learnt = np.flatnonzero(processor.targets(plan, inputs.frame_times))
        expected = np.full(length, -1)
        expected[learnt - 1] = inputs.input_ids[learnt]
        assert (batch.targets.reshape(-1)[:length] == expected).all()
        # Each pad is a merged token of its frame, in order.
        [(patches, sizes)] = batch.images
        frames, (_, height, width) = len(inputs.video_grids), inputs.video_grids[0]
        assert (sizes[:frames] == [height, width]).all()
        shown = inputs.video_patches.reshape(frames, height * width, -1)
        assert (patches[:frames, : height * width] == shown).all()
        pads = np.flatnonzero(inputs.input_ids == CONFIG.video_token_id)
        places = batch.vision_index.reshape(-1)[pads].reshape(frames, -1)
        assert (places == 24 * np.arange(frames)[:, None] + np.arange(height * width // 4)).all()
        assert (batch.vision_index.reshape(-1) >= 0).sum() == len(pads)

    def test_images_come_before_frames(self, batches):
        made = sample("<video>and<image>?", "x", videos=["clip.mp4"], images=["picture.png"])
        batch = next(batches([made], stage(batch={"images": {48: 1, 96: 8}}), epochs=1))
        # The picture has 12 tokens, in the smaller places, which count first.
        assert set(batch.vision_index[batch.vision_index >= 0]) >= set(range(12))
        assert (batch.images[0][1][0] == [6, 8]).all()

    def test_samples_fill_rows_and_refer_to_their_own_pages(self, batches):
        batch = next(batches(TEXTS, stage(), epochs=1, shuffle=False))
        rows = np.flatnonzero(batch.count)
        for sequence in set(batch.sequence[rows]):
            own = rows[batch.sequence[rows] == sequence]
            assert (np.diff(own) == 1).all()
            assert (batch.start[own] == 64 * np.arange(len(own))).all()
            assert (batch.page_table[sequence, : len(own)] == own).all()

    def test_groups_count_their_own_pages(self, batches):
        batch = next(batches(TEXTS, stage(), epochs=1, shuffle=False, groups=2))
        assert (batch.count[:4] > 0).any() and (batch.count[4:] > 0).any()
        assert batch.page_table.shape[0] == 8
        later = [row for row in range(4, 8) if batch.count[row] and batch.start[row] == 0]
        assert [batch.sequence[row] for row in later] == list(range(len(later)))
        assert [batch.page_table[4 + batch.sequence[row], 0] for row in later] == [row - 4 for row in later]

    def test_each_sample_comes_once_an_epoch(self, batches):
        made = batches(TEXTS, stage(), epochs=2)
        counted = made.count()
        tokens = [int(batch.count.sum()) for batch in made]
        assert len(tokens) == counted and made.epoch() == 2
        once = [int(batch.count.sum()) for batch in batches(TEXTS, stage(), epochs=1, shuffle=False)]
        assert sum(tokens) == 2 * sum(once)

    def test_the_order_changes_with_the_epoch_and_the_seed(self, batches):
        def order(**values):
            made = batches(TEXTS, stage(batch={"tokens": 256, "length": 256}, **values))
            return [next(made).ids.tobytes() for _ in range(8)]

        assert order(seed=1) == order(seed=1)
        assert order(seed=1) != order(seed=2)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_restored_batches_are_the_same(self, batches, workers):
        config = stage(batch={"tokens": 256, "length": 256}, data={"workers": workers})
        made = batches(TEXTS, config)
        for _ in range(3):
            next(made)
        state = json.loads(json.dumps(made.state()))
        after = [next(made) for _ in range(4)]
        again = batches(TEXTS, config)
        again.restore(state)
        for expected in after:
            found = next(again)
            assert (found.ids == expected.ids).all() and (found.sequence == expected.sequence).all()
        assert again.state() == made.state()


class TestBroken:
    def test_a_broken_sample_is_named_and_skipped(self, batches):
        said = []
        samples = [TEXTS[0], sample("<video>?", "x", videos=["damaged.mp4"]), {"text": 1}]
        samples += [sample("Say it.", "word " * 300)]
        made = batches(samples, stage(), epochs=1, report=said.append)
        assert next(made).count.sum() > 0
        assert made.skipped == 3 and len(said) == 3
        assert any("line 2: " in each for each in said) and any("line 3: messages is missing" in each for each in said)
        assert any("batch.length is 256" in each for each in said)

    def test_or_refused(self, batches):
        made = batches([{"text": 1}, *TEXTS], stage(data={"broken": "refuse"}), shuffle=False)
        with pytest.raises(UserError, match=r"\.jsonl, line 1: messages is missing"):
            next(made)

    def test_a_file_without_any_good_sample_ends(self, batches):
        with pytest.raises(UserError, match="has no sample that can be read"):
            next(batches([{"text": 1}, {"text": 2}], stage()))


class TestPacker:
    CONFIG = BatchConfig(tokens=512, length=256, row=64, samples=4, images={16: 1, 64: 2})

    def test_the_freest_group_gets_the_next_sample(self):
        packer = Packer(self.CONFIG, groups=2)
        places = [packer.place(tokens, []) for tokens in (100, 200, 64)]
        assert [(place.group, place.row, place.rows) for place in places if place] == [(0, 0, 2), (1, 4, 4), (0, 2, 1)]
        assert packer.place(1, []) is None  # four samples are two in each group

    def test_images_take_the_smallest_place_that_is_free(self):
        packer = Packer(self.CONFIG)
        first = packer.place(10, [16, 10])
        assert first is not None and first.buckets == (0, 1)
        assert packer.place(10, [64, 64]) is None
        second = packer.place(10, [64])
        assert second is not None and second.buckets == (1,)

    def test_what_fits_into_no_batch(self):
        assert whole_problem(self.CONFIG, 1, 257, []) == "it has 257 tokens; batch.length is 256"
        assert "65 patches" in str(whole_problem(self.CONFIG, 1, 10, [65]))
        assert "more than a batch has room for" in str(whole_problem(self.CONFIG, 1, 10, [64] * 3))
        assert whole_problem(self.CONFIG, 2, 256, [64]) is None

    def test_devices_that_cannot_share_a_batch(self):
        config = stage()
        check_groups(config, 2, 8, 4, "stage")
        for numbers, message in (((1, 3, 1), "3 rows"), ((4, 4, 1), "4 groups"), ((1, 1, 3), "multiple of 3")):
            with pytest.raises(UserError, match=message):
                check_groups(config, *numbers, "stage")


class CrashesOn(Settings):
    """Ends its process on one line."""

    def plan(self, line: bytes):
        if line == b"crash":
            os._exit(9)
        return super().plan(line)


@pytest.mark.slow
def test_a_crash_costs_only_its_sample(processor, folder):
    reader = Reader(CrashesOn(processor, folder, {}, 2), 1)
    try:
        good = json.dumps(TEXTS[0]).encode()
        waiting = [reader.plan(line) for line in (good, b"crash", good)]
        found = [wait() for wait in waiting]
        assert found[1] == Broken("it crashes the process that decodes it")
        assert not isinstance(found[0], Broken) and not isinstance(found[2], Broken)
        assert not isinstance(reader.plan(good)(), Broken)
    finally:
        reader.close()
