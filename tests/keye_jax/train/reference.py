"""The model of one sample written out on whole matrices, in the dtype of its parameters: float64 in tests."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from keye_jax.config import KeyeConfig

type Params = dict[str, jax.Array]
"""Parameters by dotted module path."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A sample without padding: ids, targets and vision index `[t]`, positions `[3, t]`, images `[h, w, features]`."""

    ids: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    vision_index: np.ndarray
    images: tuple[np.ndarray, ...]


@dataclasses.dataclass(frozen=True)
class Results:
    """Sums over the sample, and what choices are made of; of each layer in a list.

    Attributes:
      chosen, routed: `[e]`, how often each expert is chosen, and the sum of its probabilities.
      index_scores: `[t, t]`, -inf after the query.
      router_logits: `[t, e]`.
    """

    language: jax.Array
    kl: list[jax.Array]
    chosen: list[jax.Array]
    routed: list[jax.Array]
    index_scores: list[jax.Array]
    router_logits: list[jax.Array]


def run(
    params: Params,
    config: KeyeConfig,
    sample: Sample,
    *,
    attention: str,
    detach: bool = True,
    teachers: np.ndarray | None = None,
) -> Results:
    """Losses of a sample.

    Args:
      attention: "sparse" or "dense".
      detach: whether the indexer's input is detached.
      teachers: attention probabilities `[l, t, t]` to learn from in place of those computed.
    """
    x = params["decoder.embed_tokens.weight"][sample.ids]
    if sample.images:
        seen = jnp.concatenate([_embed_image(params, config, image) for image in sample.images])
        x = jnp.where((sample.vision_index >= 0)[:, None], seen[np.maximum(sample.vision_index, 0)], x)
    found = Results(jnp.zeros(()), [], [], [], [], [])
    for layer in range(config.num_hidden_layers):
        own, teacher = _below(params, f"decoder.layers.{layer}."), None if teachers is None else teachers[layer]
        x = _layer(own, config, x, sample, attention, detach, teacher, found)
    logits = _rms(params["decoder.norm.weight"], x, config.rms_norm_eps) @ params["decoder.lm_head.weight"].T
    losses = (
        jax.nn.logsumexp(logits, axis=-1)
        - jnp.take_along_axis(logits, np.maximum(sample.targets, 0)[:, None], axis=-1)[:, 0]
    )
    return dataclasses.replace(found, language=jnp.sum(jnp.where(sample.targets >= 0, losses, 0)))


def _layer(
    p: Params,
    config: KeyeConfig,
    x: jax.Array,
    sample: Sample,
    attention: str,
    detach: bool,
    teacher: np.ndarray | None,
    found: Results,
) -> jax.Array:
    tokens, sa = len(x), config.sa_config
    normed = _rms(p["input_norm.weight"], x, config.rms_norm_eps)
    angles = _mrope(sample.positions, config.mrope_section, config.rope_theta)
    index_angles = _mrope(sample.positions, config.indexer_mrope_section, config.rope_theta)
    q, k, v = (
        jnp.einsum("td,nhd->tnh", normed, p[f"attention.{name}.weight"]) for name in ("q_proj", "k_proj", "v_proj")
    )
    q, k = (
        _rotate(_rms(p[f"attention.{name}.weight"], each, config.rms_norm_eps), angles)
        for name, each in (("q_norm", q), ("k_norm", k))
    )
    seen = jax.lax.stop_gradient(normed) if detach else normed
    rows = seen @ p["indexer.q_proj.weight"].T
    index_q, gates = jnp.split(rows, [sa.indexer_num_heads * sa.indexer_head_dim], axis=-1)
    index_q = _rms(p["indexer.q_norm.weight"], index_q.reshape(tokens, sa.indexer_num_heads, -1), 1e-6)
    index_k = _norm(p, "indexer.k_norm", seen @ p["indexer.k_proj.weight"].T, 1e-6)
    index_q, index_k = _rotate(index_q, index_angles), _rotate(index_k[:, None], index_angles)[:, 0]
    scores = jnp.einsum("tns,tn->ts", jax.nn.relu(jnp.einsum("tnd,sd->tns", index_q, index_k)), gates)
    scores *= sa.indexer_head_dim**-0.5
    mask = visible = np.tril(np.ones((tokens, tokens), bool))
    masked = jnp.where(visible, scores, -jnp.inf)
    if attention == "sparse":
        order = jnp.argsort(-masked, axis=-1, stable=True)
        mask = visible & (jnp.argsort(order, axis=-1) < sa.topk)
    group = config.num_attention_heads // config.num_key_value_heads
    wide_k, wide_v = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
    dots = jnp.einsum("tnd,snd->nts", q, wide_k) * config.head_dim**-0.5
    probabilities = jax.nn.softmax(jnp.where(mask, dots, -jnp.inf), axis=-1)
    attended = jnp.einsum("nts,snd->tnd", probabilities, wide_v)
    x = x + jnp.einsum("tnh,dnh->td", attended, p["attention.o_proj.weight"])

    computed = jax.lax.stop_gradient(probabilities).reshape(-1, group, tokens, tokens).mean(1)
    p_teacher = computed if teacher is None else jnp.asarray(teacher)[None]
    log_q = jnp.where(mask, jax.nn.log_softmax(jnp.where(mask, scores, -jnp.inf), axis=-1), 0.0)
    found.kl.append(jnp.sum(jax.scipy.special.xlogy(p_teacher, p_teacher) - p_teacher * log_q) / len(p_teacher))
    found.index_scores.append(masked)

    normed = _rms(p["post_attention_norm.weight"], x, config.rms_norm_eps)
    logits = normed @ p["moe.router.weight"].T
    routed = jax.nn.softmax(logits, axis=-1)
    chosen = jnp.argsort(jnp.argsort(-logits, axis=-1), axis=-1) < config.num_experts_per_tok
    weights = jnp.where(chosen, routed, 0)
    if config.norm_topk_prob:
        weights /= weights.sum(-1, keepdims=True)
    gate, up = jnp.split(jnp.einsum("td,edf->tef", normed, p["moe.gate_up_proj"]), 2, axis=-1)
    out = jnp.einsum("tef,efd,te->td", jax.nn.silu(gate) * up, p["moe.down_proj"], weights)
    found.chosen.append(chosen.sum(0))
    found.routed.append(routed.sum(0))
    found.router_logits.append(logits)
    return x + out


