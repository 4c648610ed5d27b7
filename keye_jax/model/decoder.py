"""The language model: embeddings, layers of sparse attention and experts, and the head."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from keye_jax.config import KeyeConfig
from keye_jax.model.attention import Attention, AttentionIntermediates, AttentionOptions
from keye_jax.model.context import Context
from keye_jax.model.decode_layer import DecodeIntermediates, decode_layers, decodes_few_rows
from keye_jax.model.embedding import Embedding
from keye_jax.model.indexer import Indexer
from keye_jax.model.layers import Linear, RMSNorm
from keye_jax.model.moe import MoE
from keye_jax.model.rope import mrope_angles
from keye_jax.sharding.step import StepSharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerIntermediates:
    """What a decoder layer computed.

    Attributes:
      attention: its attention's intermediates.
      moe_input: `[b, t, embed]`, what its router and experts are given.
      experts: int32 `[b, t, k]`, each token's, best first.
      hidden: `[b, t, embed]`, the layer's output.
    """

    attention: AttentionIntermediates
    moe_input: jax.Array
    experts: jax.Array
    hidden: jax.Array

    @classmethod
    def of_decode(cls, found: DecodeIntermediates) -> LayerIntermediates:
        """Of a token of each row."""
        return cls(found.attention, *(each[:, None] for each in (found.moe_input, found.experts, found.hidden)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerLearned:
    """What training learns of in a decoder layer, as `Training` returns it.

    Attributes:
      attention: of its attention.
      balance: of its experts.
    """

    attention: Any
    balance: jax.Array | None


class DecoderLayer(nnx.Module):
    """`h = x + attention(norm(x))`, `y = h + moe(norm(h))`."""

    def __init__(self, config: KeyeConfig, *, rngs: nnx.Rngs):
        dtype = config.jax_dtype
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, axis="embed", dtype=dtype)
        self.attention = Attention(config, rngs=rngs)
        self.indexer = Indexer(config, rngs=rngs)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, axis="embed", dtype=dtype)
        self.moe = MoE(config, rngs=rngs)

    def __call__[C: Context](
        self,
        x: jax.Array,
        angles: jax.Array,
        index_angles: jax.Array,
        context: C,
        options: AttentionOptions,
        step: StepSharding,
    ) -> tuple[jax.Array, C, LayerIntermediates | LayerLearned | None]:
        attended, context, found = self.attention(
            self.input_norm(x), self.indexer, angles, index_angles, context, options, step
        )
        x = step.constrain(x + attended, step.rows)
        valid = context.batch.valid(x.shape[1])
        normed = self.post_attention_norm(x)
        mixed, experts = self.moe(
            normed,
            valid,
            step,
            activation_dtype=options.activation_dtype if step.reads_prompts else None,
            implementation=options.implementation,
            training=options.training,
        )
        x = x + mixed
        if options.training is not None:
            return x, context, LayerLearned(found, options.training.balance(self.moe, normed, experts, valid))
        return x, context, None if found is None else LayerIntermediates(found, normed, experts, x)


def _in_its_turn[C: Context](x: jax.Array, context: C, step: StepSharding) -> tuple[jax.Array, C]:
    """Holds the compiler to one layer after the other where a layer gathers pages.

    Otherwise it gathers those of later layers early, and keeps the chunk's rows of all devices for writing them to the
    pages later; both cost memory for each layer.
    """
    return jax.lax.optimization_barrier((x, context)) if step.gathers_pages else (x, context)


@functools.partial(jax.jit, static_argnames=("graph", "options", "step"))
def _run_layer[C: Context](
    graph: nnx.GraphDef[DecoderLayer],
    state: nnx.State,
    x: jax.Array,
    angles: jax.Array,
    index_angles: jax.Array,
    context: C,
    *,
    options: AttentionOptions,
    step: StepSharding,
) -> tuple[jax.Array, C, LayerIntermediates | LayerLearned | None]:
    """A layer as a function of its parameters: traced once for all layers."""
    x, context = _in_its_turn(x, context, step)
    x, context, found = nnx.merge(graph, state)(x, angles, index_angles, context, options, step)
    x, context = _in_its_turn(x, context, step)
    return x, context, found


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

    def __call__[C: Context](
        self,
        x: jax.Array,
        positions: jax.Array,
        contexts: tuple[C, ...],
        options: AttentionOptions,
        step: StepSharding,
        addresses: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[C, ...], tuple[Any, ...]]:
        """Reads new tokens: a chunk of prompts, a step of decode, or packed samples.

        Args:
          x: `[b, t, embed]` token or vision embeddings of b rows.
          positions: int32 `[3, b, t]`: time, row, column.
          contexts: what each layer's tokens attend to.
          step: how the arrays lie over devices.
          addresses: what `exchange_addresses` gives for a step of decode.

        Returns:
          hidden states `[b, t, embed]` before the final norm, the contexts with the new tokens, and of each layer
          `LayerIntermediates` if the options ask for them, or `LayerLearned` in training.
        """
        angles = mrope_angles(positions, self.section, self.rope_theta)
        index_angles = mrope_angles(positions, self.index_section, self.rope_theta)
        if options.training is not None:
            return self._train(x, angles, index_angles, contexts, options, step)
        if decodes_few_rows(self.layers, x, contexts, options, step):
            args = x, angles, index_angles, contexts, options, step, addresses
            x, after, found = decode_layers(self.layers, self.norm, *args)
            return x, tuple(after), tuple(LayerIntermediates.of_decode(each) for each in found)
        after, found = [], []
        for layer, context in zip(self.layers, contexts, strict=True):
            graph, state = nnx.split(layer)
            run = functools.partial(_run_layer, graph, options=options, step=step)
            x, context, intermediates = run(state, x, angles, index_angles, context)
            after.append(context)
            found.append(intermediates)
        return x, tuple(after), tuple(item for item in found if item is not None)

    def _train[C: Context](
        self,
        x: jax.Array,
        angles: jax.Array,
        index_angles: jax.Array,
        contexts: tuple[C, ...],
        options: AttentionOptions,
        step: StepSharding,
    ) -> tuple[jax.Array, tuple[C, ...], tuple[Any, ...]]:
        """`__call__` in training, where all layers have the same context and leave it as it is."""
        assert options.training is not None
        graphs, states = zip(*map(nnx.split, self.layers), strict=True)

        def run(state: nnx.State, x: jax.Array) -> tuple[jax.Array, Any]:
            x, _, learned = _run_layer(
                graphs[0], state, x, angles, index_angles, contexts[0], options=options, step=step
            )
            return x, learned

        x, found = options.training.run_layers(run, states, x)
        return x, contexts, tuple(found)

    def logits(self, hidden: jax.Array, step: StepSharding) -> jax.Array:
        """float32 `[..., vocab]` of hidden states `[..., embed]` before the final norm; on every device."""
        logits = self.lm_head(self.norm(step.constrain(hidden)), dtype=jnp.float32)
        not_split = ((),) * (logits.ndim - 1)
        return step.constrain(step.constrain(logits, *not_split, step.vocab))
