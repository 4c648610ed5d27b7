"""Names of media and of the beginnings of prompts."""

import hashlib
import os

import numpy as np
import pytest
from PIL import Image

from keye_jax.engine.media import EmbeddingCache, block_hashes
from keye_jax.engine.media.hashes import FileHashes, media_hash
from keye_jax.engine.media.work import describe
from tests.keye_jax.engine.media.conftest import image, text, user, video


@pytest.fixture
def hashes(processor):
    """The hashes of the media of messages."""

    def found(messages):
        return [medium.hash for medium in describe(processor, processor.plan(messages), FileHashes()).media]

    return found


def test_a_medium_is_named_by_content_and_options(hashes, clip, clips, tmp_path):
    copy = tmp_path / "b.mp4"
    copy.write_bytes(clip.read_bytes())
    other = clips.write(tmp_path / "c.mp4", 40, first=1)
    [first] = hashes(user(video(clip)))
    assert hashes(user(text("?"), video(copy), video(clip))) == [first, first]
    assert hashes(user({"type": "video", "video": clip.read_bytes()})) == [first]
    assert hashes(user(video(clip, fps=2))) == [first]  # the default
    different = [
        *hashes(user(video(other))),
        *hashes(user(video(clip, fps=4))),
        *hashes(user(video(clip, end=2))),
        *hashes(user(video(clip, max_pixels=28 * 28 * 64, min_pixels=28 * 28 * 4))),
    ]
    assert len({first, *different}) == 5
    assert all(len(digest) == 32 for digest in different)


def test_images_and_lists_of_frames(hashes, clips, tmp_path):
    pictures = [clips.picture(number) for number in range(3)]
    for number, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    names = [str(tmp_path / f"{number}.png") for number in range(3)]
    listed = hashes(user({"type": "video", "video": names}))
    assert listed == hashes(user({"type": "video", "video": names}))
    assert listed != hashes(user({"type": "video", "video": [names[1], names[0], names[2]]}))
    array = np.stack(pictures)
    assert hashes(user({"type": "video", "video": array})) == hashes(user({"type": "video", "video": array.copy()}))
    assert hashes(user({"type": "video", "video": array})) != hashes(user({"type": "video", "video": array[::-1]}))
    one = hashes(user({"type": "image", "image": Image.fromarray(pictures[1])}))
    assert one == hashes(user({"type": "image", "image": Image.fromarray(pictures[1])}))
    assert one != hashes(user({"type": "image", "image": Image.fromarray(pictures[2])}))
    turned = Image.fromarray(pictures[1])
    exif = turned.getexif()
    exif[0x112] = 3
    turned.info["exif"] = exif.tobytes()
    assert one != hashes(user({"type": "image", "image": turned}))
    assert hashes(user(image(names[0]))) != hashes(user(image(names[1])))


def test_the_versions_count(processor, clip, monkeypatch):
    plan = processor.plan(user(video(clip))).videos[0]
    before = media_hash(plan, 14, FileHashes())
    monkeypatch.setattr("keye_jax.engine.media.hashes.decoder_versions", lambda: "another")
    assert media_hash(plan, 14, FileHashes()) != before


def test_a_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    path, read = tmp_path / "a", []
    path.write_bytes(b"one")
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: read.append(1) or digest(file, name))
    files = FileHashes()
    for _ in range(2):  # just written, it may change without a new time
        assert files.of(path) == hashlib.sha256(b"one").digest()
    assert len(read) == 2
    os.utime(path, (1000, 1000))
    for _ in range(3):
        files.of(path)
    assert len(read) == 3
    path.write_bytes(b"two")
    assert files.of(path) == hashlib.sha256(b"two").digest()
    other = FileHashes()
    other.learn(files.known())
    os.utime(path, (1000, 1000))
    path.write_bytes(b"three")
    assert other.of(path) == hashlib.sha256(b"three").digest()