def _embed_image(params: Params, config: KeyeConfig, image: np.ndarray) -> jax.Array:
    """`[h, w, features]` pixels to `[h / merge * w / merge, embed]`."""
    vision, (height, width, _) = config.vision_config, image.shape
    p = _below(params, "vision.")
    x = _affine(p, "patch_embedding", jnp.asarray(image).reshape(height * width, -1))
    table = p["position_embedding.weight"].reshape(vision.base_grid, vision.base_grid, -1)
    rows, columns = (_resize(size, vision.base_grid) for size in (height, width))
    x += jnp.einsum("hr,wc,rcd->hwd", rows, columns, table).reshape(height * width, -1)
    count = vision.head_dim // 4
    inverse = vision.rope_theta ** -(np.arange(count) / count)
    row, column = np.divmod(np.arange(height * width), width)
    angles = np.concatenate([row[:, None] * inverse, column[:, None] * inverse], axis=-1)
    for layer in range(vision.num_hidden_layers):
        own = _below(p, f"layers.{layer}.")
        normed = _norm(own, "norm1", x, vision.layer_norm_eps)
        q, k, v = (_affine(own, f"attention.{name}_proj", normed) for name in "qkv")
        dots = jnp.einsum("tnd,snd->nts", _rotate(q, angles), _rotate(k, angles)) * vision.head_dim**-0.5
        attended = jnp.einsum("nts,snd->tnd", jax.nn.softmax(dots, axis=-1), v)
        x += _affine(own, "attention.o_proj", attended, inputs=2)
        hidden = jax.nn.gelu(_affine(own, "mlp.fc1", _norm(own, "norm2", x, vision.layer_norm_eps)), approximate=True)
        x += _affine(own, "mlp.fc2", hidden)
    x, merge = _norm(p, "final_norm", x, vision.layer_norm_eps), vision.spatial_merge_size
    x = x.reshape(height // merge, merge, width // merge, merge, -1).transpose(0, 2, 1, 3, 4)
    x = _norm(params, "projector.norm", x.reshape(height * width // merge**2, -1), 1e-5)
    hidden = jax.nn.gelu(_affine(params, "projector.linear1", x), approximate=False)
    return _affine(params, "projector.linear2", hidden)


def _resize(size: int, base: int) -> np.ndarray:
    """Bilinear, corners not aligned, no antialias: weights `[size, base]`."""
    at = np.clip((np.arange(size) + 0.5) * base / size - 0.5, 0, base - 1)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(base)))


def _mrope(positions: np.ndarray, section: tuple[int, ...], theta: float) -> np.ndarray:
    frequencies = sum(section)
    followed = positions[np.repeat(np.arange(3), section)].T
    return followed * theta ** -(np.arange(frequencies) / frequencies)


def _rotate(x: jax.Array, angles: Any) -> jax.Array:
    x1, x2 = jnp.split(x, 2, axis=-1)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def _affine(p: Params, name: str, x: jax.Array, inputs: int = 1) -> jax.Array:
    axes = tuple(range(-inputs, 0))
    return jnp.tensordot(x, p[f"{name}.weight"], (axes, axes)) + p[f"{name}.bias"]


def _rms(weight: jax.Array, x: jax.Array, eps: float) -> jax.Array:
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def _norm(p: Params, name: str, x: jax.Array, eps: float) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps) * p[f"{name}.weight"] + p[f"{name}.bias"]


def _below(params: Params, prefix: str) -> Params:
    return {name.removeprefix(prefix): value for name, value in params.items() if name.startswith(prefix)}
