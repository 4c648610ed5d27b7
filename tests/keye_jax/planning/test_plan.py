"""Plans: bytes are those of the arrays there would be, collectives those of the program, mistakes are refused."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest

from keye_jax.cli import app, options, run
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.kv_cache import PAGE_SIZE, PagePool
from keye_jax.planning import plan as planning
from keye_jax.planning.collectives import Collective, of_program
from keye_jax.planning.hardware import GIB, Platform
from keye_jax.planning.plan import Plan, Step, plan, video_capacity
from keye_jax.sharding import ShardingConfig

ROOT = Path(__file__).parents[3]
TINY = ROOT / "configs" / "model" / "tiny.json"


@pytest.fixture(scope="module")
def tiny():
    return KeyeConfig.from_file(TINY)


def sharding(name):
    return ShardingConfig.from_file(ROOT / "configs" / "sharding" / f"{name}.yaml")


def make(config, name, platform, *, compile_programs=False, **job):
    return plan(config, sharding(name), Platform.parse(platform), compile_programs=compile_programs, **job)


def steps(found: Plan) -> tuple[Step, Step]:
    """Prefill and decode, both of which have a program."""
    assert found.prefill is not None and found.decode is not None
    return found.prefill, found.decode


def test_weights_and_cache_are_those_of_the_arrays(tiny):
    from keye_jax.model.keye import Keye

    one, four = (
        make(tiny, *where, context=4096, batch=4) for where in (("one_device", "h200:1"), ("combined", "h200:4"))
    )
    cache = jax.eval_shape(lambda: PagePool.create(tiny, 4 * 4096 // PAGE_SIZE))
    assert one.weights == 2 * Keye.parameter_count(tiny)
    assert one.cache == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    layer = 3 * tiny.num_experts * tiny.hidden_size * tiny.moe_intermediate_size
    split = 2 * (tiny.num_hidden_layers * layer + 2 * tiny.vocab_size * tiny.hidden_size)
    assert four.weights == one.weights - split * 3 // 4
    assert four.cache == one.cache // 4
    assert one.fits and steps(one)[0].collectives == () and one.largest_context == tiny.max_position_embeddings
    assert four.peak == max(step.peak for step in steps(four)) <= four.memory


def test_collectives_of_a_step_of_decoding(tiny):
    """Of each layer: scores of a quarter of the positions, outputs with their log-sum-exps, and the experts' sums."""
    found = steps(make(tiny, "combined", "h200:4", context=4096))[1].collectives
    kinds = {each.kind: each.count for each in found}
    assert kinds["all-gather"] == 2 * tiny.num_hidden_layers
    assert kinds["all-reduce"] == tiny.num_hidden_layers + 1
    gathered = next(each for each in found if each.kind == "all-gather")
    scores = 4 * 4096 // 4
    merged = tiny.num_attention_heads * (2 * tiny.head_dim + 4)
    assert gathered.bytes_received == tiny.num_hidden_layers * 3 * (scores + merged)


def test_what_does_not_fit_is_told_with_the_largest_context_that_would():
    config = KeyeConfig.from_file(ROOT / "configs" / "model" / "keye_vl_2_30b_a3b.json")
    found = make(config, "sequence", "h100:2", context=262_144, batch=4)
    assert not found.fits and found.peak > found.memory
    assert 0 < found.largest_context < 262_144
    fitting = make(config, "sequence", "h100:2", context=found.largest_context, batch=4)
    assert fitting.fits and fitting.peak > 0.97 * fitting.memory


@pytest.mark.skipif(not find_spec("jax_cuda13_plugin"), reason="JAX's plugin for CUDA is not installed")
def test_programs_are_compiled_for_gpus_that_are_not_there(tiny):
    found = make(tiny, "combined", "h200:2", context=1024, compile_programs=True)
    assert all(step.compiled for step in steps(found))
    assert {"all-gather", "reduce-scatter"} <= {each.kind for each in steps(found)[0].collectives}
    # The kernels for Hopper GPUs take no index heads of 16 elements.
    assert found.implementation == "xla" and found.fits


def test_gpus_without_a_description_are_estimated(tiny):
    assert not steps(make(tiny, "combined", "b200:2", context=1024, compile_programs=True))[0].compiled


