"""The language model: embeddings, layers of sparse attention and experts, and the head."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from keye_jax.cache import Cache, LayerCache
from keye_jax.config import KeyeConfig
from keye_jax.model.attention import Attention, AttentionIntermediates, AttentionOptions, Placement
from keye_jax.model.indexer import Indexer
from keye_jax.model.layers import Linear, RMSNorm, param
from keye_jax.model.moe import MoE
from keye_jax.model.parallel import Parallel
from keye_jax.model.rope import mrope_angles
from keye_jax.model.vocab_parallel import look_up


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerIntermediates:
    """What a decoder layer computed.

    Attributes:
      attention: its attention's intermediates.
      experts: int32 `[b, t, k]`, each token's, best first.
      hidden: `[b, t, embed]`, the layer's output.
    """

    attention: AttentionIntermediates
    experts: jax.Array
    hidden: jax.Array


class DecoderLayer(nnx.Module):
    """`h = x + attention(norm(x))`, `y = h + moe(norm(h))`."""

    def __init__(self, config: KeyeConfig, *, rngs: nnx.Rngs):
        dtype = config.jax_dtype
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, axis="embed", dtype=dtype)
        self.attention = Attention(config, rngs=rngs)
        self.indexer = Indexer(config, rngs=rngs)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, axis="embed", dtype=dtype)
        self.moe = MoE(config, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        angles: jax.Array,
        index_angles: jax.Array,
        cache: LayerCache,
        placement: Placement,
        options: AttentionOptions,
        parallel: Parallel | None = None,
    ) -> tuple[jax.Array, LayerCache, LayerIntermediates | None]:
        gathers = parallel is not None and parallel.cache_sequence and x.shape[1] > 1
        if gathers:
            # So that no layer's cache is gathered, and held, before its turn.
            x, cache = jax.lax.optimization_barrier((x, cache))
        attended, cache, found = self.attention(
            self.input_norm(x), self.indexer, angles, index_angles, cache, placement, options, parallel
        )
        x = x + attended
        if parallel:
            x = parallel.constrain(x, parallel.batch, parallel.query_sequence)
        order = jnp.asarray(parallel.token_order(x.shape[1])) if parallel else jnp.arange(x.shape[1])
        with jax.named_scope("experts"):
            mixed, experts = self.moe(
                self.post_attention_norm(x),
                order < placement.count[:, None],
                implementation=options.implementation,
                parallel=parallel,
            )
        x = x + mixed
        if gathers:
            # Nor are the chunk's rows, of all devices, kept for writing them to the cache later.
            x, cache = jax.lax.optimization_barrier((x, cache))
        return x, cache, None if found is None else LayerIntermediates(found, experts, x)


@functools.partial(jax.jit, static_argnames=("graph", "options", "parallel"))
def _run_layer(
    graph: nnx.GraphDef[DecoderLayer],
    state: nnx.State,
    x: jax.Array,
    angles: jax.Array,
    index_angles: jax.Array,
    cache: LayerCache,
    placement: Placement,
    *,
    options: AttentionOptions,
    parallel: Parallel | None,
) -> tuple[jax.Array, LayerCache, LayerIntermediates | None]:
    """A layer as a function of its parameters: traced once for all layers, whatever their number."""
    return nnx.merge(graph, state)(x, angles, index_angles, cache, placement, options, parallel)


class Decoder(nnx.Module):
    """The language model.

    Attributes:
      embed_tokens: `[vocab, embed]`.
      lm_head: `[vocab, embed]`.
    """

    def __init__(self, config: KeyeConfig, *, rngs: nnx.Rngs):
        dtype = config.jax_dtype
        self.section, self.index_section = config.mrope_section, config.indexer_mrope_section
        self.rope_theta = config.rope_theta
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([DecoderLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, axis="embed", dtype=dtype)
        self.lm_head = Linear({"embed": config.hidden_size}, {"vocab": config.vocab_size}, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        count: jax.Array,
        cache: Cache,
        options: AttentionOptions,
        parallel: Parallel | None = None,
    ) -> tuple[jax.Array, Cache, tuple[LayerIntermediates, ...]]:
        """Reads `count` new tokens of each sequence behind those in the cache: a chunk of prefill, or a decode step.

        Args:
          x: `[b, t, embed]` token or vision embeddings.
          positions: int32 `[3, b, t]`: time, row, column.
          count: int32 `[b]`, how many of the t tokens are there.
          cache: with room for them.
          parallel: how the arrays lie over devices, tokens in the order of `Parallel.token_order`; None for one device.

        Returns:
          hidden states `[b, t, embed]` before the final norm, the cache, and intermediates of each layer if asked for.
        """
        angles = mrope_angles(positions, self.section, self.rope_theta)
        index_angles = mrope_angles(positions, self.index_section, self.rope_theta)
        placement = Placement(cache.page_table, cache.lengths, count)
        layers, found = [], []
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            graph, state = nnx.split(layer)
            x, layer_cache, intermediates = _run_layer(
                graph, state, x, angles, index_angles, layer_cache, placement, options=options, parallel=parallel
            )
            layers.append(layer_cache)
            found.append(intermediates)
        cache = Cache(tuple(layers), cache.page_table, cache.lengths + count)
        return x, cache, tuple(item for item in found if item is not None)

    def embed(self, ids: jax.Array, parallel: Parallel | None = None) -> jax.Array:
        """`[b, t, embed]` of ids `[b, t]`."""
        if parallel and parallel.vocab:
            return look_up(self.embed_tokens.weight[...], ids, parallel)
        return self.embed_tokens(ids)

    def logits(self, hidden: jax.Array, parallel: Parallel | None = None) -> jax.Array:
        """float32 `[..., vocab]` of hidden states `[..., embed]` before the final norm; on every device."""
        if parallel is None:
            return self.lm_head(self.norm(hidden), dtype=jnp.float32)
        logits = self.lm_head(self.norm(parallel.constrain(hidden)), dtype=jnp.float32)
        split = ((),) * (logits.ndim - 1)
        return parallel.constrain(parallel.constrain(logits, *split, parallel.vocab))


class Embedding(nnx.Module):
    """A table `weight [vocab, embed]`."""

    def __init__(self, size: int, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.weight = param(rngs, (size, width), ("vocab", "embed"), dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """`[..., embed]` of ids `[...]`."""
        return jnp.take(self.weight[...], ids, axis=0)
