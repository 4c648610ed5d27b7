"""What a stage of training takes on devices that are not here: memory by parts, and how many devices it needs.

Weights, gradients and moments are computed exactly, from the rules. Activations and workspace are estimates, by the
formulas below.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from keye_jax.config import DTYPES, KeyeConfig
from keye_jax.errors import UserError
from keye_jax.model.params import parameter_axes
from keye_jax.planning.hardware import Platform
from keye_jax.planning.plan import abstract_rules, memory_bytes
from keye_jax.sharding import MeshRules, ShardingConfig, StepSharding
from keye_jax.sharding.mesh_rules import unused
from keye_jax.train.config import StageConfig
from keye_jax.train.data import check_sharding
from keye_jax.train.forward import TrainOptions
from keye_jax.train.generated import read_options
from keye_jax.train.lora import pair_layout, targets
from keye_jax.train.shapes.scene import SIDE
from keye_jax.train.weights import dotted, training_sharding

MOST_DEVICES = 1024


@dataclasses.dataclass(frozen=True)
class TrainPlan:
    """What a stage takes, in bytes on one device.

    Attributes:
      platform, devices, mesh: the devices, how many, and the mesh's axes with their sizes.
      tokens: of a batch, on all devices.
      trained, total: numbers that train, and of the model, on all devices.
      memory: what a device has.
      frozen: weights that do not train.
      weights: those that do, with their copies for the forward pass.
      gradients, moments: of these.
      activations: what the forward pass keeps for the backward pass.
      workspace: what a layer, the attention's blocks and the logits' chunks need besides.
      fits: whether all of it does.
      needed: the least number of such devices, a power of two, with which the same mesh fits; None if that is unknown.
      notes: what a reader must know of the figures, one sentence each.
    """

    platform: str
    devices: int
    mesh: dict[str, int]
    tokens: int
    trained: int
    total: int
    memory: int
    frozen: int
    weights: int
    gradients: int
    moments: int
    activations: int
    workspace: int
    fits: bool
    needed: int | None
    notes: list[str]

    @property
    def peak(self) -> int:
        return self.frozen + self.weights + self.gradients + self.moments + self.activations + self.workspace

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"peak": self.peak}


def plan_train(
    config: KeyeConfig, stage: StageConfig, sharding: ShardingConfig, platform: Platform, *, source: str = "stage"
) -> TrainPlan:
    """Plans a stage on a platform.

    Args:
      source: what messages call the stage.

    Raises:
      UserError: stage and model do not go together, or the sharding is impossible.
    """
    stage.check(config, [dotted(path) for path in parameter_axes(config)], source)
    if platform.processes > 1:
        raise UserError(
            f"--platform is {platform.name!r}, which is {platform.processes} hosts; it must be one: training runs in "
            "one process"
        )
    rules = abstract_rules(sharding, config, platform)
    found = _on(config, stage, rules, platform, source)
    automatic = [name for name, size in sharding.mesh if size is None]
    needed = platform.devices if found.fits and platform.devices == 1 else None
    if automatic:
        fixed = math.prod(size for _, size in sharding.mesh if size)
        count = fixed
        while needed is None and count <= MOST_DEVICES:
            try:
                rules = MeshRules.abstract(sharding, config, count, platform.chip.platform)
                if _on(config, stage, rules, platform, source).fits:
                    needed = count
            except ValueError:  # so many cannot share out a dimension of the model
                break
            count *= 2
    return dataclasses.replace(found, needed=needed)


def _on(config: KeyeConfig, stage: StageConfig, rules: MeshRules, platform: Platform, source: str) -> TrainPlan:
    """The plan on a mesh."""
    check_sharding(stage, rules, source)
    item = config.jax_dtype.itemsize if stage.dtype == "checkpoint" else DTYPES[stage.dtype].itemsize
    frozen = weights = gradients = moments = trained = total = 0
    for path, (shape, axes) in parameter_axes(config).items():
        here = _here(rules, shape, axes)
        total += math.prod(shape)
        if not stage.trains(dotted(path)):
            frozen += item * here
            continue
        trained += math.prod(shape)
        weights += (4 + item if stage.master else item) * here
        gradients += (4 if stage.batch.accumulation > 1 else item) * here
        moments += 8 * here
    if stage.lora is not None:
        axes_of = {dotted(path): axes for path, (_, axes) in parameter_axes(config).items()}
        for path, tensor in targets(stage.lora, config, source).items():
            for shape, axes in pair_layout(tensor, axes_of[path], stage.lora.rank):
                here = _here(rules, shape, axes)
                trained += math.prod(shape)
                weights, gradients, moments = weights + 4 * here, gradients + 4 * here, moments + 8 * here
    work = _Work(config, stage, rules, item)
    memory = int(memory_bytes(platform))
    made = TrainPlan(
        platform=platform.name,
        devices=rules.devices,
        mesh=dict(rules.mesh.shape),
        tokens=stage.batch.tokens * stage.batch.accumulation,
        trained=trained,
        total=total,
        memory=memory,
        frozen=frozen,
        weights=weights,
        gradients=gradients,
        moments=moments,
        activations=work.activations(),
        workspace=work.workspace(),
        fits=False,
        needed=None,
        notes=[each for each in (unused(rules, platform.devices), *config.notes) if each],
    )
    return dataclasses.replace(made, fits=made.peak <= memory)


def _here(rules: MeshRules, shape: tuple[int, ...], axes: Any) -> int:
    """Numbers of a weight on one device."""
    sharding = training_sharding(rules, shape, axes)
    return math.prod(shape if sharding is None else sharding.shard_shape(shape))


def _patches(config: KeyeConfig, stage: StageConfig) -> int:
    """Patches of the largest batch, on all devices: those there is room for, or those of generated clips."""
    if stage.data.source == "jsonl":
        return sum(size * count for size, count in stage.batch.images.items())
    side = SIDE // config.vision_config.patch_size
    return max(each.rows * each.scenes.frames * side**2 for each in read_options(stage) if each is not None)


class _Work:
    """Formulas for what a step needs besides the weights, in bytes on one device."""

    def __init__(self, config: KeyeConfig, stage: StageConfig, rules: MeshRules, item: int):
        self.config, self.stage, self.rules, self.item = config, stage, rules, item
        self.step = StepSharding.prefill(rules)
        self.tokens = stage.batch.tokens / self.step.size(self.step.rows)
        self.group = stage.batch.tokens / self.step.size(self.step.batch)
        self.patches = _patches(config, stage) / self.step.size(self.step.vision_patches)
        learnt = [dotted(path) for path in parameter_axes(config) if stage.trains(dotted(path))]
        self.vision_learns = any(path.startswith("vision") for path in learnt)

    def _attention(self) -> float:
        """Of a layer: queries, and keys and values of the group, each with the layer's gradients of them."""
        c = self.config
        queries = self.tokens * c.num_attention_heads * c.head_dim
        keys = self.group * (2 * c.num_key_value_heads * c.head_dim + c.sa_config.indexer_head_dim)
        index = self.tokens * c.sa_config.indexer_num_heads * c.sa_config.indexer_head_dim
        return 2 * (2 * queries + keys + index) * self.item

    def _experts(self) -> float:
        """Of a layer: the rows that its experts work on, and their gradients."""
        c, step = self.config, self.step
        owners = step.size(step.experts)
        tokens = self.tokens * (step.size(step.rows) if owners > 1 else 1)
        rows = tokens * c.num_experts_per_tok / owners * (1.5 if owners > 1 else 1)
        return 2 * (rows * (2 * c.hidden_size + 3 * c.moe_intermediate_size) + 2 * tokens * c.hidden_size) * self.item

    def activations(self) -> int:
        """What stays from forward to backward: each layer's input, and what `remat` keeps of it."""
        c, v = self.config, self.config.vision_config
        layer = self.tokens * c.hidden_size * self.item
        output = self.tokens * c.num_attention_heads * (c.head_dim * self.item + 4)
        seen = self.patches * v.hidden_size * self.item
        seen_layers = v.num_hidden_layers if self.vision_learns else 0
        kept = {
            "layer": (layer, seen),
            "attention": (layer + output, seen),
            "none": (2 * layer + (self._attention() + self._experts()) / 2, 8 * seen),
        }[self.stage.remat]
        return int(c.num_hidden_layers * kept[0] + seen_layers * kept[1])

    def workspace(self) -> int:
        """A layer's own arrays and gathered weights with their gradients, blocks of scores, and chunks of logits."""
        c, block = self.config, TrainOptions().block_bytes
        longest = max(self.stage.batch.length, self.stage.data.long.length if self.stage.data.long else 0)
        width = min(longest, self.group)
        scores = 4 * min(block, 4 * self.tokens * width * c.num_attention_heads)
        logits = 3 * min(block, 4 * self.tokens * c.vocab_size)
        layer = sum(
            math.prod(shape) // math.prod(self.rules.size(name) for name in axes)
            for path, (shape, axes) in parameter_axes(c).items()
            if path[:3] == ("decoder", "layers", "0")
        )
        embedding = c.vocab_size * c.hidden_size // self.rules.size("vocab")
        gathered = max(layer, embedding) * (self.item + np.dtype(np.float32).itemsize)
        vision = 12 * self.patches * self.config.vision_config.hidden_size * self.item
        return int(max(self._attention() + self._experts() + scores, logits, vision) + gathered)
