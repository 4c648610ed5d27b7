"""Stage files: what trains, on which loss, how fast, and on which data.

    train: [projector]               # patterns over the paths of parameters; `!` before one leaves out
    loss: {language: true, kl: 0}
    optimizer: {lr: 1.0e-3, schedule: cosine, warmup: 0.03}
    steps: 2000
    batch: {tokens: 65536, length: 32768}

`StageConfig.from_file` reads one. All of its mistakes are named at once, in one `UserError`.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError, shorten
from keye_jax.parsing import read_yaml
from keye_jax.train.patterns import chosen, unmatched

INDEXER = "decoder.layers.*.indexer"
"""The parameters that only the KL loss trains."""

PAGE_TOKENS = 64
"""A row of a packed batch holds a multiple of this number."""


def _field(default: Any, allowed: str, check: Callable[[Any], bool] = lambda _: True) -> Any:
    """A field whose value must pass `check`; `allowed` says in messages what does."""
    metadata = {"allowed": allowed, "check": check}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


_PATTERNS = "a list of patterns over the paths of parameters, such as decoder.layers.*.attention"


def _positive(default: Any, kind: str = "number") -> Any:
    return _field(default, f"a positive {kind}", lambda value: value > 0)


def _share(default: float) -> Any:
    return _field(default, "a number from 0 to 1", lambda value: 0 <= value <= 1)


def _least_zero(default: Any) -> Any:
    return _field(default, "a number that is not negative", lambda value: value >= 0)


def _one_of(default: str, *names: str) -> Any:
    return _field(default, " or ".join(names), lambda value: value in names)


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The loss: that of the next token, plus `kl` times the indexer's, plus `router` times the router's.

    Attributes:
      language: whether the next token's loss counts.
      kl: weight (lambda) of the indexer's loss, a mean over tokens and groups of heads, so it needs no other value for
        another length.
      router: weight of the loss that evens out the load of experts; off by default, since it costs accuracy.
    """

    language: bool = True
    kl: float = _least_zero(0.0)
    router: float = _least_zero(0.0)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank pairs beside frozen weights.

    Attributes:
      rank: of a pair; of experts, each has its own pair.
      alpha: a pair's product is scaled by `alpha / rank`.
      targets: patterns of the weights that get one.
    """

    targets: tuple[str, ...] = _field((), _PATTERNS, bool)
    rank: int = _positive(16, "integer")
    alpha: float = _positive(32.0)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW.

    Attributes:
      lr: peak learning rate.
      lr_of: learning rates of groups, by pattern; the last pattern that matches holds.
      schedule: what follows the warm-up: constant, or a cosine or a line down to `final`.
      warmup: share of all steps in which the learning rate rises from 0.
      final: share of the peak at the last step.
      betas, eps: of Adam.
      weight_decay: of weights but those of `no_decay`.
      no_decay: patterns.
      clip: largest norm of the gradients of a step; 0 for none.
      indexer_clip: the same for the indexers, whose loss is another.
    """

    lr: float = _positive(1e-5)
    lr_of: Mapping[str, float] = _field(
        {}, "positive numbers by pattern", lambda value: all(each > 0 for each in value.values())
    )
    schedule: str = _one_of("cosine", "constant", "cosine", "linear")
    warmup: float = _share(0.03)
    final: float = _share(0.1)
    betas: tuple[float, ...] = _field(
        (0.9, 0.95), "two numbers from 0 to below 1", lambda value: len(value) == 2 and all(0 <= x < 1 for x in value)
    )
    eps: float = _positive(1e-8)
    weight_decay: float = _least_zero(0.0)
    no_decay: tuple[str, ...] = _field(("*norm*", "*.bias", "*.router"), _PATTERNS)
    clip: float = _least_zero(1.0)
    indexer_clip: float = _least_zero(1.0)


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """The shapes of a batch, which are the same in every step.

    Attributes:
      tokens: of all samples that one step takes at once, with what pads them, on all devices.
      length: most tokens of a sample.
      row: tokens of a row; a sample fills whole rows.
      samples: most samples; 0 for one a row.
      images: how many images and video frames of at most so many patches there is room for on all devices, by patches;
        empty for text. Each goes where it fits best.
      accumulation: batches of a step, whose gradients are averaged over tokens.
    """

    tokens: int = _positive(8192, "integer")
    length: int = _positive(8192, "integer")
    row: int = _field(
        256, f"a positive multiple of {PAGE_TOKENS}", lambda value: value > 0 and value % PAGE_TOKENS == 0
    )
    samples: int = _least_zero(0)
    images: Mapping[int, int] = _field(
        {},
        "positive numbers of images by patches, as in {1024: 64}",
        lambda value: all(patches > 0 and count > 0 for patches, count in value.items()),
    )
    accumulation: int = _positive(1, "integer")

    @property
    def rows(self) -> int:
        return self.tokens // self.row

    def samples_of(self, groups: int) -> int:
        """Most samples of each of several groups of devices."""
        return max(1, (self.samples or self.rows) // groups)


@dataclasses.dataclass(frozen=True)
class LongConfig:
    """Batches of longer clips of the generated world, now and then. Their shape is compiled besides.

    Attributes:
      share: of all steps, above 0.
      length: tokens of a row, each with one clip. A batch has as many tokens as others.
      shapes: settings of the generated world.
    """

    share: float = _field(0.25, "a number above 0 and below 1", lambda value: 0 < value < 1)
    length: int = _field(
        2304, f"a positive multiple of {PAGE_TOKENS}", lambda value: value > 0 and value % PAGE_TOKENS == 0
    )
    shapes: Mapping[str, Any] = _field({}, "settings by name")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how they are read.

    Attributes:
      source: "jsonl", the file that `--data` names, or "shapes", a generated world.
      broken: whether a sample that cannot be read, or is too long, is skipped or ends the run.
      workers: processes that decode videos and images, or make generated clips; 0 for none.
      byte_budget: bytes of decoded pixels that wait at most.
      lookahead: samples that are considered for a batch.
      shuffle: whether the order of samples changes with every epoch.
      media: options of videos and images, such as fps and max_pixels, where a sample has none of its own.
      template: variables of the chat template, such as enable_thinking.
      shapes: settings of the generated world.
      long: longer clips of the generated world, or none.
      evaluation: batches of the generated world that an evaluation reads.
    """

    source: str = _one_of("jsonl", "jsonl", "shapes")
    broken: str = _one_of("skip", "skip", "refuse")
    workers: int = _least_zero(2)
    byte_budget: int = _positive(1 << 30, "integer")
    lookahead: int = _positive(32, "integer")
    shuffle: bool = True
    media: Mapping[str, Any] = _field({}, "options by name")
    template: Mapping[str, Any] = _field({}, "variables by name")
    shapes: Mapping[str, Any] = _field({}, "settings by name")
    long: LongConfig | None = None
    evaluation: int = _positive(8, "integer")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """A stage of training.

    Attributes:
      train: patterns of the parameters that train; with `lora`, those that train beside the pairs.
      lora: low-rank pairs, or none.
      loss, optimizer, batch, data: see there.
      attention: "sparse", as the model is used, or "dense", for the indexer's warm-up.
      detach: whether the indexer's loss stays out of the layers below; False only to see what happens.
      remat: what the backward pass computes again: nothing, all but the attention's output, or whole layers.
      scan_layers: whether the decoder's layers are one loop: it compiles sooner, and copies their weights.
      dtype: of weights in the forward pass; "checkpoint" for their own.
      master: whether weights that train are kept in float32 beside.
      steps: how many; None where `epochs` says.
      epochs: passes over the data; None where `steps` says.
      evaluate_every, checkpoint_every: steps; 0 for never, but there is always a checkpoint at the end.
      keep: how many of the last checkpoints stay, besides the best one.
      seed: of the order of the data, and of new pairs.
      tensorboard: folder of the curves, below the output; None for none.
      layers: of the decoder, where the run begins with a new model; None for those of its configuration.
    """

    train: tuple[str, ...] = _field((), _PATTERNS)
    lora: LoraConfig | None = None
    loss: LossConfig = LossConfig()
    attention: Literal["sparse", "dense"] = _one_of("sparse", "sparse", "dense")
    detach: bool = True
    remat: Literal["none", "attention", "layer"] = _one_of("layer", "none", "attention", "layer")
    scan_layers: bool = False
    dtype: str = _one_of("checkpoint", "checkpoint", "bfloat16", "float32")
    master: bool = True
    optimizer: OptimizerConfig = OptimizerConfig()
    batch: BatchConfig = BatchConfig()
    data: DataConfig = DataConfig()
    steps: int | None = _field(None, "a positive integer", lambda value: value > 0)
    epochs: float | None = _field(None, "a positive number", lambda value: value > 0)
    evaluate_every: int = _least_zero(0)
    checkpoint_every: int = _least_zero(200)
    keep: int = _positive(2, "integer")
    seed: int = _least_zero(0)
    tensorboard: str | None = _field(None, "the name of a folder", bool)
    layers: int | None = _field(None, "a positive integer", lambda value: value > 0)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Reads a stage file.

        Raises:
          UserError: it is not YAML, or fields are wrong; the message names all of them.
          FileNotFoundError: there is no such file.
        """
        return cls.from_dict(read_yaml(path), source=str(path))

    @classmethod
    def from_dict(cls, values: Any, *, source: str = "stage") -> Self:
        """Reads what a stage file holds. Raises UserError as `from_file` does."""
        problems: list[str] = []
        stage = _read(cls, values, "", problems)
        _raise(source, problems)
        _raise(source, stage.problems())
        return stage

    def to_dict(self) -> dict[str, Any]:
        """The stage as a JSON object that `from_dict` reads."""
        return _plain(self)

    def trains(self, path: str) -> bool:
        """Whether the parameter at a dotted path trains as a whole."""
        return chosen(self.train, path)

    def problems(self) -> list[str]:
        """A sentence for each pair of fields that contradict each other."""
        found, batch = [], self.batch
        if not self.train and self.lora is None:
            found.append("train is empty and lora is left out; something must train")
        if (self.steps is None) == (self.epochs is None):
            found.append(f"steps is {self.steps} and epochs is {self.epochs}; one of them must be given")
        if self.epochs is not None and self.data.source != "jsonl":
            found.append(f"epochs is {self.epochs}; generated data has no end, so steps must be given")
        if not self.loss.language and not self.loss.kl:
            found.append("loss.language is false and loss.kl is 0; there must be a loss")
        if self.data.source == "shapes" and batch.row != batch.length:
            found.append(
                f"batch.row is {batch.row}; of generated scenes each fills a row of batch.length {batch.length}"
            )
        if (long := self.data.long) is not None:
            if self.data.source != "shapes":
                found.append(f"data.long is given and data.source is {self.data.source!r}; it must be 'shapes'")
            if batch.tokens % long.length:
                found.append(f"batch.tokens is {batch.tokens}; it must be a multiple of data.long.length {long.length}")
        if batch.tokens % batch.row:
            found.append(f"batch.tokens is {batch.tokens}; it must be a multiple of batch.row {batch.row}")
        if batch.length % batch.row:
            found.append(f"batch.length is {batch.length}; it must be a multiple of batch.row {batch.row}")
        if batch.length > batch.tokens:
            found.append(f"batch.length is {batch.length}; it must be at most batch.tokens {batch.tokens}")
        return found

    def check(self, config: KeyeConfig, paths: Sequence[str], source: str) -> None:
        """Holds the stage to a model.

        Args:
          paths: dotted, of its parameters.
          source: what messages call the stage.

        Raises:
          UserError: a pattern matches nothing, the stage's lengths teach the indexer nothing, or weights of the model
            have fewer bits.
        """
        if config.quantization_config is not None or config.quantization:
            raise UserError(f"{source}: the model's weights have fewer bits; training needs those with all bits")
        problems = []
        lists = {"train": self.train, "optimizer.lr_of": tuple(self.optimizer.lr_of)}
        lists |= {"lora.targets": self.lora.targets} if self.lora else {}
        for field, patterns in lists.items():
            problems += [f"{field} has {each!r}; no parameter matches it" for each in unmatched(patterns, paths)]
        indexers = [path for path in paths if chosen((INDEXER,), path)]
        learns = any(map(self.trains, indexers)) or (
            self.lora is not None and any(chosen(self.lora.targets, path) for path in indexers)
        )
        if self.scan_layers and self.lora:
            of_layer = {str(index): set[str]() for index in range(config.num_hidden_layers)}
            for path in paths:
                if path.startswith("decoder.layers.") and chosen(self.lora.targets, path):
                    _, _, index, name = path.split(".", 3)
                    of_layer[index].add(name)
            if len(set(map(frozenset, of_layer.values()))) > 1:
                problems.append("scan_layers is true; lora.targets must then have the same weights of all layers")
        top_k = config.sa_config.topk
        if self.loss.kl and not learns:
            problems.append(f"loss.kl is {self.loss.kl}; train must name the indexers ({INDEXER}), which learn from it")
        if learns and not self.loss.kl:
            problems.append(f"loss.kl is 0, but train names indexers ({INDEXER}), which learn only from it")
        if learns and self.batch.length <= top_k:
            problems.append(
                f"batch.length is {self.batch.length}; it must be above topk {top_k}, or no key is ever left out and "
                "the indexer learns nothing"
            )
        lengths = {"batch.length": self.batch.length}
        lengths |= {"data.long.length": self.data.long.length} if self.data.long else {}
        for field, length in lengths.items():
            if length > config.max_position_embeddings:
                limit = config.max_position_embeddings
                problems.append(f"{field} is {length}; it must be at most max_position_embeddings {limit}")
        _raise(source, problems)


def _raise(source: str, problems: list[str]) -> None:
    if len(problems) == 1:
        raise UserError(f"{source}: {problems[0]}")
    if problems:
        raise UserError("\n".join([f"{source} has {len(problems)} mistakes:", *(f"  {each}" for each in problems)]))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _read(kind: Any, values: Any, prefix: str, problems: list[str]) -> Any:
    """A section from a mapping. Fields that are wrong are added to `problems` and keep their defaults."""
    if not isinstance(values, Mapping):
        problems.append(f"{prefix.rstrip('.') or 'the file'} is {shorten(values)}; it must be a mapping of names")
        return kind()
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints, known = typing.get_type_hints(kind), {}
    for name, value in values.items():
        if name not in fields:
            problems.append(f"{prefix}{name} is not known; known are {', '.join(fields)}")
            continue
        section = next((each for each in _members(hints[name]) if dataclasses.is_dataclass(each)), None)
        if section is not None and not (value is None and type(None) in _members(hints[name])):
            known[name] = _read(section, value, f"{prefix}{name}.", problems)
            continue
        try:
            read = _value(value, hints[name])
            if read is not None and not fields[name].metadata.get("check", lambda _: True)(read):
                raise ValueError
            known[name] = read
        except (TypeError, ValueError, OverflowError):
            allowed = fields[name].metadata.get("allowed", "true or false")
            problems.append(f"{prefix}{name} is {shorten(value)}; it must be {allowed}")
    return kind(**known)


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _value(value: Any, hint: Any) -> Any:
    """`value` as the type of a field. Raises TypeError or ValueError if it is of another."""
    members = _members(hint)
    if value is None and type(None) in members:
        return None
    kind = next(member for member in members if member is not type(None))
    if kind is bool or isinstance(value, bool):
        if not (kind is bool and isinstance(value, bool)):
            raise TypeError
        return value
    if kind is int:
        # JSON writes the keys of a mapping as text.
        if not isinstance(value, int) and not (isinstance(value, str) and value.isdecimal()):
            raise TypeError
        number = int(value)
        if abs(number) >= 1 << 63:
            raise ValueError
        return number
    if kind is float:
        # YAML reads 1e-5 as text.
        if not isinstance(value, int | float | str):
            raise TypeError
        number = float(value)
        if not math.isfinite(number):
            raise ValueError
        return number
    origin = typing.get_origin(kind)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError
        return tuple(_value(item, typing.get_args(kind)[0]) for item in value)
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise TypeError
        name, item = typing.get_args(kind)
        return {_value(key, name): each if item is Any else _value(each, item) for key, each in value.items()}
    if not isinstance(value, str):
        raise TypeError
    return value
