import json

import pytest

from convert.synthetic import write_checkpoint
from keye_jax import presets
from keye_jax.config import KeyeConfig


@pytest.mark.slow
def test_a_random_model_is_below_the_thresholds(keye, tmp_path):
    pytest.importorskip("av", reason="clips are written with PyAV")
    from keye_jax.train.shapes.files import write_model_files

    write_checkpoint(tmp_path / "hf", KeyeConfig.from_file(presets.EMBEDDED), seed=0)
    write_model_files(tmp_path / "hf")
    code, out, err = keye(
        "eval", "shapes", "--checkpoint", tmp_path / "hf", "--videos", 2, "--json", tmp_path / "scores.json"
    )
    assert code == 1, out + err
    assert "indexer: clock is 0.000; it must be at least 0.95" in out
    result = json.loads((tmp_path / "scores.json").read_text())
    assert result["scores"]["indexer"].keys() == result["guess"].keys()
    assert len(result["answers"]["indexer"]) == 2 * 6 + 1
    assert [sentence for sentence in result["failures"] if sentence in out] == result["failures"]


@pytest.mark.slow
def test_questions_of_one_conversation(keye, tmp_path):
    """All but the first question are counted, and a clip with one question is not asked about."""
    pytest.importorskip("av", reason="clips are written with PyAV")
    code, out, err = keye("eval", "shapes", "--videos", 2, "--conversation", "--json", tmp_path / "scores.json")
    assert code == 0, out + err
    result = json.loads((tmp_path / "scores.json").read_text())
    given = result["answers"]["indexer"]
    assert [answer["clip"] for answer in given].count("clip_00000.mp4") == 5 and len(given) == 2 * 5
    assert result["conversation"] and result["failures"] == []
    assert "needle" not in result["scores"]["indexer"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--selection", "all"), "--selection is 'all'; it must be one of: indexer, dense, random, recent"),
        (("--videos", 0), "--videos is 0"),
        (("--seed", -1), "--seed is -1"),
    ],
)
def test_options_that_are_not_allowed(keye, arguments, words):
    code, out, err = keye("eval", "shapes", *arguments)
    assert (code, out) == (2, "")
    assert words in err and err.count("\n") == 1
