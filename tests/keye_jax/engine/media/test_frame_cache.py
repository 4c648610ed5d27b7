"""Decoded frames on disk."""

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from keye_jax.engine.media import FrameCache, MediaWorkers
from keye_jax.errors import UserError
from tests.keye_jax.engine.media.conftest import follow, image, text, user, video

ROOT = Path(__file__).parents[4]
SHAPE = (4, 6, 3, 14, 14)
KEY = bytes(range(32))


def frames(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def writing(cache, key=KEY, shape=SHAPE):
    writer = cache.write(key, shape)
    assert writer is not None
    return writer


def reading(cache, key=KEY, shape=SHAPE):
    entry = cache.read(key, shape)
    assert entry is not None
    return entry


def write(cache, key=KEY, content=None, warnings=()):
    content = frames() if content is None else content
    with writing(cache, key, content.shape) as writer:
        for index, patches in enumerate(content):
            writer.add(10 * index, patches)
        writer.finish(warnings)


def entry_of(cache):
    (path,) = cache.directory.iterdir()
    return path


def size_of_one(tmp_path):
    write(FrameCache(tmp_path / "one", 1 << 20))
    return entry_of(FrameCache(tmp_path / "one", 1 << 20)).stat().st_size


def test_frames_are_read_back(tmp_path):
    cache = FrameCache(tmp_path / "cache", 1 << 20)
    assert cache.read(KEY, SHAPE) is None
    write(cache, warnings=["one"])
    with reading(cache) as entry:
        assert (entry.used, entry.warnings) == ([0, 10, 20, 30], ["one"])
        for index in (2, 0, 3, 1):
            np.testing.assert_array_equal(entry.frame(index), frames()[index])
    assert cache.read(bytes(32), SHAPE) is None


def test_an_entry_appears_only_when_it_is_whole(tmp_path):
    cache = FrameCache(tmp_path, 1 << 20)
    with writing(cache) as writer:
        writer.add(0, frames()[0])
        assert cache.read(KEY, SHAPE) is None
    assert not list(tmp_path.iterdir())


def test_what_was_read_least_recently_goes_first(tmp_path):
    size = size_of_one(tmp_path)
    cache = FrameCache(tmp_path / "cache", 3 * size + 100)
    keys = [bytes([number]) * 32 for number in range(4)]
    for number, key in enumerate(keys[:3]):
        write(cache, key)
        os.utime(cache.directory / f"{key.hex()}.frames", (number, number))
    with reading(cache, keys[0]):
        pass
    write(cache, keys[3])
    there = [key for key in keys if cache.read(key, SHAPE)]
    assert there == [keys[0], keys[2], keys[3]]


def test_an_entry_larger_than_the_cache_is_not_written(tmp_path):
    assert FrameCache(tmp_path, frames().nbytes - 1).write(KEY, SHAPE) is None
    assert not list(tmp_path.iterdir())


NO_LOCKS = """
import errno, fcntl, os
def no_locks(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
fcntl.flock = no_locks
"""


@pytest.mark.parametrize("locks", [True, False])
def test_unfinished_entries_of_dead_processes_are_removed(tmp_path, monkeypatch, locks):
    program = (
        "import os, sys; from pathlib import Path; from keye_jax.engine.media import FrameCache;"
        f"writer = FrameCache(Path(sys.argv[1]), 1 << 20).write({KEY!r}, {SHAPE!r}); os._exit(0)"
    )
    if not locks:
        program = NO_LOCKS + program
        monkeypatch.setattr(fcntl, "flock", fcntl.flock)  # to be put back afterwards
        exec(NO_LOCKS, {})
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=True)
    left = [".part"] if locks else [".holder", ".part"]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == left
    cache = FrameCache(tmp_path, 1 << 20)
    with writing(cache, bytes(32)) as alive:
        write(cache)
        assert sorted(path.suffix for path in tmp_path.iterdir()) == sorted([".frames", *left])
        alive.close()
    assert [path.suffix for path in tmp_path.iterdir()] == [".frames"]


@pytest.mark.parametrize("fault", ["cut", "longer", "tail", "json", "empty", "other shape"])
def test_damaged_entries_count_as_none(tmp_path, fault):
    cache = FrameCache(tmp_path, 1 << 20)
    write(cache)
    path = entry_of(cache)
    content = bytearray(path.read_bytes())
    if fault == "tail":
        content[-1] ^= 1
    elif fault == "json":
        content[-30] ^= 1
    changed = {"cut": content[:-1], "longer": content + b"1", "empty": b""}.get(fault, content)
    path.write_bytes(changed)
    assert cache.read(KEY, (2, *SHAPE[1:]) if fault == "other shape" else SHAPE) is None
    assert not path.exists()
    write(cache)
    assert cache.read(KEY, SHAPE)


