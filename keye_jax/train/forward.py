"""The model's losses of a batch of packed samples, as a differentiable function of its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from keye_jax.kv_cache import PAGE_SIZE
from keye_jax.model.attention import AttentionInputs, AttentionOptions
from keye_jax.model.context import PackedContext, own_rows
from keye_jax.model.keye import Keye
from keye_jax.model.moe import MoE
from keye_jax.model.projector import Projector
from keye_jax.model.vision import VisionEncoder
from keye_jax.sharding.collectives import all_gather, sum_over
from keye_jax.sharding.step import StepSharding, spec
from keye_jax.train.attention import (
    SAVED,
    AttentionPlan,
    IndexerMeasures,
    KeysAndValues,
    Queries,
    attend,
    best_kernels,
    same_branch,
)
from keye_jax.train.experts import mix_experts
from keye_jax.train.loss import cross_entropy


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """How losses are computed; static in a compiled step.

    Attributes:
      attention: "sparse", the model as released, or "dense", as in the indexer's warm-up.
      kl: whether the indexer learns: its KL divergence from attention is computed, over the keys attended to.
      recall: whether the share of attention on the selected keys is measured too, which dense attention takes a
        selection for.
      detach: whether the indexer's input is detached, as released: else the KL divergence reaches the whole model.
      router: whether the routers' load-balancing loss is computed.
      remat: what is computed again in the backward pass instead of being kept: "none", each "layer" but what attention
        gives, which would take longest ("attention"), or each "layer" whole.
      pixel_scale, pixel_shift: of each colour channel; the encoder sees `patches * scale + shift`.
      block_bytes: most bytes of the attention scores of one block of queries, and of the logits of one chunk of tokens;
        a few such arrays are there at once.
      scan_layers: whether the decoder's layers, which must be alike, are one loop. It compiles sooner, and copies their
        weights.
    """

    attention: Literal["sparse", "dense"] = "sparse"
    kl: bool = True
    recall: bool = True
    detach: bool = True
    router: bool = False
    remat: Literal["none", "attention", "layer"] = "attention"
    pixel_scale: tuple[float, ...] = (2 / 255,) * 3
    pixel_shift: tuple[float, ...] = (-1.0,) * 3
    block_bytes: int = 2**30
    scan_layers: bool = False

    def attend(
        self,
        inputs: AttentionInputs,
        context: PackedContext,
        step: StepSharding,
        *,
        top_k: int,
        scale: float,
        index_scale: float,
    ) -> tuple[jax.Array, IndexerMeasures]:
        """Attention of the rows that a device has, inside `StepSharding.shard_map`.

        Returns:
          `[b, t, n, d]`, and measures, means over the groups of heads.
        """
        batch = context.batch
        width, tokens = batch.page_table.shape[1] * PAGE_SIZE, inputs.q.shape[1]
        # Where rows are as long as the longest sample, each is one, and needs no other device's rows.
        own = width == tokens
        if own and self.attention == "dense" and not self.kl and _has_fused_attention(inputs.q):
            out = fused_attention(inputs.q, inputs.k, inputs.v, context.branch, scale)
            zeros = jnp.zeros(out.shape[:2], jnp.float32)
            return out, IndexerMeasures(zeros, zeros, zeros)
        plan = AttentionPlan(
            sparse=self.attention == "sparse",
            kl=self.kl,
            recall=self.recall,
            top_k=top_k,
            scale=scale,
            index_scale=index_scale,
            width=None if own else width,
            block_bytes=self.block_bytes,
        )
        queries = Queries(inputs.q, inputs.index_q, inputs.gates)
        keys = KeysAndValues(inputs.k, inputs.v, inputs.index_keys)
        start = first = jnp.zeros(len(inputs.q), jnp.int32)
        if not own:
            keys = jax.tree.map(lambda x: all_gather(x, step.query_sequence, axis=0), keys)
            keys = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), keys)
            rows = own_rows(batch, step)
            start, first = rows.start, rows.tables(rows.page_table)[:, 0] * PAGE_SIZE
        if plan.sparse and not plan.kl and context.branch is None:
            plan = dataclasses.replace(plan, kernels=best_kernels(plan, queries, keys, start, first))
        attended: Any = attend(plan, queries, keys, start, first, context.branch)
        out, measures = attended
        groups = inputs.k.shape[2] * step.size(step.heads)
        return out, jax.tree.map(lambda x: sum_over(x, step.heads) / groups, measures)

    def mix_experts(self, *arrays: jax.Array, num_experts: int, rows_at_once: int | None = None) -> jax.Array:
        """See `keye_jax.train.experts.mix_experts`."""
        return mix_experts(*arrays, num_experts=num_experts, rows_at_once=rows_at_once)

    def balance(self, moe: MoE, x: jax.Array, experts: jax.Array, valid: jax.Array) -> jax.Array | None:
        """The load-balancing loss of a layer, 1 where all experts are as busy (Switch Transformer, equation 4).

        Args:
          x: `[b, t, embed]`.
          experts: int32 `[b, t, k]`.
          valid: bool `[b, t]`.

        Returns:
          float32 `[]`, or None if it is not asked for.
        """
        if not self.router:
            return None
        probabilities = jax.nn.softmax(moe.router(x, dtype=jnp.float32), axis=-1)
        tokens = jnp.maximum(jnp.sum(valid), 1)
        chosen = jnp.sum(experts[..., None] == jnp.arange(moe.num_experts), axis=2) / experts.shape[-1]
        chosen, probabilities = (
            jnp.sum(jnp.where(valid[..., None], x, 0), axis=(0, 1)) / tokens for x in (chosen, probabilities)
        )
        return moe.num_experts * jnp.sum(chosen * probabilities)

    def run_layers(
        self, layer: Callable[[Any, jax.Array], tuple[jax.Array, Any]], states: Sequence[Any], x: jax.Array
    ) -> tuple[jax.Array, list[Any]]:
        """See `keye_jax.model.attention.Training`."""
        run, found = self.rematerialise(layer), []
        if not self.scan_layers:
            for state in states:
                x, each = run(state, x)
                found.append(each)
            return x, found
        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *states)
        x, learned = jax.lax.scan(lambda x, state: run(state, x), x, stacked)
        return x, [jax.tree.map(lambda array, index=index: array[index], learned) for index in range(len(states))]

    def rematerialise(self, layer: Callable) -> Callable:
        """The layer, computed again in the backward pass as `remat` says."""
        if self.remat == "none":
            return layer
        saved = jax.checkpoint_policies.save_only_these_names(SAVED) if self.remat == "attention" else None
        return jax.checkpoint(layer, policy=saved)


def fused_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, branch: jax.Array | None, scale: float, implementation: Any = "cudnn"
) -> jax.Array:
    """Dense causal attention of rows that are samples, without an array of scores; no indexer learns from it.

    Args:
      q: `[b, t, n, d]`.
      k, v: `[b, t, kv_heads, d]`.
      branch: as of `PackedContext`.
      implementation: of `jax.nn.dot_product_attention`.

    Returns:
      `[b, t, n, d]`.
    """
    mask = None if branch is None else same_branch(branch, branch)[:, None]
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=scale, is_causal=True, implementation=implementation
    ).astype(q.dtype)


def _has_fused_attention(q: jax.Array) -> bool:
    """Whether cuDNN attends from such queries."""
    return jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Images:
    """Images, or frames, of one padded size.

    Attributes:
      patches: uint8 `[f, p, channels * patch * patch]`, each image's in raster order; p a multiple of merge * merge.
      sizes: int32 `[f, 2]`, height and width of each in patches; `[1, 2]` where all have the same.
    """

    patches: jax.Array
    sizes: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """Samples in rows of t tokens, each from the beginning of a row; t is a multiple of `PAGE_SIZE`.

    Attributes:
      ids: int32 `[rows, t]`.
      positions: int32 `[3, rows, t]`: time, row, column.
      targets: int32 `[rows, t]`, the token that follows each; -1 where it is not learned.
      context: which row belongs to which sample, as `PackedContext.of` makes it.
      images: of all samples.
      vision_index: int32 `[rows, t]`, which token of the images stands there, counted through `images`; -1 for none.
    """

    ids: jax.Array
    positions: jax.Array
    targets: jax.Array
    context: PackedContext
    images: tuple[Images, ...]
    vision_index: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Losses:
    """Sums over a batch and their counts, so that batches add up. Layers are along the first dimension.

    Attributes:
      language: float32 `[]`, negative log-likelihood of the targets, in nats.
      correct: int32 `[]`, targets that have the largest logit.
      targets: int32 `[]`, how many there are.
      kl: float32 `[l]`, the indexer's KL divergence, a mean over the groups of heads, in nats.
      entropy: float32 `[l]`, of its teacher: the mean of attention over the heads of a group.
      recall: float32 `[l]`, shares of dense attention that lie on the selected keys.
      tokens: int32 `[]`, how many there are.
      router: float32 `[l]`, the load-balancing loss times the tokens.
    """

    language: jax.Array
    correct: jax.Array
    targets: jax.Array
    kl: jax.Array
    entropy: jax.Array
    recall: jax.Array
    tokens: jax.Array
    router: jax.Array


def forward_losses(model: Keye, batch: PackedBatch, options: TrainOptions, step: StepSharding) -> Losses:
    """The losses of a batch, differentiable in the parameters of the model.

    Rows and images are shared out over devices as by a step that reads prompts, `StepSharding.prefill`; their numbers
    are multiples of those of the devices. Parameters may be float32 or bfloat16; sums are float32.
    """
    vision = [_encode(model, images, options, step) for images in batch.images]
    nothing = jnp.zeros_like(model.decoder.embed_tokens.weight[:1])
    x = model.embed(batch.ids, jnp.concatenate(vision) if vision else nothing, batch.vision_index, step)
    decoder, contexts = model.decoder, (batch.context,) * len(model.decoder.layers)
    attention = AttentionOptions(options.attention, training=options)
    hidden, _, layers = decoder(x, batch.positions, contexts, attention, step)
    found: Any = cross_entropy(
        decoder.norm(hidden), decoder.lm_head.weight[...], batch.targets, step, options.block_bytes
    )
    language, correct = found
    valid = batch.context.batch.valid(batch.ids.shape[1])
    tokens = jnp.sum(valid, dtype=jnp.int32)

    def of_layers(each: list[jax.Array]) -> jax.Array:
        return jnp.stack([jnp.sum(jnp.where(valid, x, 0)) for x in each])

    measures = [layer.attention for layer in layers]
    return Losses(
        language=language,
        correct=correct,
        targets=jnp.sum(batch.targets >= 0, dtype=jnp.int32),
        kl=of_layers([each.kl for each in measures]),
        entropy=of_layers([each.entropy for each in measures]),
        recall=of_layers([each.recall for each in measures]),
        tokens=tokens,
        router=tokens * jnp.stack([jnp.float32(0) if x.balance is None else x.balance for x in layers]),
    )


def _encode(model: Keye, images: Images, options: TrainOptions, step: StepSharding) -> jax.Array:
    """Embeddings of images, `[f * tokens, embed]`, on every device."""

    def run(modules: tuple[VisionEncoder, Projector], patches: jax.Array, sizes: jax.Array) -> jax.Array:
        vision, projector = modules
        features = patches.shape[-1] // len(options.pixel_scale)
        scale, shift = (
            np.repeat(np.asarray(x, np.float32), features) for x in (options.pixel_scale, options.pixel_shift)
        )
        pixels = patches.astype(jnp.float32) * scale + shift
        hidden = vision(pixels, sizes, implementation="xla", rematerialise=options.rematerialise)
        return projector(hidden, sizes)

    each = spec(step.vision_patches)
    same = len(images.sizes) < len(images.patches)
    call = step.shard_module((model.vision, model.projector), run, (each, spec() if same else each), each)
    tokens = step.constrain(call(images.patches, images.sizes))
    return tokens.reshape(-1, tokens.shape[-1])