def test_collectives_of_a_compiled_program():
    text = """
  %all-gather.1 = bf16[4,8]{1,0} all-gather(%p), replica_groups=[4,4]<=[16], dimensions={0}
  %ar = (f32[2,2]{1,0}, f32[3]{0}) all-reduce(%a, %b), replica_groups={{0,1},{2,3}}
  %start = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%p), replica_groups=[1,4]<=[4]
  %done = bf16[8,8]{1,0} all-gather-done(%start)
  %q = ((bf16[2,8], s32[3]), (bf16[16,8], s32[24]), u32[]) all-gather-start(%p), replica_groups=mesh['a'=2,'b'=8] {'b'}
  %sums = (f32[6]{0}, f32[]) all-reduce-start(%a, %b), replica_groups=mesh['a'=2,'b'=3] {'a','b'}, to_apply=%add
  %part = ((bf16[32]{0}), bf16[4]{0}) reduce-scatter-start(%p), replica_groups=mesh['a'=8] {'a'}, dimensions={0}
"""
    assert of_program(text) == (
        Collective("all-gather", 3, 64 * 3 // 4 + 128 * 3 // 4 + (256 + 96) * 7 // 8),
        Collective("all-reduce", 2, 28 + 2 * 24 * 5 // 6),
        Collective("reduce-scatter", 1, 8 * 7),
    )


def test_video_that_a_context_holds():
    small, large = video_capacity(262_144)
    assert (small["tokens_per_frame"], large["tokens_per_frame"]) == (64, 256)
    # A time such as "1234.5" is seven tokens with its mark.
    assert 262_144 / (64 + 7) < small["frames"] < 262_144 / (64 + 4)
    assert small["seconds"] == small["frames"] / 2
    assert video_capacity(60)[0]["frames"] == 0


@pytest.mark.parametrize(
    ("text", "devices", "topology"),
    [
        ("h200:4", 4, None),
        ("v5e:4x8", 32, "v5e:4x8"),
        ("v5p:2x2x4", 16, "v5p:2x2x4"),
        ("tpu7x:2x2x1", 8, "tpu7x:2x2x1"),
        ("H200:8", 8, None),
        ("V5P:4x4x8", 128, "v5p:4x4x8"),
        ("mi300x:8", 8, None),
    ],
)
def test_platforms(text, devices, topology):
    platform = Platform.parse(text)
    assert (platform.devices, platform.topology) == (devices, topology)
    assert platform.chip.memory is not None and platform.chip.memory >= 16 * GIB and platform.chip.source


@pytest.mark.parametrize(
    ("text", "slices", "message"),
    [
        ("b300:4", 1, "--platform is 'b300:4'; it must be KIND:COUNT or KIND:TOPOLOGY, KIND of cpu, h100"),
        ("h200", 1, "after the colon must be a number"),
        ("h200:0", 1, "after the colon must be a number"),
        ("h200:4x2", 1, "after the colon must be a number"),
        ("h200:99999999", 1, "after the colon must be a number"),
        ("v5e:32", 1, "slices of v5e are 1x1, 2x2, 2x4"),
        ("v5e:3", 1, "slices of v5e are"),
        ("v6e:5x7", 1, "slices of v6e are"),
        ("v6e:8x4", 1, "slices of v6e are"),
        ("v5p:4x4", 1, "slices of v5p are 2x2x1, 2x2x2"),
        ("v5p:3x3x3", 1, "slices of v5p are"),
        ("v5p:4x4x6", 1, "slices of v5p are"),
        ("v5p:16x16x32", 1, "at most 6,144 chips"),
        ("tpu7x:2x4x8", 1, "slices of tpu7x are"),
        ("h200:4", 2, "--slices is 2; it must be from 1 to 1024, and only TPUs come in more than 1"),
        ("v5p:2x2x4", 0, "--slices is 0"),
    ],
)
def test_platforms_that_there_are_not(text, slices, message):
    with pytest.raises(UserError, match=message):
        Platform.parse(text, slices)


def test_any_device_can_be_described(capsys):
    arguments = "--platform", "Our-GPU:2", "--sharding", "combined"
    assert planned(capsys, *arguments)[0] == 2
    code, out, err = planned(capsys, *arguments, "--device-memory", "80GiB", "--device-bandwidth", "2TB/s")
    assert code == 0 and not err
    found = json.loads(out)
    assert (found["platform"], found["devices"], found["memory"]) == ("our-gpu:2", 2, int(80 * GIB * 0.95))
    less = json.loads(planned(capsys, "--platform", "h100:1", "--device-memory", "94GB")[1])
    assert less["memory"] == int(94e9 * 0.95)
    for value in ("80", "0GiB", "-1GB", "80GiB/s", "nan GB"):
        code, out, err = planned(capsys, *arguments, "--device-memory", value)
        assert (code, out) == (2, "") and f"--device-memory is '{value}'; it must be a number with a unit" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("cpu:1 --implementation mosaic_gpu", "on cpu:1 it must be xla"),
        ("a100:1 --implementation mosaic_gpu", "on a100:1 it must be cudnn or xla"),
        ("mi300x:1 --implementation cudnn", "on mi300x:1 it must be xla"),
        ("v6e:1x1 --implementation cudnn", "on v6e:1x1 it must be mosaic_tpu or xla"),
        ("h200:1 --batch 2097153 --context 1K", "it must be at most 2,097,151"),
        ("h200:8 --sharding expert --batch 99999999999999 --context 32K", "--batch is 99,999,999,999,999; .* 65,528"),
    ],
)
def test_jobs_that_a_launch_would_refuse(capsys, arguments, message):
    code, out, err = planned(capsys, "--platform", *arguments.split())
    assert (code, out, err.count("\n")) == (2, "", 1) and re.search(message, err), err


