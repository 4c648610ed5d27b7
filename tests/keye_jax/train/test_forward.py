"""The losses of a batch and their gradients in every parameter, against the model written out in float64."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from keye_jax.config import KeyeConfig
from keye_jax.model.context import PackedContext
from keye_jax.model.keye import Keye
from keye_jax.model.params import shard_params
from keye_jax.sharding import MeshRules, StepSharding
from keye_jax.train.forward import Images, Losses, PackedBatch, TrainOptions, forward_losses
from tests.keye_jax.golden_models import golden_model, preset, rules_of
from tests.keye_jax.train import reference
from tests.near_ties import assert_leads, selection_leads

LENGTHS, GRIDS, SEED = (130, 75), ((4, 6), (6, 4), (4, 6)), 4
"""Of two samples, the first with one image and the second with two; heights and widths are in patches."""
LEAD = 4e-4

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@functools.cache
def model_and_config() -> tuple[Keye, KeyeConfig]:
    return golden_model("a", 2)


@functools.cache
def samples() -> tuple[reference.Sample, ...]:
    config, rng = model_and_config()[1], np.random.default_rng(SEED)
    pixels = config.vision_config.num_channels * config.vision_config.patch_size**2
    found = []
    for length, grids in zip(LENGTHS, (GRIDS[:1], GRIDS[1:]), strict=True):
        ids = rng.integers(0, 490, length).astype(np.int32)
        index = np.full(length, -1, np.int32)
        tokens = sum(h * w // 4 for h, w in grids)
        index[5 : 5 + tokens] = np.arange(tokens)
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), (3, length)).copy()
        positions[1:, 5 : 5 + tokens] += rng.integers(0, 5, (2, tokens)).astype(np.int32)
        targets = np.where(rng.random(length) < 0.3, np.roll(ids, -1), -1).astype(np.int32)
        images = tuple(rng.integers(0, 256, (h, w, pixels)).astype(np.uint8) for h, w in grids)
        found.append(reference.Sample(ids, targets, positions, index, images))
    return tuple(found)


def text_batch(ids: np.ndarray, tokens: int) -> PackedBatch:
    """One text without targets in a row."""
    at = jnp.arange(tokens, dtype=jnp.int32)
    nothing = jnp.full((1, tokens), -1, jnp.int32)
    padded = jnp.asarray(np.pad(ids, (0, tokens - len(ids)))[None].astype(np.int32))
    context = PackedContext.of([len(ids)], tokens)
    return PackedBatch(padded, jnp.broadcast_to(at, (3, 1, tokens)), nothing, context, (), nothing)


def batch_of(tokens: int, *, rows: int, parts: int = 1) -> PackedBatch:
    """The samples in rows of `tokens` tokens, of which each part has as many; idle rows and images fill them up.

    Args:
      parts: 1, or 2 for a sample in each.
    """
    each = {"rows": rows // parts, "samples": 3, "longest": 192}
    of_part = [LENGTHS] if parts == 1 else [(length,) for length in LENGTHS]
    context = PackedContext.join([PackedContext.of(lengths, tokens, **each) for lengths in of_part])
    ids, targets, index = (np.full((rows, tokens), fill, np.int32) for fill in (0, -1, -1))
    positions, begin, image_tokens = np.zeros((3, rows, tokens), np.int32), 0, 0
    for number, sample in enumerate(samples()):
        begin = max(begin, number * rows // parts * tokens if parts > 1 else 0)
        own = slice(begin, begin + len(sample.ids))
        ids.reshape(-1)[own], targets.reshape(-1)[own] = sample.ids, sample.targets
        index.reshape(-1)[own] = np.where(sample.vision_index < 0, -1, sample.vision_index + image_tokens)
        positions.reshape(3, -1)[:, own] = sample.positions
        begin += -(-len(sample.ids) // tokens) * tokens
        image_tokens += sum(image.shape[0] * image.shape[1] // 4 for image in sample.images)
    patches = [image.reshape(-1, image.shape[-1]) for sample in samples() for image in sample.images]
    patches += [np.zeros_like(patches[0])] * (8 - len(patches))
    images = Images(jnp.asarray(np.stack(patches)), jnp.asarray(GRIDS + GRIDS[:1] * 5, jnp.int32))
    ids, positions, targets, index = map(jnp.asarray, (ids, positions, targets, index))
    return PackedBatch(ids, positions, targets, context, (images,), index)


KL_WEIGHT, ROUTER_WEIGHT = 0.3, 0.2


def objective(losses: Losses) -> jax.Array:
    """A sum over the batch."""
    return losses.language + KL_WEIGHT * jnp.sum(losses.kl) + ROUTER_WEIGHT * jnp.sum(losses.router)


def reference_objective(results: list[reference.Results]) -> jax.Array:
    config, layers = model_and_config()[1], range(len(results[0].kl))
    chosen, routed = (
        [sum(getattr(each, name)[layer] for each in results) for layer in layers] for name in ("chosen", "routed")
    )
    balance = [jnp.sum(shares * probabilities) for shares, probabilities in zip(chosen, routed, strict=True)]
    router = jnp.sum(jnp.asarray(balance)) * config.num_experts / config.num_experts_per_tok / sum(LENGTHS)
    return sum((each.language + KL_WEIGHT * sum(each.kl) for each in results), ROUTER_WEIGHT * router)


def flat(state: nnx.State) -> dict[str, np.ndarray]:
    return {".".join(map(str, path)): np.asarray(x.get_value()) for path, x in nnx.to_flat_state(state)}


def gradients(
    batch: PackedBatch,
    options: TrainOptions,
    objective: Callable[[Losses], jax.Array] = objective,
    rules: MeshRules | None = None,
    model: Keye | None = None,
) -> tuple[Losses, dict[str, np.ndarray]]:
    rules = rules or MeshRules.single_device()
    graph, state = nnx.split(shard_params(model or model_and_config()[0], rules))
    step = StepSharding.prefill(rules)

    @functools.partial(jax.jit, static_argnames="options")
    @functools.partial(jax.grad, has_aux=True)
    def run(state: nnx.State, batch: PackedBatch, options: TrainOptions) -> tuple[jax.Array, Losses]:
        losses = forward_losses(nnx.merge(graph, state), batch, options, step)
        return objective(losses), losses

    found, losses = run(state, batch, options)
    return losses, flat(found)


@functools.cache
def expected(attention: str, detach: bool) -> tuple[list[reference.Results], dict[str, np.ndarray]]:
    """The reference's results of each sample, and the gradients of their sum; choices are safe."""
    model, config = model_and_config()
    with jax.enable_x64(True):
        params = {name: jnp.asarray(x, jnp.float64) for name, x in flat(nnx.state(model)).items()}

        def run(params: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
            found = [
                reference.run(params, config, normalised(sample), attention=attention, detach=detach)
                for sample in samples()
            ]
            return reference_objective(found), [dataclasses.asdict(each) for each in found]

        grads, found = jax.jit(jax.grad(run, has_aux=True))(params)
        results = [reference.Results(**jax.tree.map(np.asarray, each)) for each in found]
    for result in results:
        for scores, logits in zip(result.index_scores, result.router_logits, strict=True):
            if attention == "sparse":
                assert_leads(selection_leads(np.asarray(scores), config.sa_config.topk), LEAD)
            assert_leads(selection_leads(np.asarray(logits), config.num_experts_per_tok), LEAD)
    return results, {name: np.asarray(x) for name, x in grads.items()}


def normalised(sample: reference.Sample) -> reference.Sample:
    return dataclasses.replace(sample, images=tuple(image / 255 * 2 - 1 for image in sample.images))


def assert_gradients_close(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    """Within 3% in norm: of the indexer's many relus, rounding may turn one whose input is 1e-6 on or off."""
    assert got.keys() == wanted.keys()
    for name in got:
        size = np.linalg.norm(wanted[name])
        assert size > 0, f"{name} has no gradient"
        error = np.linalg.norm(got[name] - wanted[name]) / size
        assert error < 0.03, f"{name} is off by {error:.1%}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "options"),
    [
        (192, TrainOptions(router=True, remat="none")),
        (64, TrainOptions(router=True, remat="attention", scan_layers=True)),
        (192, TrainOptions("dense", router=True, remat="layer", block_bytes=2**20, scan_layers=True)),
        (192, TrainOptions(router=True, detach=False)),
    ],
    ids=["sparse", "samples of several rows, scanned", "dense, scanned", "not detached"],
)
def test_losses_and_gradients(tokens: int, options: TrainOptions):
    """In every parameter: of vision, projector, embeddings, attention, indexer, router, experts and head."""
    batch = batch_of(tokens, rows=3 if tokens == 192 else 6)
    losses, got = gradients(batch, options)
    results, wanted = expected(options.attention, options.detach)
    np.testing.assert_allclose(losses.language, sum(each.language for each in results), rtol=1e-4)
    for layer in range(2):
        np.testing.assert_allclose(losses.kl[layer], sum(each.kl[layer] for each in results), rtol=1e-4)
    assert int(losses.tokens) == sum(LENGTHS)
    assert int(losses.targets) == sum((sample.targets >= 0).sum() for sample in samples())
    assert_gradients_close(got, wanted)


MESHES = {
    "expert": "expert",
    "combined": "combined",
    "each to its experts": (
        {"data": 2, "expert": 4},
        {"batch": "data", "query_sequence": "expert", "experts": ["data", "expert"], "vision_patches": "data"},
        "all_to_all",
    ),
    "heads": (
        {"sequence": 4, "tensor": 2},
        {"query_sequence": "sequence", "heads": "tensor", "kv_heads": "tensor", "experts": "tensor", "vocab": "tensor"},
        "all_gather",
    ),
}


@functools.cache
def of_one_device(tokens: int) -> tuple[Losses, dict[str, np.ndarray]]:
    return gradients(batch_of(tokens, rows=8), TrainOptions(router=True))


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "tokens"), [*((mesh, 64) for mesh in MESHES), ("expert", 192)])
def test_eight_devices_give_what_one_does(mesh: str, tokens: int):
    """Rows over all of them, samples over some of them, heads, experts and the vocabulary over others.

    With 64 tokens a sample has several rows, on several devices. With 192 it has one.
    """
    config, layout = model_and_config()[1], MESHES[mesh]
    rules = preset(layout, config) if isinstance(layout, str) else rules_of(config, *layout)
    parts = rules.parts(StepSharding.prefill(rules).batch)
    losses, got = gradients(batch_of(tokens, rows=8, parts=parts), TrainOptions(router=True), rules=rules)
    expected, wanted = of_one_device(tokens)
    for one, other in zip(jax.tree.leaves(losses), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4)
    assert_gradients_close(got, wanted)


