"""The table of names."""

import math

import pytest

from convert import mapping
from convert.reader import read_header
from keye_jax.config import KeyeConfig
from tests.convert.convert_helpers import FULL_CONFIG, GOLDEN, small_config

FULL = KeyeConfig.from_file(FULL_CONFIG)


@pytest.mark.parametrize("config", [FULL, small_config()], ids=["full", "small"])
def test_one_to_one_and_reshape_only(config):
    tensors = mapping.rows(config)
    assert len({tensor.checkpoint_name for tensor in tensors}) == len(tensors)
    assert len({tensor.path for tensor in tensors}) == len(tensors)
    for tensor in tensors:
        assert math.prod(tensor.checkpoint_shape) == math.prod(tensor.shape) == tensor.size


def test_no_path_is_inside_another():
    paths = {tensor.path for tensor in mapping.rows(FULL)}
    assert not any(path[:length] in paths for path in paths for length in range(1, len(path)))


def test_full_count():
    tensors = mapping.rows(FULL)
    assert sum(tensor.size for tensor in tensors) == 31_122_082_160
    assert len(tensors) == 1215
    assert [tensor.dotted_path for tensor in tensors if not tensor.in_model] == [
        "vision.packing_position_embedding.weight"
    ]


def test_shapes_of_the_released_model():
    by_name = {tensor.checkpoint_name: tensor for tensor in mapping.rows(FULL)}
    indexer = by_name["model.layers.47.self_attn.sa_indexer.q_proj.weight"]
    assert (indexer.shape, indexer.dotted_path) == ((1040, 2048), "decoder.layers.47.indexer.q_proj.weight")
    attention = by_name["model.layers.0.self_attn.o_proj.weight"]
    assert (attention.checkpoint_shape, attention.shape) == ((2048, 4096), (2048, 32, 128))
    patches = by_name["visual.vision_model.embeddings.patch_embedding.weight"]
    assert (patches.checkpoint_shape, patches.shape) == ((1152, 3, 14, 14), (1152, 588))
    assert by_name["model.layers.3.mlp.experts.gate_up_proj"].shape == (128, 2048, 1536)


@pytest.mark.parametrize("name", ["a", "b"])
def test_names_of_the_golden_checkpoints(name):
    directory = GOLDEN / name
    stored = read_header(directory / "model.safetensors")
    tensors = {tensor.checkpoint_name: tensor for tensor in mapping.rows(KeyeConfig.from_file(directory))}
    assert stored.keys() == tensors.keys()
    assert all(tensors[key].accepts(entry.shape) for key, entry in stored.items())


def test_expert_pieces_tile_the_fused_tensor():
    config = small_config(1)
    for tensor in mapping.rows(config):
        pieces = mapping.expert_pieces(tensor)
        assert bool(pieces) == (tensor.part == "experts")
        assert sum(math.prod(piece.checkpoint_shape) for piece in pieces) == (tensor.size if pieces else 0)
        assert all(mapping.fused_name(piece.checkpoint_name) == tensor.checkpoint_name for piece in pieces)
    assert mapping.fused_name("model.layers.0.mlp.gate.weight") is None


def test_ignored_names():
    assert mapping.is_ignored("visual.vision_model.head.attention.in_proj_weight")
    assert mapping.is_ignored("model.rotary_emb.inv_freq")
    assert mapping.is_ignored("visual.vision_model.encoder.rotary_emb.inv_freq")
    assert not mapping.is_ignored("lm_head.weight")
    assert not mapping.is_ignored("visual.vision_model.header.weight")


def test_free_rows():
    table = next(tensor for tensor in mapping.rows(FULL) if tensor.free_rows)
    assert table.accepts((64, 1152)) and table.with_rows(64).shape == (64, 1152)
    assert not table.accepts((0, 1152)) and not table.accepts((64, 1151)) and not table.accepts((64,))
