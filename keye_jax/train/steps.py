"""The compiled steps of training, and the batches that they take."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from keye_jax.kv_cache import BatchMetadata
from keye_jax.model.context import PackedContext
from keye_jax.sharding import StepSharding
from keye_jax.sharding.collectives import Axes
from keye_jax.train.config import LossConfig
from keye_jax.train.forward import Images, Losses, PackedBatch, TrainOptions, forward_losses
from keye_jax.train.optimizer import apply_gradients, gradient_norms
from keye_jax.train.packing import PackedArrays
from keye_jax.train.weights import ModelDef, Weights, cast


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
    """The training of one model by one stage; the steps are compiled once.

    Attributes:
      model: without its weights.
      options: how losses are computed.
      loss: their weights.
      lora_scale: of the products of low-rank pairs.
      dtypes: of weights that train, in the forward pass.
      optimizer: of them.
      shardings: where they and their gradients lie; empty on one device.
      step: how a batch lies over devices.
    """

    model: ModelDef
    options: TrainOptions
    loss: LossConfig
    lora_scale: float
    dtypes: Mapping[str, jnp.dtype]
    optimizer: optax.GradientTransformation
    shardings: Mapping[str, jax.sharding.Sharding]
    step: StepSharding

    def losses(self, weights: Weights, frozen: Weights, batch: PackedBatch) -> Losses:
        """The losses of a batch; see `forward_losses`."""
        model = self.model.merge(frozen | cast(weights, self.dtypes), self.lora_scale)
        return forward_losses(model, batch, self.options, self.step)

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
    def train(
        self, weights: Weights, moments: optax.OptState, frozen: Weights, batches: tuple[PackedBatch, ...]
    ) -> tuple[Weights, optax.OptState, dict[str, jax.Array]]:
        """One step: gradients of all batches together, clipped and applied.

        Means are over the targets and tokens of all batches, so several batches are one larger one.

        Returns:
          weights and moments after the step, and what `measures` says of it, with the gradients' norms.
        """
        targets = jnp.maximum(sum(jnp.sum(each.targets >= 0) for each in batches), 1)
        tokens = jnp.maximum(sum(jnp.sum(each.context.batch.count) for each in batches), 1)

        def objective(weights: Weights, batch: PackedBatch) -> tuple[jax.Array, Losses]:
            model = self.model.merge(frozen | weights, self.lora_scale)
            losses = forward_losses(model, batch, self.options, self.step)
            language = losses.language / targets if self.loss.language else 0.0
            others = self.loss.kl * jnp.sum(losses.kl) + self.loss.router * jnp.sum(losses.router)
            return language + others / tokens, losses

        used = cast(weights, self.dtypes)
        gradient = jax.grad(objective, has_aux=True)
        gradients, losses = gradient(used, batches[0])
        if len(batches) > 1:
            gradients = {path: value.astype(jnp.float32) for path, value in gradients.items()}
            stacked = jax.tree.map(lambda *each: jnp.stack(each), *batches[1:])

            def add(sums: Any, batch: PackedBatch) -> tuple[Any, None]:
                return jax.tree.map(
                    lambda total, more: total + more.astype(total.dtype), sums, gradient(used, batch)
                ), None

            (gradients, losses), _ = jax.lax.scan(add, (gradients, losses), stacked)
        gradients = self._in_place(gradients)
        found = measures(losses) | gradient_norms(gradients)
        if not self.options.recall:
            del found["recall"]
        weights, moments = apply_gradients(self.optimizer, weights, gradients, moments)
        return self._in_place(weights), moments, found

    def _in_place(self, values: Weights) -> Weights:
        """Values of what trains, each where it is to lie."""
        return {
            path: jax.lax.with_sharding_constraint(value, self.shardings[path]) if path in self.shardings else value
            for path, value in values.items()
        }

    @functools.partial(jax.jit, static_argnums=0)
    def evaluate(self, weights: Weights, frozen: Weights, batch: PackedBatch) -> Losses:
        """The losses of a batch, without gradients."""
        options = dataclasses.replace(self.options, recall=True)
        return dataclasses.replace(self, options=options).losses(weights, frozen, batch)

    def place(self, batch: PackedArrays) -> PackedBatch:
        """A batch on the devices."""
        rules, rows = self.step.rules, self.step.rows

        def put(array: np.ndarray, *dimensions: Axes) -> jax.Array:
            return jax.device_put(array, rules.over(*dimensions))

        own = self.step.batch
        metadata = BatchMetadata(
            page_table=put(batch.page_table, own),
            start=put(batch.start, own),
            count=put(batch.count, own),
            sequence=put(batch.sequence, own),
        )
        vision = self.step.vision_patches

        def sizes_over(patches: Any, sizes: Any) -> Axes:
            return vision if len(sizes) == len(patches) else ()

        return PackedBatch(
            ids=put(batch.ids, rows),
            positions=put(batch.positions, (), rows),
            targets=put(batch.targets, rows),
            context=PackedContext(metadata, None if batch.branch is None else put(batch.branch, rows)),
            images=tuple(
                Images(put(patches, vision), put(sizes, sizes_over(patches, sizes))) for patches, sizes in batch.images
            ),
            vision_index=put(batch.vision_index, rows),
        )


def measures(losses: Losses) -> dict[str, jax.Array]:
    """Means of a step or an evaluation, float32: over targets and tokens, and of the indexers' over layers."""
    targets, tokens = jnp.maximum(losses.targets, 1), jnp.maximum(losses.tokens, 1)
    return {
        "language": losses.language / targets,
        "accuracy": losses.correct / targets,
        "kl": jnp.mean(losses.kl) / tokens,
        "recall": jnp.mean(losses.recall) / tokens,
        "entropy": jnp.mean(losses.entropy) / tokens,
        "router": jnp.mean(losses.router) / tokens,
        "targets": losses.targets,
        "tokens": losses.tokens,
    }


def selecting_share(batches: Sequence[PackedArrays], top_k: int) -> float:
    """The share of tokens that see more keys than `top_k`, so that some are left out."""
    column = np.arange(batches[0].ids.shape[1])
    valid = [column < each.count[:, None] for each in batches]
    choosing = [each.start[:, None] + column >= top_k for each in batches]
    chosen = sum(int(np.sum(here & there)) for here, there in zip(valid, choosing, strict=True))
    return chosen / max(1, sum(map(int, map(np.sum, valid))))