@pytest.mark.slow
def test_each_loss_reaches_its_own_parameters():
    """The language model's loss gives the indexer exactly nothing, and the KL divergence gives it to nothing else."""
    batch = batch_of(192, rows=3)
    for loss, of_indexer in ((lambda x: x.language + jnp.sum(x.router), False), (lambda x: jnp.sum(x.kl), True)):
        _, found = gradients(batch, TrainOptions(router=True), loss)
        for name, gradient in found.items():
            assert np.any(gradient) == (("indexer" in name) == of_indexer), name


PARTS = ("vision.", "projector.", "embed_tokens", "attention.", "router", "_proj", "norm", "lm_head")
"""What the names of parameters have that are moved together; "_proj" is of experts, and of attention too."""


@pytest.mark.slow
def test_gradients_are_finite_differences():
    """Of the language model's loss in float64, along the gradient of each part and a random direction."""
    model, config = model_and_config()
    _, got = gradients(batch_of(192, rows=3), TrainOptions(kl=False), lambda x: x.language)
    rng, size = np.random.default_rng(0), 1e-5
    with jax.enable_x64(True):
        params = {name: jnp.asarray(x, jnp.float64) for name, x in flat(nnx.state(model)).items()}

        @jax.jit
        def loss(params: dict[str, jax.Array]) -> jax.Array:
            found = [reference.run(params, config, normalised(each), attention="sparse") for each in samples()]
            return sum((each.language for each in found), jnp.zeros(()))

        for part in PARTS:
            names = [name for name in got if part in name and "indexer" not in name]
            norm = np.sqrt(sum(np.sum(np.square(got[name], dtype=np.float64)) for name in names))
            moves = {name: rng.normal(size=got[name].shape) for name in names}
            total = np.sqrt(sum(np.sum(move**2) for move in moves.values()))
            moves = {name: got[name] / norm + move / total for name, move in moves.items()}
            above, below = (
                loss(params | {name: params[name] + by * move for name, move in moves.items()}) for by in (size, -size)
            )
            slope = sum(np.sum(got[name] * move) for name, move in moves.items())
            np.testing.assert_allclose(slope, (above - below) / (2 * size), rtol=2e-3, err_msg=part)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sparse", "dense"])
