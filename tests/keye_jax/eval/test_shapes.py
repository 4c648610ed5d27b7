import dataclasses

import pytest

pytest.importorskip("av", reason="clips are written with PyAV")

from keye_jax.config import KeyeConfig
from keye_jax.eval.shapes import LEAST, SELECTIONS, Answer, failures, scores, write_clips
from keye_jax.processor import Processor
from keye_jax.train.shapes.files import write_model_files

GOOD = dict.fromkeys(LEAST, 0.97) | {"word": 0.97}


def test_clips_and_questions_are_the_same_on_every_call(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    counted = []
    one = write_clips(tmp_path / "one", 2, 0, 16, lambda done, total: counted.append((done, total)))
    two = write_clips(tmp_path / "two", 2, 0, 16)
    assert counted == [(1, 3), (2, 3), (3, 3)]
    for first, second in zip(one, two, strict=True):
        assert first.questions == second.questions and first.path.name == second.path.name
    assert [len(clip.questions) for clip in one] == [6, 6, 1]
    assert [question.kind == "needle" for clip in one for question in clip.questions] == [False] * 12 + [True]


def test_a_needles_clip_is_16_times_as_long_as_a_selection(tmp_path):
    write_model_files(tmp_path)
    config = KeyeConfig.from_file(tmp_path)
    clip = write_clips(tmp_path, 1, 0, config.sa_config.topk)[-1]
    content = [{"type": "video", "video": str(clip.path)}, {"type": "text", "text": clip.questions[0].text}]
    with Processor.from_checkpoint(tmp_path, config).plan([{"role": "user", "content": content}]) as plan:
        assert 16 * config.sa_config.topk <= plan.num_tokens < 17 * config.sa_config.topk


def test_what_reaches_all_thresholds():
    found = {
        **{"indexer": GOOD, "dense": GOOD, "random": GOOD | {"attributes": 0.4}},
        **{"recent": {"attributes": 0.7}, "untrained": {"attributes": 0.2}},
    }
    assert set(found) == set(SELECTIONS)
    assert failures(found) == []


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"indexer": GOOD | {"clock": 0.94}}, "indexer: clock is 0.940; it must be at least 0.95"),
        ({"dense": GOOD | {"when": 0.7}}, "dense: when is 0.700; it must be at least 0.80"),
        ({"random": {"attributes": 0.51}}, "random: attributes is 0.510; it must be at most 0.50"),
        ({"untrained": {"attributes": 0.26}}, "untrained: attributes is 0.260; it must be at most 0.25"),
        ({"indexer": GOOD, "recent": {"attributes": 0.78}}, "recent: attributes is 0.780; it must be at most 0.770"),
        ({"indexer": GOOD, "dense": dict.fromkeys(GOOD, 0.99)}, "indexer: the mean of all kinds is 0.970;"),
    ],
)
def test_what_is_beyond_a_threshold(changed, sentence):
    [found] = failures(changed)
    assert found.startswith(sentence)


def test_scores_are_means_by_kind(tmp_path):
    [clip, _] = write_clips(tmp_path, 1, 3, 16)
    given = [Answer("clip", question, question.answer, 1.0) for question in clip.questions]
    assert set(scores(given).values()) == {1.0}
    given.append(dataclasses.replace(given[0], said="?", score=0.0))
    assert scores(given)[given[0].question.kind] < 1
    assert given[0].to_dict()["said"] == given[0].question.answer
