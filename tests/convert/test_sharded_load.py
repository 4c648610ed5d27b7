"""A checkpoint restores onto a mesh bit by bit. Each byte is read once, even if several devices hold copies of it."""

import dataclasses

import pytest

from convert import synthetic
from convert.orbax_layout import chunk_axis
from tests.convert.convert_helpers import run_cli, run_python, small_config

MIB = 2**20


@pytest.mark.parametrize(
    ("shape", "nbytes", "axis"),
    [
        ((128, 2048, 1536), 128 * 6 * MIB, 0),
        ((32, 128, 2048), 16 * MIB, 0),
        ((2048, 32, 128), 16 * MIB, 1),
        ((151936, 2048), 151936 * 4096, 0),
        ((1152, 4304), 1152 * 4304 * 2, 1),
        ((2048,), 4096, None),
    ],
)
def test_large_arrays_are_stored_in_chunks_along_one_axis(shape, nbytes, axis):
    assert chunk_axis(shape, nbytes) == axis


def test_shards_are_those_of_the_whole_and_each_chunk_is_read_once(tmp_path):
    config = dataclasses.replace(small_config(1), hidden_size=512, moe_intermediate_size=512, num_experts=8)
    synthetic.write_checkpoint(tmp_path / "hf", config, dtype="float32")
    done = run_cli(tmp_path / "hf", tmp_path / "orbax")
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    program = """
        import sys
        import jax, numpy as np, tensorstore
        from convert import load_params
        from convert.orbax_layout import flatten
        from keye_jax.config import KeyeConfig
        from keye_jax.model.params import parameter_shardings
        from keye_jax.sharding import MeshRules, ShardingConfig

        def bytes_read():
            metrics = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
            return sum(value["value"] for metric in metrics for value in metric["values"])

        config = KeyeConfig.from_file(sys.argv[1])
        whole = flatten(load_params(sys.argv[1], config))
        before = once = bytes_read()
        rules = {"heads": "b", "kv_heads": "b", "experts": "a", "expert_hidden": "b", "vocab": ["a", "b"]}
        for rules in ({}, rules):
            file = ShardingConfig.from_dict({"mesh": {"a": 2, "b": 2}, "rules": rules})
            shardings = parameter_shardings(config, MeshRules.create(file, config))
            parts, wanted = flatten(load_params(sys.argv[1], config, shardings=shardings)), flatten(shardings)
            assert parts.keys() == whole.keys()
            for path, array in parts.items():
                assert array.sharding.is_equivalent_to(wanted[path], array.ndim), path
                assert np.array_equal(np.asarray(array), np.asarray(whole[path])), path
            read, before = bytes_read() - before, bytes_read()
            assert read < 1.4 * once, (rules, read, once)
        print("held")
    """
    flags = "--xla_force_host_platform_device_count=4"
    assert run_python(program, tmp_path / "orbax", XLA_FLAGS=flags).stdout.strip() == "held"


def test_a_sharding_file_that_does_not_suit_is_refused_before_anything_is_written(tmp_path):
    synthetic.write_checkpoint(tmp_path / "hf", small_config(1))
    file = tmp_path / "mine.yaml"
    file.write_text("mesh: {expert: 3}\nrules: {experts: expert}\n")
    done = run_cli(tmp_path / "hf", tmp_path / "orbax", "--sharding", file)
    assert done.returncode == 2
    assert done.stderr == (
        f"keye-jax: {file}: rules.experts splits num_experts 16 into 3 (expert 3), which does not divide it; "
        "1, 2 or 4 would\n"
    )
    assert not (tmp_path / "orbax").exists() and not (tmp_path / "orbax.partial").exists()