def test_recorded_attention_is_the_teacher(golden: Path, attention: str):
    """The indexer's gradients are those of cross-entropy with the recorded means of attention over all heads."""
    model, config = golden_model("a")
    recorded = np.load(golden / "a" / "golden.npz")
    ids, teachers = recorded["text_ids"], recorded[f"head_mean_attention_{attention}"].astype(np.float64)
    options = TrainOptions("sparse" if attention == "sparse" else "dense")
    _, got = gradients(text_batch(ids, 128), options, lambda x: jnp.sum(x.kl), model=model)
    nothing = np.full(len(ids), -1)
    sample = reference.Sample(ids, nothing, np.broadcast_to(np.arange(len(ids)), (3, len(ids))), nothing, ())
    with jax.enable_x64(True):
        params = {name: jnp.asarray(x, jnp.float64) for name, x in flat(nnx.state(model)).items()}

        def loss(params: dict[str, jax.Array]) -> jax.Array:
            return sum(reference.run(params, config, sample, attention=attention, teachers=teachers).kl, jnp.zeros(()))

        wanted = jax.jit(jax.grad(loss))(params)
    of_indexer = [name for name in got if "indexer" in name]
    assert len(of_indexer) == 5 * config.num_hidden_layers
    assert_gradients_close(*({name: np.asarray(each[name]) for name in of_indexer} for each in (got, wanted)))


@pytest.mark.slow
def test_two_backward_passes_are_equal_to_the_bit():
    batch, options = batch_of(64, rows=6), TrainOptions(router=True, remat="attention", scan_layers=True)
    first, second = (gradients(batch, options)[1] for _ in range(2))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
