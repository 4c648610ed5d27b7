"""A decoder layer and the vision encoder of the released model, as the runtime calls them."""

from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from keye_jax.config import KeyeConfig
from keye_jax.kv_cache import PAGE_SIZE, BatchMetadata, Pages
from keye_jax.model.attention import AttentionOptions
from keye_jax.model.context import PagedContext
from keye_jax.model.decode_layer import decode_layers, decodes_few_rows
from keye_jax.model.decoder import DecoderLayer
from keye_jax.model.vision import VisionEncoder
from keye_jax.sharding import MeshRules, StepSharding
from pallas_kernels.shapes import float32, int32, spec
from tests.tpu_compile.cases import CompileCase

CONFIG = KeyeConfig.from_file(Path(__file__).parents[2] / "configs" / "model" / "keye_vl_2_30b_a3b.json")
IMPLEMENTATION = "mosaic_tpu"


def _state(module: nnx.Module):
    """The graph, and the shapes of the parameters, of a module made under `nnx.eval_shape`."""
    graph, state = nnx.split(module)
    return graph, jax.tree.map(lambda leaf: spec(*leaf.shape, dtype=leaf.dtype), state)


def _decoder_layer(
    batch: int, tokens: int, context: int, *, cache_dtype: Literal["float8_e4m3fn"] | None = None, quick: bool = False
) -> CompileCase:
    graph, state = _state(nnx.eval_shape(lambda: DecoderLayer(CONFIG, rngs=nnx.Rngs(0))))
    options = AttentionOptions(implementation=IMPLEMENTATION, cache_dtype=cache_dtype)
    pages = context // PAGE_SIZE

    step = (StepSharding.prefill if tokens > 1 else StepSharding.decode)(MeshRules.single_device("tpu"))

    def run(state, x, angles, index_angles, pages, batch):
        # The pages are updated in place, as in the runtime's steps.
        layer: Any = nnx.merge(graph, state)
        context = PagedContext(pages, batch)
        if decodes_few_rows([layer], x, [context], options, step):
            norm = layer.input_norm  # In place of the next layer's.
            x, (context,), _ = decode_layers([layer], norm, x, angles, index_angles, [context], options, step)
        else:
            x, context, _ = layer(x, angles, index_angles, context, options, step)
        return x, context.pages

    rows = batch * pages, PAGE_SIZE, 2 * CONFIG.num_key_value_heads
    kv: Any = spec(*rows, CONFIG.head_dim, dtype=cache_dtype or jnp.bfloat16)
    kv_scales: Any = float32(*rows) if cache_dtype else None
    index_keys: Any = spec(batch * pages, PAGE_SIZE * CONFIG.sa_config.indexer_head_dim // 128, 128)
    page_table: Any = int32(batch, pages)
    per_sequence: Any = int32(batch)
    arguments = (
        state,
        spec(batch, tokens, CONFIG.hidden_size),
        float32(batch, tokens, CONFIG.head_dim // 2),
        float32(batch, tokens, CONFIG.sa_config.indexer_head_dim // 2),
        Pages(kv=kv, index_keys=index_keys, kv_scales=kv_scales),
        BatchMetadata(page_table=page_table, start=per_sequence, count=per_sequence),
    )
    shape = f"{batch} x {tokens} tokens, {context // 1024}K" + (", fp8 cache" if cache_dtype else "")
    return CompileCase("decoder_layer", shape, run, arguments, donated=(4,), quick=quick)


def _vision_encoder(images: int, patches: int) -> CompileCase:
    graph, state = _state(
        nnx.eval_shape(lambda: VisionEncoder(CONFIG.vision_config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    )
    pixels = CONFIG.vision_config.num_channels * CONFIG.vision_config.patch_size**2

    def run(state, pixels, sizes):
        return nnx.merge(graph, state)(pixels, sizes, implementation=IMPLEMENTATION)

    return CompileCase(
        "vision_encoder",
        f"{images} x {patches} patches",
        run,
        (state, float32(images, patches, pixels), int32(images, 2)),
    )


CASES = [
    _decoder_layer(1, 2048, 131_072),
    _decoder_layer(1, 2048, 262_144),
    _decoder_layer(1, 1, 131_072, quick=True),
    _decoder_layer(8, 1, 131_072),
    _decoder_layer(1, 2048, 16_384, cache_dtype="float8_e4m3fn"),
    _decoder_layer(4, 1, 16_384, cache_dtype="float8_e4m3fn", quick=True),
    _vision_encoder(8, 1024),
]