def test_a_float8_cache_is_planned(capsys):
    (_, exact, _), (_, float8, _) = (
        planned(capsys, "--platform", "h200:1", *more) for more in ((), ("--cache-dtype", "float8_e4m3fn"))
    )
    assert json.loads(float8)["cache"] < json.loads(exact)["cache"]
    assert json.loads(float8)["largest_context"] >= json.loads(exact)["largest_context"]


def test_activations_in_float8_are_planned(capsys):
    """XLA multiplies them in float32; they take experts in fp8."""
    job = ("--platform", "a100:1", "--context", "128", "--experts", "fp8")
    float8 = ("--activation-dtype", "float8_e4m3fn")
    exact, rounded = (json.loads(planned(capsys, *job, *more)[1])["prefill"] for more in ((), float8))
    assert rounded["workspace"] > exact["workspace"]
    code, _, err = planned(capsys, *job[:4], *float8)
    assert code == 2 and "it takes experts in fp8, and this model's are of all bits" in err
    assert run(app, ["plan", "--platform", "cpu:1", "--train", "lora", *float8]) == 2
    assert "--activation-dtype cannot go with --train" in capsys.readouterr().err


def test_the_implementation_decides_the_workspace(capsys):
    """Of a GPU that is only described nobody knows whether it runs kernels."""
    described = ("mine:1", "--device-memory", "80GiB")
    by_xla, unknown, ampere, kernels = (
        json.loads(planned(capsys, "--platform", *job)[1])["prefill"]["workspace"]
        for job in (("h100:1", "--implementation", "xla"), described, ("a100:1",), ("h100:1",))
    )
    assert by_xla == unknown == ampere != kernels


def test_options_of_a_job_do_not_go_with_training(capsys):
    assert run(app, ["plan", "--platform", "cpu:1", "--train", "lora", "--batch", "2", "--prefill-chunk", "64"]) == 2
    assert "--batch and --prefill-chunk cannot go with --train" in capsys.readouterr().err


def test_contexts_have_units(capsys):
    assert json.loads(planned(capsys, "--platform", "h200:1", "--context", "2k")[1])["context"] == 2048
    code, _, err = planned(capsys, "--platform", "h200:1", "--context", "1M")
    assert code == 2 and "--context is 1,048,576; this model takes from 1 to 32,768 tokens" in err
    code, _, err = planned(capsys, "--platform", "h200:1", "--context", "1.5M")
    assert code == 2 and "--context has '1.5M'; it must be a number of tokens such as 8192, 8K or 1M" in err


@pytest.mark.parametrize(
    ("platform", "mesh", "slices", "message"),
    [
        ("h200:16", {"data": 8}, 1, "the mesh uses 8 of 16 devices, which 2 processes have; it must use all of them"),
        ("v5e:4x8", {"data": 8}, 1, "the mesh uses 8 of 32 devices, which 8 processes have; it must use all of them"),
        ("h200:4", {"data": 8}, 1, "needs 8 devices; there are 4"),
        ("v5p:2x2x4", {"data": "auto"}, 2, "across_slices is None, but the devices are in 2 slices"),
    ],
)
def test_what_a_launch_refuses_is_refused(tiny, platform, mesh, slices, message):
    rules = {"batch": "data"}
    file = ShardingConfig.from_dict({"mesh": mesh, "rules": rules}, source="mine.yaml")
    with pytest.raises(UserError, match=f"^mine.yaml: .*{message}"):
        plan(tiny, file, Platform.parse(platform, slices), context=1024, compile_programs=False)


