"""Model configuration, read from the released `config.json`.

Field names are those of the file. `KeyeConfig.from_file(path)` reads and checks it. Every problem is a `UserError`,
which is a `ValueError`, and names the field, its value and what is allowed. A field that is not here is kept in
`extra`: `keye_jax.config_rules` says what it may say.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import ml_dtypes
import numpy as np

from keye_jax import config_rules
from keye_jax.config_rules import fail
from keye_jax.errors import UserError, shorten, shorten_name
from keye_jax.parsing import read_json
from keye_jax.quantization import layouts
from keye_jax.quantization.schemes import Quantization

# The dtypes of weights, by their names in config.json.
DTYPES: dict[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
}

_MOST_SHOWN = 10

# Fields of the classes that no field of a section is read into by its name.
_NOT_IN_FILES = ("extra", "dtype_is_assumed", "quantization", "quantization_config")


def _read_value(field: str, value: Any, kind: Any) -> Any:
    """Returns `value` as a `kind`: int, float, bool, str or tuple[int, ...]; UserError if it is not of that kind."""
    if kind is int:
        if isinstance(value, bool) or not isinstance(value, int):
            fail(field, value, "an integer")
        return value
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            fail(field, value, "a number")
        try:
            return float(value)
        except OverflowError:
            return math.inf
    if kind is bool:
        if not isinstance(value, bool):
            fail(field, value, "true or false")
        return value
    if kind is str:
        if not isinstance(value, str):
            fail(field, value, "a string")
        return value
    if kind == tuple[int, ...]:
        if not isinstance(value, list | tuple) or not all(type(item) is int for item in value):
            fail(field, value, "a list of integers")
        return tuple(value)
    raise AssertionError(f"no reader for {kind}")


def _from(low: float, high: float, **default: Any) -> Any:
    """A number from `low` to `high`."""
    return dataclasses.field(metadata={"range": (low, high)}, **default)


def _size(high: int = 1 << 20, **default: Any) -> Any:
    return _from(1, high, **default)


def _epsilon(**default: Any) -> Any:
    return _from(1e-30, 0.1, **default)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Section:
    """A frozen dataclass that is read from a JSON object and keeps other fields in `extra`."""

    SECTION: ClassVar[str] = ""

    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        where = f"{self.SECTION}." if self.SECTION else ""
        fields = self._fields()
        for field in fields:
            low, high = field.metadata.get("range", (-math.inf, math.inf))
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not low <= value <= high:
                fail(f"{where}{field.name}", value, f"from {low:,} to {high:,}")
        values = {field.name: getattr(self, field.name) for field in fields}
        config_rules.check(self.SECTION, {**self.extra, **values}, frozenset(values))

    @classmethod
    def _fields(cls) -> list[dataclasses.Field]:
        return [field for field in dataclasses.fields(cls) if field.name not in _NOT_IN_FILES]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads a section from a JSON object. A field that is null counts as left out where it may be.

        Raises:
          UserError: a field is missing, or its value is not allowed.
        """
        if not isinstance(values, Mapping):
            fail(cls.SECTION or "the file", values, "a JSON object")
        where = f"{cls.SECTION}." if cls.SECTION else ""
        kinds = typing.get_type_hints(cls)
        known = {}
        for field in cls._fields():
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if field.name not in values:
                if required:
                    raise UserError(f"config: {where}{field.name} is missing")
                continue
            value: Any = values[field.name]
            kind = kinds[field.name]
            if value is None and not required:
                continue
            if isinstance(kind, type) and issubclass(kind, _Section):
                known[field.name] = kind.from_dict(values[field.name])
            else:
                known[field.name] = _read_value(f"{where}{field.name}", value, kind)
        names = {field.name for field in cls._fields()}
        return cls(**known, extra={name: value for name, value in values.items() if name not in names})

    def to_dict(self) -> dict[str, Any]:
        """The section as a JSON object, with unknown fields."""
        known = {}
        for field in self._fields():
            value = getattr(self, field.name)
            known[field.name] = value.to_dict() if isinstance(value, _Section) else value
        known = {name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}
        return known | dict(self.extra)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseAttentionConfig(_Section):
    """`sa_config`: DeepSeek Sparse Attention. Each query attends to the `topk` keys that its indexer scores highest."""

    SECTION: ClassVar[str] = "sa_config"

    indexer_num_heads: int = _size(1024)
    indexer_head_dim: int = _size(4096)
    indexer_num_kv_heads: int = _size()
    topk: int = _size(1 << 27)
    q_chunk_size: int = _size(1 << 27, default=512)
    kv_chunk_size: int = _size(1 << 27, default=512)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScalingConfig(_Section):
    """`rope_scaling`: the numbers of rotary frequencies that follow the time, the row and the column position."""

    SECTION: ClassVar[str] = "rope_scaling"

    mrope_section: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(_Section):
    """`vision_config`: the SigLIP encoder. Image and patch sizes are in pixels, `spatial_merge_size` in patches."""

    SECTION: ClassVar[str] = "vision_config"

    hidden_size: int = _size()
    num_hidden_layers: int = _size(1024)
    num_attention_heads: int = _size(4096)
    intermediate_size: int = _size()
    patch_size: int = _size(4096)
    image_size: int = _size(1 << 16)
    num_channels: int = _size(64, default=3)
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = _epsilon(default=1e-6)
    spatial_merge_size: int = _size(64, default=2)
    rope_theta: float = _from(1, 1e12, default=10_000.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.num_attention_heads:
            allowed = f"a divisor of vision_config.hidden_size {self.hidden_size}"
            fail("vision_config.num_attention_heads", self.num_attention_heads, allowed)
        if self.head_dim % 4:
            allowed = "such that hidden_size / num_attention_heads is a multiple of 4 (rows and columns of 2-D rope)"
            fail("vision_config.hidden_size", self.hidden_size, allowed)
        if self.image_size < self.patch_size:
            fail("vision_config.image_size", self.image_size, f"at least patch_size {self.patch_size}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def base_grid(self) -> int:
        """Side of the square position table, in patches."""
        return self.image_size // self.patch_size

    @property
    def merged_size(self) -> int:
        """Channels of one merged token before the projector."""
        return self.hidden_size * self.spatial_merge_size**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyeConfig(_Section):
    """The whole model: the fields of the decoder, with sections for sparse attention, rope and the vision encoder.

    Attributes:
      dtype_is_assumed: whether no field of the file says the dtype of the weights; bfloat16 is a guess then.
      quantization: which of the model's weights have fewer bits.
      quantization_config: how the file says that files store them; None if it does not.
    """

    hidden_size: int = _size()
    num_hidden_layers: int = _size(1024)
    num_attention_heads: int = _size(4096)
    num_key_value_heads: int = _size(4096)
    head_dim: int = _size(4096)
    vocab_size: int = _size(1 << 24)
    max_position_embeddings: int = _size(1 << 27)
    rope_theta: float = _from(1, 1e12)
    rope_scaling: RopeScalingConfig
    num_experts: int = _size(1 << 14)
    num_experts_per_tok: int = _size()
    moe_intermediate_size: int = _size()
    sa_config: SparseAttentionConfig
    vision_config: VisionConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    rms_norm_eps: float = _epsilon(default=1e-6)
    norm_topk_prob: bool = True
    hidden_act: str = "silu"
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    dtype_is_assumed: bool = dataclasses.field(default=False, compare=False, repr=False)
    quantization: Quantization = dataclasses.field(default_factory=Quantization)
    quantization_config: Mapping[str, Any] | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_attention_heads % self.num_key_value_heads:
            allowed = f"a divisor of num_attention_heads {self.num_attention_heads}"
            fail("num_key_value_heads", self.num_key_value_heads, allowed)
        self._check_rope()
        if self.num_experts_per_tok > self.num_experts:
            fail("num_experts_per_tok", self.num_experts_per_tok, f"at most num_experts {self.num_experts}")
        for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                fail(name, getattr(self, name), f"from 0 to vocab_size - 1 = {self.vocab_size - 1}")
        if self.dtype not in DTYPES:
            fail("dtype", self.dtype, " or ".join(DTYPES))
        schemes = {
            "moe_intermediate_size": self.quantization.experts,
            "hidden_size": self.quantization.experts or self.quantization.attention,
            "head_dim": self.quantization.attention,
        }
        for name, scheme in schemes.items():
            if scheme is not None and scheme.format == "int4" and getattr(self, name) % 2:
                fail(name, getattr(self, name), "even for int4 weights")

    def _check_rope(self) -> None:
        section, head_dim = self.rope_scaling.mrope_section, self.head_dim
        if len(section) != 3 or min(section, default=0) <= 0:
            fail("rope_scaling.mrope_section", list(section), "three positive numbers (time, rows, columns)")
        if head_dim % 2 or sum(section) * 2 != head_dim:
            fail("rope_scaling.mrope_section", list(section), f"such that it sums to head_dim / 2 = {head_dim / 2:g}")
        index_dim = self.sa_config.indexer_head_dim
        if any(count * index_dim % head_dim for count in section):
            allowed = f"such that mrope_section {list(section)} x indexer_head_dim / head_dim {head_dim} is whole"
            fail("sa_config.indexer_head_dim", index_dim, allowed)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads the object of a `config.json`.

        The decoder's fields may also stand in `text_config`, those of rope in `rope_parameters`, and `dtype` may be
        called `torch_dtype`. Where a field is given twice, both must agree.

        Raises:
          UserError: a field is missing, or its value is not allowed.
        """
        if not isinstance(values, Mapping):
            fail("the file", values, "a JSON object")
        values = _one_rope(_one_decoder(values))
        dtype = _agreed("dtype", values.get("dtype"), "torch_dtype", values.get("torch_dtype"))
        values = {name: value for name, value in values.items() if name not in ("dtype", "torch_dtype")}
        names = ("quantization_config", "compression_config")
        given = {name: values.pop(name, None) or None for name in names}
        stated = _agreed(names[0], given[names[0]], names[1], given[names[1]])
        config = super().from_dict(values if dtype is None else {**values, "dtype": dtype})
        config = dataclasses.replace(config, dtype_is_assumed=dtype is None)
        if stated is None:
            return config
        field = next(name for name, value in given.items() if value is not None)
        quantization, _ = layouts.resolve(layouts.parse(stated, field=field), config.num_hidden_layers)
        return dataclasses.replace(config, quantization=quantization, quantization_config=stated)

    def to_dict(self) -> dict[str, Any]:
        """The object of a `config.json`, with unknown fields."""
        stated = self.quantization_config
        if stated is None and self.quantization:
            stated = layouts.write(self.quantization)
        return super().to_dict() | ({} if stated is None else {"quantization_config": dict(stated)})

    @classmethod
    def from_file(cls, path: str | Path) -> KeyeConfig:
        """Reads `path`, a `config.json` or a directory that holds one.

        Raises:
          UserError: the file is not JSON, a field is missing, or its value is not allowed.
          FileNotFoundError: there is no such file.
        """
        path = Path(path)
        return cls.from_dict(read_json(path / "config.json" if path.is_dir() else path))

    @property
    def unknown_fields(self) -> list[str]:
        """Names of the fields that have no effect and that nobody has looked at, with their sections."""
        sections: list[_Section] = [self, self.rope_scaling, self.sa_config, self.vision_config]
        return [name for each in sections for name in config_rules.unknown(each.SECTION, each.extra)]

    @property
    def notes(self) -> list[str]:
        """What the file leaves to a guess, or says without effect, one sentence each."""
        found = [f"config.json does not say the dtype of the weights; {self.dtype} is assumed"]
        if self.quantization_config is not None:
            notes = layouts.resolve(layouts.parse(self.quantization_config), self.num_hidden_layers)[1]
        else:
            notes = []
        unknown = self.unknown_fields
        shown = ", ".join(map(shorten_name, unknown[:_MOST_SHOWN])) + (", ..." if len(unknown) > _MOST_SHOWN else "")
        without_effect = [f"fields of config.json without effect: {shown}"] if unknown else []
        return found[: self.dtype_is_assumed] + notes + without_effect

    @property
    def mrope_section(self) -> tuple[int, ...]:
        """The numbers of rotary frequencies of a decoder head that follow the time, row and column position."""
        return self.rope_scaling.mrope_section

    @property
    def indexer_mrope_section(self) -> tuple[int, ...]:
        """`mrope_section` scaled to the head dim of the indexer: [16, 24, 24] of 128 becomes [8, 12, 12] of 64."""
        return tuple(count * self.sa_config.indexer_head_dim // self.head_dim for count in self.mrope_section)

    @property
    def jax_dtype(self) -> np.dtype:
        """`dtype` as numpy and JAX take it."""
        return DTYPES[self.dtype]


def _agreed(name: str, value: Any, other_name: str, other: Any) -> Any:
    """The value of a field that has two names; None if neither is given."""
    if value is not None and other is not None and value != other:
        raise UserError(
            f"config: {name} is {shorten(value)} and {other_name} is {shorten(other)}; they must agree, or one of them "
            "must be left out"
        )
    return other if value is None else value


def _one_decoder(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with those of `text_config` among them."""
    text = values.get("text_config")
    result = {name: value for name, value in values.items() if name != "text_config"}
    if text is None:
        return result
    if not isinstance(text, Mapping):
        fail("text_config", text, "a JSON object")
    kind = text.get("model_type")
    if kind is not None and not (isinstance(kind, str) and kind.casefold().startswith(("keye", "qwen3"))):
        fail("text_config.model_type", kind, "that of a Keye or Qwen3 decoder")
    for name, value in text.items():
        if name in ("model_type", "architectures"):
            continue
        if name == "text_config":
            fail("text_config.text_config", value, "left out")
        if name in config_rules.HARMLESS[""] and name not in ("dtype", "torch_dtype"):
            result.setdefault(name, value)
        else:
            result[name] = _agreed(name, result.get(name), f"text_config.{name}", value)
    return result


def _one_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with those of `rope_parameters` in `rope_scaling`, and rope's theta among the decoder's."""
    result = {name: value for name, value in values.items() if name != "rope_parameters"}
    merged: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        section = values.get(name)
        if section is None:
            continue
        if not isinstance(section, Mapping):
            fail(name, section, "a JSON object")
        for key, value in section.items():
            merged[key] = _agreed(f"rope_scaling.{key}", merged.get(key), f"{name}.{key}", value)
        theta = merged.pop("rope_theta", None)
        result["rope_theta"] = _agreed("rope_theta", result.get("rope_theta"), f"{name}.rope_theta", theta)
        result["rope_scaling"] = merged
    if result.get("rope_theta", 0) is None:
        del result["rope_theta"]
    return result
