"""Meshes and the shardings of arrays, on eight virtual devices in a process of their own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import pytest

from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.model.params import parameter_shardings
from keye_jax.sharding import MeshRules, ShardingConfig

ROOT = Path(__file__).parents[3]


def test_the_first_of_several_devices_serve_a_smaller_mesh_and_more_are_refused():
    config = ShardingConfig.from_dict({"mesh": {"data": 1}, "rules": {"batch": "data"}})
    rules = MeshRules.create(config)
    assert rules.mesh.size == 1 and rules.axes("batch") == () and rules.size("batch") == 1
    config = config.with_sizes(data=1 + len(jax.devices()))
    with pytest.raises(UserError, match=f"needs {1 + len(jax.devices())} devices; there are {len(jax.devices())}"):
        MeshRules.create(config)


def test_rules_on_eight_devices():
    program = """
        from jax.sharding import PartitionSpec as P
        from keye_jax.config import KeyeConfig
        from keye_jax.model.params import parameter_shardings
        from keye_jax.sharding import MeshRules, ShardingConfig
        model = KeyeConfig.from_file("configs/model/keye_vl_2_30b_a3b.json")
        file = ShardingConfig.from_file("configs/sharding/gpu_8.yaml")
        rules = MeshRules.create(file, model)
        assert rules == MeshRules.create(file, model) and hash(rules) == hash(MeshRules.create(file, model))
        assert rules != MeshRules.create(file.with_sizes(data=1), model)
        assert dict(rules.mesh.shape) == {"data": 2, "sequence": 4}
        assert rules.axes("experts") == ("data", "sequence") and rules.size("experts") == 8
        assert rules.spec("batch", None, "heads") == P("data", None, None)
        layer = parameter_shardings(model, rules)["decoder"]["layers"]["47"]
        assert layer["moe"]["down_proj"].spec == P(("data", "sequence"), None, None)
        assert layer["moe"]["down_proj"].shard_shape((128, 768, 2048)) == (16, 768, 2048)
        assert layer["attention"]["q_proj"]["weight"].is_fully_replicated
        assert rules.expert_exchange == "all_gather"
        one = MeshRules.create(file.with_sizes(data=1, sequence=1), model)
        assert one.axes("experts") == () and one.mesh.size == 1
        print("held")
    """
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == "held", done.stderr


def test_parameters_have_the_structure_of_a_checkpoint():
    from convert.mapping import rows

    model = KeyeConfig.from_file(ROOT / "configs" / "model" / "tiny.json")
    tree = parameter_shardings(model, MeshRules.create(ShardingConfig.from_dict({"mesh": {"data": 1}})))
    assert tree is not None
    assert parameter_shardings(model, MeshRules.single_device()) is None
    for tensor in rows(model):
        if tensor.in_model:
            node: Any = tree
            for key in tensor.path:
                node = node[key]
            assert len(node.spec) == len(tensor.shape)
