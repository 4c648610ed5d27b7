"""The network's parameters are the checkpoint's: every path and shape of the converter's table, and no other."""

from pathlib import Path

import jax.numpy as jnp
import pytest
from flax import nnx

from convert import load_params, mapping
from keye_jax.config import KeyeConfig
from keye_jax.model.keye import Keye, flatten_params

CONFIGS = sorted((Path(__file__).parents[3] / "configs" / "model").glob("*.json"))


def shapes(model):
    return {tuple(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_parameters_are_those_of_the_converters_table(path):
    config = KeyeConfig.from_file(path)
    table = {tensor.path: tensor.shape for tensor in mapping.rows(config) if tensor.in_model}
    assert shapes(Keye.abstract(config)) == table


def test_every_axis_of_every_parameter_has_a_name():
    model = Keye.abstract(KeyeConfig.from_file(CONFIGS[0]))
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        assert len(leaf.get_metadata()["axes"]) == len(leaf.shape), path


def test_the_released_model_has_all_parameters_but_the_unused_table():
    config = KeyeConfig.from_file(next(path for path in CONFIGS if "30b" in path.stem))
    assert Keye.parameter_count(config) == 31_122_082_160 - 32_768 * 1152


def test_parameters_that_do_not_fit_are_named(golden):
    config = KeyeConfig.from_file(golden / "a")
    params = load_params(golden / "a", config)
    router = params["decoder"]["layers"]["1"]["moe"]["router"]
    router["weight"] = router["weight"][:4]
    del params["decoder"]["norm"]
    params["decoder"]["extra"] = jnp.zeros(1)
    with pytest.raises(
        ValueError, match=r"extra is unexpected; .*1.moe.router.weight has shape \(4, 64\).*norm.weight is m"
    ):
        Keye.from_params(config, params)


def test_loaded_parameters_keep_their_dtype(golden):
    config = KeyeConfig.from_file(golden / "a")
    assert {leaf.dtype.name for leaf in flatten_params(load_params(golden / "a", config)).values()} == {"float32"}