def test_devices_that_are_idle_are_counted(tiny, capsys):
    assert planned(capsys, "--platform", "h200:8")[0] == 0
    found = make(tiny, "one_device", "h200:8", context=1024)
    assert found.notes == ["the mesh uses 1 of 8 devices; 7 are idle, and --sharding can use them"]
    assert make(tiny, "expert", "h200:8", context=1024).notes == []


def test_a_launch_counts_idle_devices_too(tiny, capsys, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert options.mesh_rules("one_device", tiny).devices == 1
    assert capsys.readouterr().err == (
        "keye-jax: the mesh uses 1 of 8 devices; 7 are idle, and --sharding can use them\n"
    )


@pytest.mark.parametrize(
    ("platform", "module", "extra"), [("v5e:2x2", "libtpu", "tpu"), ("h200:4", "jax_cuda", "cuda")]
)
def test_a_compiler_that_is_missing_is_named_with_what_installs_it(tiny, monkeypatch, platform, module, extra):
    monkeypatch.setattr(planning, "find_spec", lambda name: None if name.startswith(module) else find_spec(name))
    found = make(tiny, "combined", platform, context=1024, compile_programs=True)
    assert not steps(found)[0].compiled
    assert [note for note in found.notes if f"is not installed; pip install 'keye-jax[{extra}]' installs it" in note]


def test_a_dtype_that_is_assumed_is_said(tmp_path, capsys):
    values = json.loads(TINY.read_text())
    del values["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    base = ["plan", "--config", str(tmp_path), "--platform", "h200:1", "--context", "1K", "--no-compile"]
    assert run(app, base) == 0
    assert "note: config.json does not say the dtype of the weights; bfloat16 is assumed" in capsys.readouterr().out
    (tmp_path / "config.json").write_text(json.dumps(values | {"torch_dtype": "float32"}))
    assert run(app, [*base, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["notes"] == [] and found["weights"] == 2 * json.loads(planned(capsys, *base[3:5])[1])["weights"]


def test_the_command_prints_a_table_or_json_and_its_code_says_whether_it_fits(capsys):
    arguments = ["plan", "--config", str(TINY), "--sharding", str(ROOT / "configs/sharding/combined.yaml")]
    arguments += ["--platform", "h200:4", "--context", "4K", "--batch", "2"]
    assert run(app, arguments) == 0
    out, err = capsys.readouterr()
    assert "weights and cache are computed" in out and "estimated" in out and "it fits" in out and not err
    assert run(app, [*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["mesh"] == {"sequence": 4} and found["decode"]["collectives"]
    assert run(app, [*arguments[:-3], "40000"]) == 2
    assert "this model takes from 1 to 32,768 tokens" in capsys.readouterr().err
    assert run(app, [*arguments[:-5], "h200:3", *arguments[-4:]]) == 2
    assert "splits num_experts 16 into 3 (sequence 3)" in capsys.readouterr().err


def planned(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `keye-jax plan` for the tiny model, estimated."""
    base = ["plan", "--config", str(TINY), "--context", "1K", "--no-compile", "--json"]
    code = run(app, [*base, *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_without_sharding_all_is_on_one_device(capsys):
    code, out, err = planned(capsys, "--platform", "h200:1")
    assert code == 0, err
    found = json.loads(out)
    assert found["devices"] == 1 and found["decode"]["collectives"] == []
    named = planned(capsys, "--platform", "h200:1", "--sharding", "one_device")
    assert json.loads(named[1])["weights"] == found["weights"]


def test_sharding_is_a_presets_name_or_a_file(capsys, tmp_path):
    arguments = "--platform", "h200:4", "--sharding"
    by_name = planned(capsys, *arguments, "combined")
    assert by_name[0] == 0 and json.loads(by_name[1])["mesh"] == {"sequence": 4}
    assert planned(capsys, *arguments, str(ROOT / "configs" / "sharding" / "combined.yaml"))[:2] == by_name[:2]
    (tmp_path / "mine.yaml").write_text("mesh: {expert: 4}\nrules: {experts: expert}\n")
    assert json.loads(planned(capsys, *arguments, str(tmp_path / "mine.yaml"))[1])["mesh"] == {"expert": 4}


def test_what_is_no_preset_and_no_file_is_refused_with_the_presets(capsys):
    code, out, err = planned(capsys, "--platform", "h200:4", "--sharding", "combind")
    assert (code, out) == (2, "")
    assert "--sharding is 'combind'; it must be a file or one of the presets: combined, expert" in err
    assert err.count("\n") == 1
