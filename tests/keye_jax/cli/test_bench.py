"""`keye-jax bench` on a tiny model: what it measures, and what it refuses."""

import json

import numpy as np
import pytest

from keye_jax.bench.inputs import Prompt, random_model
from keye_jax.config import KeyeConfig

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.fixture(scope="module")
def config(golden, tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "config.json"
    values = KeyeConfig.from_file(golden / "a").to_dict() | {"num_hidden_layers": 2}
    path.write_text(json.dumps(values))
    return path


@pytest.mark.slow
def test_measures_prompts_and_steps(keye, config, tmp_path, compiled):
    """A step of decode is compiled once for dense and for sparse attention, and once for a float8 indexer."""
    file = tmp_path / "figures.json"
    code, out, err = keye(
        *("bench", "--config", config, "--layers", 1, "--repeats", 1, "--json", file),
        *("--prefill", "160,190", "--decode", "2x128", "--prefill-chunk", 64),
        *("--unrelated", 160, "--packed", "3x40", "--answer", 5),
    )
    assert code == 0, out + err
    # For contexts of 128 tokens, of 192, which has room for 160, and of 190.
    assert compiled.count("jit(_decode_and_sample)") == 6
    rows = {row["what"]: row for row in json.loads(file.read_text())}
    for tokens in (160, 190):
        dense, sparse = (rows[f"prefill {tokens}, {name}, video"] for name in ("dense", "sparse"))
        assert sparse["of_dense"] == sparse["seconds"] / dense["seconds"]
        assert sparse["tokens_per_second"] == tokens / sparse["seconds"]
        assert f"prefill {tokens}, sparse, fp8 indexer, video" in rows
        assert (f"prefill {tokens}, sparse, unrelated tokens" in rows) == (tokens == 160)
        unions = rows[f"unions of prefill {tokens}, video"]["unions"]
        assert list(unions) == ["16", "64"]
        top_k, ((few,), (many,)) = KeyeConfig.from_file(config).sa_config.topk, unions.values()
        assert top_k <= few <= min(many, 16 * top_k) and many <= tokens
        answer = rows[f"prefill {tokens - 5} + 5 tokens, sparse"]
        assert answer["tokens_per_second"] == tokens / answer["seconds"]
        assert answer["answer"] == 5
    packed = rows["prefill, 3 x 40 packed, sparse"]
    assert packed["tokens_per_second"] == pytest.approx(3 * 40 / packed["seconds"])
    decode = rows["decode, 2 x 128, sparse"]
    assert decode["tokens_per_second"] == 2 / decode["seconds"]
    assert all(what in out for what in rows if not what.startswith("unions"))
    assert out.count("keys that 16 neighbouring queries select") == 3 == out.count("keys that 64 neighbouring queries")


@pytest.mark.slow
def test_measures_a_sharded_model(keye, config, tmp_path):
    file = tmp_path / "figures.json"
    code, out, err = keye(
        *("bench", "--config", config, "--layers", 1, "--repeats", 1, "--json", file, "--sharding", "expert"),
        *("--prefill", "160", "--decode", "8x128", "--prefill-chunk", 16, "--no-dense", "--no-fp8", "--unrelated", ""),
        *("--packed", "", "--cache-dtype", "float8_e4m3fn"),
    )
    assert code == 0, out + err
    assert out.startswith("8 x cpu, 1 layers") and "weights on each (expert 8); a cache of float8_e4m3fn" in out
    rows = json.loads(file.read_text())
    what = [row["what"] for row in rows]
    assert what == ["prefill 160, sparse, video", "unions of prefill 160, video", "decode, 8 x 128, sparse"]
    one_device = (
        "bench",
        "--packed",
        "",
        "--config",
        config,
        "--layers",
        1,
        "--repeats",
        1,
        "--json",
        file,
        "--prefill-chunk",
        16,
    )
    assert keye(*one_device, "--prefill", "160", "--decode", "", "--no-dense", "--no-fp8", "--unrelated", "")[0] == 0
    alone = json.loads(file.read_text())[1]["unions"]
    assert rows[1]["unions"] == {group: pytest.approx(sizes, rel=0.02) for group, sizes in alone.items()}


def test_nothing_is_dense_unless_asked_for(keye, config, monkeypatch):
    """The model as released selects at every position; `--dense-below` reaches the runtime."""
    from keye_jax.runtime import runtime

    seen, init = [], runtime.Runtime.__init__

    def recorded(self, *args, **kwargs):
        init(self, *args, **kwargs)
        seen.append(self.dense_below)

    monkeypatch.setattr(runtime.Runtime, "__init__", recorded)
    nothing = "bench", "--config", config, "--prefill", "", "--decode", "", "--packed", "", "--no-dense", "--no-fp8"
    assert keye(*nothing)[0] == 0
    assert keye(*nothing, "--dense-below", 2048)[0] == 0
    assert seen == [0, 2048]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prefill", "8X"), "--prefill has '8X'"),
        (("--decode", "32K"), "--decode has '32K'"),
        (("--decode", "4x"), "--decode has '4x'; it must be sequences x tokens"),
        (("--decode", "4x64"), "--decode has 4x64; a context must have at least 96 tokens"),
        (("--layers", 3), "--layers is 3; it must be from 1 to 2"),
        (("--repeats", 0), "--repeats is 0"),
        (("--answer", -1), "--answer is -1"),
        (("--prefill", "128,256", "--answer", 128), "--answer is 128; it must be at least 0 and below each length"),
        (("--dense-below", -1), "--dense-below is -1"),
        (("--packed", "64"), "--packed has '64'; it must be sequences x tokens"),
        (("--packed", "1x64"), "--packed has 1x64; it must have at least 2 prompts"),
        (("--prefill", "1024K"), "1,048,576 tokens are more than this model takes"),
        (("--json", "nowhere/figures.json"), "there is no directory 'nowhere'"),
        (("--json", "."), "--json is '.'; it is a directory"),
    ],
)
def test_mistakes_are_one_sentence(keye, config, arguments, message):
    code, out, err = keye("bench", "--config", config, *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in out + err


def test_activations_in_float8_are_refused_without_experts_in_fp8(keye, config):
    nothing = "bench", "--config", config, "--prefill", "", "--decode", "", "--packed", "", "--unrelated", ""
    code, _, err = keye(*nothing, "--activation-dtype", "float8_e4m3fn")
    assert code == 2 and err.count("\n") == 1
    assert "it takes experts in fp8, and this model's are of all bits" in err


def test_what_does_not_fit_is_refused_with_the_numbers(keye, config, monkeypatch):
    weights = 2**20 * 64
    monkeypatch.setattr("keye_jax.runtime.memory.weight_bytes", lambda config, rules: weights)
    monkeypatch.setattr("keye_jax.runtime.device.memory_limit_bytes", lambda: weights + 1000)
    code, out, _ = keye("bench", "--config", config, "--prefill", "256", "--decode", "4x256", "--packed", "")
    assert code == 0
    assert "prefill 256: does not fit: 0.1 GiB of weights" in out
    assert "decode, 4 x 256: does not fit" in out
    monkeypatch.setattr("keye_jax.runtime.device.memory_limit_bytes", lambda: weights - 1)
    code, _, err = keye("bench", "--config", config, "--prefill", "256", "--decode", "")
    assert code == 2
    assert "the model does not fit" in err


def test_random_weights_are_drawn_anew_for_each_array(config):
    model = random_model(KeyeConfig.from_file(config))
    first, second = (np.asarray(layer.attention.q_proj.weight[...], np.float32) for layer in model.decoder.layers)
    assert not np.array_equal(first, second)
    assert 0.015 < first.std() < 0.025


def test_neighbours_in_a_made_up_video_are_alike(config):
    sizes = KeyeConfig.from_file(config)

    def likeness(prompt):
        x = np.asarray(prompt.embeds, np.float32)
        x /= np.linalg.norm(x, axis=-1, keepdims=True)
        return float(np.mean(np.sum(x[1:] * x[:-1], axis=-1)))

    assert likeness(Prompt.video(sizes, 512, noise=0.2)) > 0.9
    assert abs(likeness(Prompt.video(sizes, 512, noise=1.0))) < 0.1
    assert Prompt.video(sizes, 512).positions.shape == (3, 512)