def test_a_damaged_frame(tmp_path):
    cache = FrameCache(tmp_path, 1 << 20)
    write(cache)
    path = entry_of(cache)
    content = bytearray(path.read_bytes())
    content[2 * frames()[0].nbytes + 5] ^= 255
    path.write_bytes(content)
    with reading(cache) as entry:
        np.testing.assert_array_equal(entry.frame(1), frames()[1])
        assert entry.frame(2) is None
    assert not path.exists()


def test_a_full_disk_costs_only_the_entry(tmp_path):
    """/dev/full takes nothing."""
    cache = FrameCache(tmp_path, 1 << 30)
    writer = writing(cache)
    assert writer._file is not None
    os.dup2(os.open("/dev/full", os.O_WRONLY), writer._file.fileno())
    with writer:
        for patches in frames():
            writer.add(0, patches)
        writer.finish([])
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"frame_cache is .*; it must be a folder that can be written to"):
        FrameCache(tmp_path / "file" / "cache", 1)


WRITER = """
import sys
from pathlib import Path
import numpy as np
from keye_jax.engine.media import FrameCache

cache, seed = FrameCache(Path(sys.argv[1]), int(sys.argv[2])), int(sys.argv[3])
draws = np.random.default_rng(seed)
for _ in range(150):
    number = int(draws.integers(12))
    content = np.random.default_rng(number).integers(0, 256, (4, 6, 3, 14, 14), np.uint8)
    key = bytes([number]) * 32
    if (entry := cache.read(key, content.shape)) is not None:
        with entry:
            for index in range(4):
                assert (entry.frame(index) == content[index]).all()
        continue
    with cache.write(key, content.shape) as writer:
        for index in range(4):
            writer.add(index, content[index])
        writer.finish([])
"""


def test_two_processes_share_a_cache(tmp_path):
    size = size_of_one(tmp_path)
    folder = tmp_path / "cache"
    command = [sys.executable, "-c", WRITER, str(folder), str(6 * size)]
    running = [subprocess.Popen([*command, str(seed)], cwd=ROOT) for seed in (1, 2)]
    while any(process.poll() is None for process in running):
        with contextlib.suppress(FileNotFoundError):  # it was there when it was listed
            assert sum(path.stat().st_size for path in present(folder)) <= 8 * size  # two more are being written
        time.sleep(0.01)
    assert [process.returncode for process in running] == [0, 0]
    assert sum(path.stat().st_size for path in present(folder)) <= 7 * size
    assert {path.suffix for path in folder.iterdir()} == {".frames"}


def present(folder):
    return [path for path in folder.iterdir() if path.exists()] if folder.exists() else []


def test_workers_read_what_they_wrote(processor, clips, clip, tmp_path):
    damaged = clips.write_damaged(tmp_path / "a.mp4", 1, 2)
    cache = FrameCache(tmp_path / "cache", 1 << 26)
    messages = user(text("?"), video(clip), video(damaged))
    inputs = processor.process(processor.plan(messages))
    with MediaWorkers(processor, 1, 8 << 20, frame_cache=cache, piece_patches=1024) as workers:
        for name, cached in (("first", 0), ("second", 16)):
            workers.submit(name, messages)
            told = follow(workers, [name])[name]
            assert told.decoded.cached_frames == cached
            np.testing.assert_array_equal(told.all_patches("video"), inputs.video_patches)
            assert set(told.decoded.warnings) == set(inputs.warnings)
            np.testing.assert_array_equal(told.decoded.undecodable_times[1], inputs.undecodable_times[1])
        # Frames from the middle on; other options; a damaged entry.
        workers.submit("rest", messages)
        told = follow(workers, ["rest"], skip={0: 6, 1: 8})["rest"]
        assert told.decoded.cached_frames == 2
        workers.submit("other", user(video(clip, fps=1)))
        assert follow(workers, ["other"])["other"].decoded.cached_frames == 0
        for path in cache.directory.iterdir():
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 255
            path.write_bytes(content)
        workers.submit("damaged", messages)
        told = follow(workers, ["damaged"])["damaged"]
        assert 0 < told.decoded.cached_frames < 16
        np.testing.assert_array_equal(told.all_patches("video"), inputs.video_patches)


def test_a_cached_warning_names_the_medium_of_this_request(processor, tmp_path):
    from PIL import Image

    Image.fromarray(frames(shape=(200, 300, 3))).save(tmp_path / "a.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:20000])
    cache = FrameCache(tmp_path / "cache", 1 << 26)
    with MediaWorkers(processor, 1, 8 << 20, frame_cache=cache) as workers:
        for name, messages in (
            ("first", user(image(tmp_path / "cut.jpg"))),
            ("second", user(text("?"), image(tmp_path / "cut.jpg"))),
        ):
            workers.submit(name, messages)
            told = follow(workers, [name])[name]
            assert told.decoded.warnings == processor.process(processor.plan(messages)).warnings
            assert told.decoded.cached_frames == (name == "second")
