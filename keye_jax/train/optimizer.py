"""AdamW over the weights that train: schedules, clipping, weight decay and groups with learning rates of their own."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from keye_jax.train.config import INDEXER, OptimizerConfig
from keye_jax.train.lora import weight_name
from keye_jax.train.patterns import chosen, matches


def schedule(config: OptimizerConfig, steps: int) -> Callable[[Any], Any]:
    """The share of the peak learning rate by step.

    It rises from 0 in a line for `warmup` of all steps, and then follows the schedule down to `final` at the last.
    """
    rising = round(config.warmup * steps)
    falling = max(1, steps - rising)
    after = {
        "constant": lambda: optax.constant_schedule(1.0),
        "cosine": lambda: optax.cosine_decay_schedule(1.0, falling, alpha=config.final),
        "linear": lambda: optax.linear_schedule(1.0, config.final, falling),
    }[config.schedule]()
    if not rising:
        return after
    # The first step already moves: its share is 1 / rising.
    return optax.join_schedules([lambda count: (count + 1) / rising, after], [rising])


def learning_rate_of(config: OptimizerConfig, path: str) -> float:
    """The peak learning rate of a weight: of the last pattern that matches it."""
    found = [rate for pattern, rate in config.lr_of.items() if matches(pattern, weight_name(path))]
    return found[-1] if found else config.lr


def make_optimizer(config: OptimizerConfig, steps: int, paths: list[str]) -> optax.GradientTransformation:
    """The optimiser of the weights at `paths`, which are dotted; low-rank pairs belong to the group of their weight.

    Its state is a pytree of arrays. Only weights that train have moments, since it gets no others.
    """
    rates = {path: learning_rate_of(config, path) for path in paths}
    decayed = {path: not chosen(config.no_decay, weight_name(path)) for path in paths}
    share = schedule(config, steps)

    def group(rate: float, decay: bool) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_adam(*config.betas, eps=config.eps),
            *([optax.add_decayed_weights(config.weight_decay)] if decay and config.weight_decay else []),
            optax.scale_by_learning_rate(lambda count: rate * share(count)),
        )

    labels = {path: f"{rates[path]:g} {decayed[path]}" for path in paths}
    groups: dict[Hashable, optax.GradientTransformation] = {
        labels[path]: group(rates[path], decayed[path]) for path in paths
    }
    return optax.chain(_clip(config, paths), optax.partition(groups, labels))


def is_indexer(path: str) -> bool:
    """Whether a weight, or a pair, is an indexer's."""
    return matches(INDEXER, weight_name(path))


def _clip(config: OptimizerConfig, paths: list[str]) -> optax.GradientTransformation:
    """Clips the norm of the indexers' gradients, and that of all others."""

    def by_norm(limit: float) -> optax.GradientTransformation:
        return optax.clip_by_global_norm(limit) if limit else optax.identity()

    limits: dict[Hashable, optax.GradientTransformation] = {
        "indexer": by_norm(config.indexer_clip),
        "others": by_norm(config.clip),
    }
    return optax.partition(limits, {path: "indexer" if is_indexer(path) else "others" for path in paths})


def gradient_norms(gradients: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Norms of the gradients before clipping, float32: of the indexers, and of all others."""
    apart = {
        "indexer_norm": [value for path, value in gradients.items() if is_indexer(path)],
        "norm": [value for path, value in gradients.items() if not is_indexer(path)],
    }
    return {name: optax.tree.norm(values) for name, values in apart.items() if values}


def as_float32(weights: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """In the dtype of moments and updates."""
    return {path: value.astype(jnp.float32) for path, value in weights.items()}


def init_optimizer(optimizer: optax.GradientTransformation, weights: dict[str, jax.Array]) -> optax.OptState:
    """The state before the first step; moments are float32 and lie as their weights do."""

    def init(weights: dict[str, jax.Array]) -> optax.OptState:
        return optimizer.init(as_float32(weights))

    some = next(iter(weights.values())).sharding
    everywhere = NamedSharding(some.mesh, PartitionSpec()) if isinstance(some, NamedSharding) else some

    def sharding(path: tuple[Any, ...], leaf: Any) -> jax.sharding.Sharding:
        names = (key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        weight = next((weights[name] for name in names if name in weights), None)
        return everywhere if weight is None or leaf.shape != weight.shape else weight.sharding

    shardings = jax.tree_util.tree_map_with_path(sharding, jax.eval_shape(init, weights))
    return jax.jit(init, out_shardings=shardings)(weights)


def apply_gradients(
    optimizer: optax.GradientTransformation,
    weights: dict[str, jax.Array],
    gradients: Mapping[str, jax.Array],
    state: optax.OptState,
) -> tuple[dict[str, jax.Array], optax.OptState]:
    """One step, computed in float32.

    Returns:
      the weights in the dtypes that they had, and the optimiser's state.
    """
    exact = as_float32(weights)
    updates, state = optimizer.update(as_float32(gradients), state, exact)
    moved: Any = optax.apply_updates(exact, updates)
    return {path: moved[path].astype(value.dtype) for path, value in weights.items()}, state
