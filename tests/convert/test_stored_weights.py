"""Checkpoints in others' layouts, written from the layouts' definitions, against the numbers that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from convert import convert, mapping
from convert.detect import read_config
from convert.synthetic import random_tensor
from convert.writer import PlannedTensor, ShardWriter
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.quantization.quantize import FP8
from tests.convert.convert_helpers import numbers_of

GOLDEN = Path(__file__).parents[1] / "golden"
BF16 = np.dtype(ml_dtypes.bfloat16)
GROUP = 16

# A stored matrix: its tensors by what follows the module's name, and its numbers `[out, in]`, computed in float32.
Stored = tuple[dict[str, np.ndarray], np.ndarray]
Writer = Callable[[np.random.Generator, int, int], Stored]


def words(numbers: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Numbers `[rows, columns]` in int32, the first in the lowest bits, or the one that `order` puts there."""
    each = 32 // bits
    rows, columns = numbers.shape
    out = np.zeros((rows, -(-columns // each)), np.uint64)
    for word in range(out.shape[1]):
        for place in range(each):
            column = word * each + (order[place] if order else place)
            if column < columns:
                out[:, word] |= numbers[:, column].astype(np.uint64) << np.uint64(bits * place)
    return out.astype(np.uint32).view(np.int32)


def scales(rng: np.random.Generator, *shape: int, dtype: np.dtype = BF16) -> np.ndarray:
    return rng.uniform(0.01, 0.02, shape).astype(dtype)


def by_group(x: np.ndarray, inputs: int) -> np.ndarray:
    """`[..., groups]` with each number where its inputs are."""
    return np.repeat(x.astype(np.float32), GROUP, axis=-1)[..., :inputs]


def block_fp8(rng: np.random.Generator, out: int, inputs: int) -> Stored:
    values = rng.normal(size=(out, inputs)).astype(FP8)
    scale = scales(rng, -(-out // 32), -(-inputs // 24), dtype=np.dtype(np.float32))
    spread = np.repeat(np.repeat(scale, 32, axis=0)[:out], 24, axis=1)[:, :inputs]
    return {"weight": values, "weight_scale_inv": scale}, values.astype(np.float32) * spread


def channel_fp8(rng: np.random.Generator, out: int, inputs: int) -> Stored:
    values, scale = rng.normal(size=(out, inputs)).astype(FP8), scales(rng, out, 1)
    return {"weight": values, "weight_scale": scale}, values.astype(np.float32) * scale.astype(np.float32)


def tensor_fp8(rng: np.random.Generator, out: int, inputs: int) -> Stored:
    values, scale = rng.normal(size=(out, inputs)).astype(FP8), scales(rng, 1)
    tensors = {"weight": values, "weight_scale": scale, "input_scale": scales(rng, 1)}
    return tensors, values.astype(np.float32) * scale.astype(np.float32)


def int8(rng: np.random.Generator, out: int, inputs: int) -> Stored:
    values, scale = rng.integers(-128, 128, (out, inputs)).astype(np.int8), scales(rng, out, 1)
    return {"weight": values, "weight_scale": scale}, values.astype(np.float32) * scale.astype(np.float32)


def packed(bits: int, *, symmetric: bool, act_order: bool = False) -> Writer:
    def write(rng: np.random.Generator, out: int, inputs: int) -> Stored:
        groups = -(-inputs // GROUP)
        values, scale = rng.integers(0, 1 << bits, (out, inputs)), scales(rng, out, groups)
        tensors = {"weight_packed": words(values, bits), "weight_scale": scale}
        tensors["weight_shape"] = np.array([out, inputs], np.int64)
        zeros = np.full((out, groups), 1 << (bits - 1))
        if not symmetric:
            zeros = rng.integers(0, 1 << bits, (out, groups))
            tensors["weight_zero_point"] = words(zeros.T, bits).T.copy()
        group_of = np.arange(inputs) // GROUP
        if act_order:
            group_of = rng.permutation(group_of)
            tensors["weight_g_idx"] = group_of.astype(np.int32)
        numbers = (values - zeros[:, group_of]).astype(np.float32) * scale.astype(np.float32)[:, group_of]
        return tensors, numbers

    return write


def awq(rng: np.random.Generator, out: int, inputs: int) -> Stored:
    groups, order = -(-inputs // GROUP), (0, 2, 4, 6, 1, 3, 5, 7)
    values, zeros = rng.integers(0, 16, (inputs, out)), rng.integers(0, 16, (groups, out))
    scale = scales(rng, groups, out, dtype=np.dtype(np.float16))
    tensors = {"qweight": words(values, 4, order), "qzeros": words(zeros, 4, order), "scales": scale}
    return tensors, (values.T - by_group(zeros.T, inputs)) * by_group(scale.T, inputs)


def gptq(bits: int, *, act_order: bool = False, symmetric: bool = True, added: int = 1) -> Writer:
    def write(rng: np.random.Generator, out: int, inputs: int) -> Stored:
        groups, middle = -(-inputs // GROUP), 1 << (bits - 1)
        values = rng.integers(0, 1 << bits, (inputs, out))
        zeros = np.full((groups, out), middle) if symmetric else rng.integers(1, 1 << bits, (groups, out))
        scale = scales(rng, groups, out, dtype=np.dtype(np.float16))
        group_of = np.arange(inputs) // GROUP
        if act_order:
            group_of = rng.permutation(group_of)
        tensors = {
            "qweight": words(values.T, bits).T.copy(),
            "qzeros": words(zeros - added, bits),
            "scales": scale,
            "g_idx": group_of.astype(np.int32),
        }
        return tensors, ((values - zeros[group_of]).astype(np.float32) * scale.astype(np.float32)[group_of]).T

    return write


def compressed(layout: str, bits: int, kind: str, strategy: str, **weights) -> dict:
    group = {"weights": {"num_bits": bits, "type": kind, "strategy": strategy, **weights}, "targets": ["Linear"]}
    ignore = ["lm_head", "re:.*mlp.gate$", "re:visual.*", "re:mlp_AR.*", "re:.*sa_indexer.*"]
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }


OTHERS = {"modules_to_not_convert": ["lm_head", "visual", "mlp_AR", "sa_indexer", "mlp.gate"]}
GROUPS = {"strategy": "group", "group_size": GROUP}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, **OTHERS}
LAYOUTS: dict[str, tuple[dict, Writer]] = {
    "block fp8": ({"quant_method": "fp8", "weight_block_size": [32, 24], **OTHERS}, block_fp8),
    "channel fp8": (compressed("float-quantized", 8, "float", "channel"), channel_fp8),
    "tensor fp8": (compressed("float-quantized", 8, "float", "tensor"), tensor_fp8),
    "int8": (compressed("int-quantized", 8, "int", "channel"), int8),
    "int4": (compressed("pack-quantized", 4, "int", **GROUPS), packed(4, symmetric=True)),
    "int4, zeros": (compressed("pack-quantized", 4, "int", **GROUPS, symmetric=False), packed(4, symmetric=False)),
    "packed int8, zeros": (
        compressed("pack-quantized", 8, "int", **GROUPS, symmetric=False),
        packed(8, symmetric=False),
    ),
    "int4, any order": (
        compressed("pack-quantized", 4, "int", **GROUPS, actorder="group"),
        packed(4, symmetric=True, act_order=True),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, **OTHERS}, awq),
    "gptq": (GPTQ | {"sym": True, "desc_act": False}, gptq(4)),
    "gptq 8": (GPTQ | {"bits": 8, "sym": True}, gptq(8)),
    "gptq, zeros": (
        GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"},
        gptq(4, symmetric=False, added=0),
    ),
    "gptq, any order": (GPTQ | {"sym": True, "desc_act": True}, gptq(4, act_order=True)),
}


@pytest.fixture(scope="module")
def config() -> KeyeConfig:
    """One layer, with sizes that no block or group divides."""
    values = KeyeConfig.from_file(GOLDEN / "a").to_dict() | {"num_hidden_layers": 1, "num_experts": 3}
    values |= {"hidden_size": 72, "moe_intermediate_size": 40}
    return KeyeConfig.from_dict(values)


def write(directory: Path, config: KeyeConfig, stated: dict, writer: Writer, *, fused: bool) -> dict[str, np.ndarray]:
    """Writes a checkpoint; the numbers of its weights of fewer bits by dotted path, in our shapes and float32."""
    rng, arrays, numbers = np.random.default_rng(0), {}, {}
    for tensor in mapping.rows(config):
        name = tensor.checkpoint_name
        if tensor.part == "experts":
            pieces = mapping.expert_pieces(tensor)
            made = np.empty(tensor.shape, np.float32)
            columns = tensor.shape[2] if fused else pieces[0].checkpoint_shape[0]
            stacks: dict[str, list[np.ndarray]] = {}
            for place in range(tensor.shape[0] if fused else len(pieces)):
                tensors, matrix = writer(rng, columns, tensor.shape[1])
                if fused:
                    made[place] = matrix.T
                    for key, array in tensors.items():
                        stacks.setdefault(key, []).append(array)
                    continue
                piece = pieces[place]
                made[piece.expert, :, slice(*piece.columns)] = matrix.T
                module = piece.checkpoint_name.removesuffix(".weight")
                arrays |= {f"{module}.{key}": array for key, array in tensors.items()}
            for key, stack in stacks.items():
                stem = name + key.removeprefix("weight") if key.startswith("weight") else f"{name}.{key}"
                turned = stated["quant_method"] == "fp8"
                arrays[stem] = np.stack([each.T if turned else each for each in stack])
            numbers[tensor.dotted_path] = made
        elif tensor.part == "attention" and "_proj" in name:
            tensors, matrix = writer(rng, *tensor.checkpoint_shape)
            arrays |= {f"{name.removesuffix('.weight')}.{key}": array for key, array in tensors.items()}
            numbers[tensor.dotted_path] = matrix.reshape(tensor.shape)
        else:
            arrays[name] = random_tensor(tensor, 0, BF16).reshape(tensor.checkpoint_shape)
    directory.mkdir()
    shards = ShardWriter(directory, [PlannedTensor(n, a.shape, a.dtype) for n, a in arrays.items()], 1 << 40)
    for name, array in arrays.items():
        shards.write(name, array)
    shards.finish()
    values = config.to_dict() | {"quantization_config": stated}
    (directory / "config.json").write_text(json.dumps(values))
    return numbers


@pytest.mark.parametrize("fused", [False, True], ids=["one by one", "fused"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_read_and_kept_exactly(name, fused, config, tmp_path):
    """From its definition to safetensors, Orbax, our safetensors and Orbax again."""
    stated, writer = LAYOUTS[name]
    numbers = write(tmp_path / "theirs", config, stated, writer, fused=fused)
    done = convert(tmp_path / "theirs", tmp_path / "orbax")
    assert bool(done.dequantized) == ("any order" in name)
    convert(tmp_path / "orbax", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "again")
    if "any order" in name:
        numbers = {path: each.astype(BF16).astype(np.float32) for path, each in numbers.items()}
        assert not read_config(tmp_path / "orbax").quantization
    for place in ("theirs", "orbax", "ours", "again"):
        found = numbers_of(tmp_path / place)
        for path, expected in numbers.items():
            np.testing.assert_array_equal(found[path], expected, err_msg=f"{place} {path}")
    first, last = ((tmp_path / place / "config.json").read_text() for place in ("orbax", "again"))
    assert first == last


def test_what_is_missing_or_does_not_fit_is_named(config, tmp_path):
    stated, writer = LAYOUTS["awq"]

    def without_zeros(rng: np.random.Generator, out: int, inputs: int) -> Stored:
        tensors, numbers = writer(rng, out, inputs)
        del tensors["qzeros"]
        return tensors | {"scales": tensors["scales"][:, 1:].copy()}, numbers

    write(tmp_path / "bad", config, stated, without_zeros, fused=True)
    with pytest.raises(UserError) as error:
        convert(tmp_path / "bad", tmp_path / "orbax")
    assert "tensors are missing: model.layers.0.self_attn.q_proj.qzeros" in str(error.value)
    assert "tensors have another shape than config.json says" in str(error.value)
    assert not (tmp_path / "orbax").exists()