PAD = 7
A, B = bytes([1]) * 32, bytes([2]) * 32


def prompt(*runs):
    """Ids from runs: a number of pads, or a list of ids."""
    return np.concatenate([np.full(run, PAD) if isinstance(run, int) else np.array(run) for run in runs])


def test_blocks_are_chained(seed=0):
    ids = np.random.default_rng(seed).integers(100, 200, 2000)
    hashes = block_hashes(ids, [], [PAD])
    assert len(hashes) == 3
    assert block_hashes(ids[:1024], [], [PAD]) == hashes[:2]
    assert block_hashes(ids[:1023], [], [PAD]) == hashes[:1]
    for changed in (0, 600, 1999):
        other = ids.copy()
        other[changed] += 1
        equal = [a == b for a, b in zip(block_hashes(other, [], [PAD]), hashes, strict=True)]
        assert equal == [block < changed // 512 for block in range(3)]
    swapped = np.concatenate([ids[512:1024], ids[:512]])
    assert not set(block_hashes(swapped, [], [PAD])) & set(hashes)


def test_pads_count_by_their_medium_and_place():
    text_ids = list(range(100, 108))
    both = block_hashes(prompt(8, text_ids, 8), [(A, 8), (B, 8)], [PAD], 8)
    assert both != block_hashes(prompt(8, text_ids, 8), [(B, 8), (A, 8)], [PAD], 8)
    assert both[:2] == block_hashes(prompt(8, text_ids, 8), [(A, 8), (A, 8)], [PAD], 8)[:2]
    one = block_hashes(prompt(16), [(A, 16)], [PAD], 8)
    assert one[0] == both[0]
    two = block_hashes(prompt(16), [(A, 8), (A, 8)], [PAD], 8)
    assert one[0] == two[0] and one[1] != two[1]
    # Where one medium ends inside a block.
    inside = {tuple(block_hashes(prompt(8), [(A, n), (B, 8 - n)], [PAD], 8)) for n in range(1, 8)}
    assert len(inside) == 7
    with pytest.raises(ValueError, match="the prompt has 3 pad tokens and its media have 2"):
        block_hashes(prompt(3), [(A, 2)], [PAD])


def test_the_blocks_of_real_prompts(processor, clip, clips, tmp_path):
    other = clips.write(tmp_path / "c.mp4", 40, first=1)

    def blocks(messages):
        described = describe(processor, processor.plan(messages), FileHashes())
        media = [(medium.hash, medium.pads) for medium in described.media]
        return block_hashes(described.input_ids, media, [processor.image_token_id, processor.video_token_id], 64)

    first = blocks(user(video(clip), text("What happens?")))
    turn = [*user(video(clip), text("What happens?")), {"role": "assistant", "content": "No."}, *user(text("Why?"))]
    assert blocks(turn)[: len(first) - 1] == first[:-1]
    assert blocks(user(video(clip), text("And when?")))[:-1] == first[:-1]
    assert blocks(user(video(other), text("What happens?")))[1:] != first[1:]
    assert not set(blocks(user(video(clip, fps=4)))[1:]) & set(first[1:])


class Array:
    def __init__(self, nbytes):
        self.nbytes = nbytes


def test_embeddings_used_least_recently_go_first():
    cache = EmbeddingCache(100)
    first, second, third = Array(40), Array(40), Array(40)
    cache.put(A, first)
    cache.put(B, second)
    assert cache.get(A) is first
    cache.put(bytes(32), third)
    assert (cache.get(A), cache.get(B), cache.get(bytes(32))) == (first, None, third)
    assert (cache.hits, cache.misses, cache.nbytes, len(cache)) == (3, 1, 80, 2)
    cache.put(A, second)
    assert cache.get(A) is second and cache.nbytes == 80
    cache.put(B, Array(101))
    assert cache.get(B) is None and cache.nbytes == 80
    empty = EmbeddingCache(0)
    empty.put(A, first)
    assert empty.get(A) is None
