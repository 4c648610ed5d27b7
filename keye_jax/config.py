"""Model configuration, read from the released `config.json`.

Field names are those of the file. `KeyeConfig.from_file(path)` reads and checks it. Every problem is a `UserError`,
which is a `ValueError`, and names the field, its value and what is allowed. Unknown fields are kept in `extra` and have
no effect.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np

from keye_jax.errors import UserError

# The dtypes of weights, by their names in config.json.
DTYPES: dict[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
}


def _fail(field: str, value: Any, allowed: str) -> typing.NoReturn:
    raise UserError(f"config: {field} is {value!r}; it must be {allowed}")


def _read_value(field: str, value: Any, kind: Any) -> Any:
    """Returns `value` as a `kind`: int, float, bool, str or tuple[int, ...]; UserError if it is not of that kind."""
    if kind is int:
        if isinstance(value, bool) or not isinstance(value, int):
            _fail(field, value, "an integer")
        return value
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            _fail(field, value, "a number")
        return float(value)
    if kind is bool:
        if not isinstance(value, bool):
            _fail(field, value, "true or false")
        return value
    if kind is str:
        if not isinstance(value, str):
            _fail(field, value, "a string")
        return value
    if kind == tuple[int, ...]:
        if not isinstance(value, list | tuple) or not all(type(item) is int for item in value):
            _fail(field, value, "a list of integers")
        return tuple(value)
    raise AssertionError(f"no reader for {kind}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Section:
    """A frozen dataclass that is read from a JSON object and keeps unknown fields in `extra`."""

    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, prefix: str = "") -> Self:
        """Reads a section from a JSON object.

        Args:
          values: the fields of the object by name.
          prefix: put before the name of a field in error messages.

        Raises:
          UserError: a field is missing, or its value is not allowed.
        """
        if not isinstance(values, Mapping):
            _fail(prefix.rstrip(".") or "the file", values, "a JSON object")
        kinds = typing.get_type_hints(cls)
        known = {}
        for field in dataclasses.fields(cls):
            if field.name == "extra":
                continue
            if field.name not in values:
                if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                    raise UserError(f"config: {prefix}{field.name} is missing")
                continue
            value, kind = values[field.name], kinds[field.name]
            if isinstance(kind, type) and issubclass(kind, _Section):
                known[field.name] = kind.from_dict(value, prefix=f"{prefix}{field.name}.")
            else:
                known[field.name] = _read_value(f"{prefix}{field.name}", value, kind)
        extra = {name: value for name, value in values.items() if name not in known}
        return cls(**known, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """The section as a JSON object, with unknown fields."""
        known = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "extra":
                known[field.name] = value.to_dict() if isinstance(value, _Section) else value
        known = {name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}
        return known | dict(self.extra)

    def _require_positive(self, prefix: str, *names: str) -> None:
        for name in names:
            if getattr(self, name) <= 0:
                _fail(prefix + name, getattr(self, name), "positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseAttentionConfig(_Section):
    """`sa_config`: DeepSeek Sparse Attention. Each query attends to the `topk` keys that its indexer scores highest."""

    indexer_num_heads: int
    indexer_head_dim: int
    indexer_num_kv_heads: int
    topk: int
    q_chunk_size: int = 512
    kv_chunk_size: int = 512

    def __post_init__(self) -> None:
        self._require_positive(
            "sa_config.", "indexer_num_heads", "indexer_head_dim", "topk", "q_chunk_size", "kv_chunk_size"
        )
        if self.indexer_num_kv_heads != 1:
            _fail("sa_config.indexer_num_kv_heads", self.indexer_num_kv_heads, "1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScalingConfig(_Section):
    """`rope_scaling`: the numbers of rotary frequencies that follow the time, the row and the column position."""

    mrope_section: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(_Section):
    """`vision_config`: the SigLIP encoder. Image and patch sizes are in pixels, `spatial_merge_size` in patches."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    patch_size: int
    image_size: int
    num_channels: int = 3
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    spatial_merge_size: int = 2
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        self._require_positive(
            "vision_config.",
            *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size"),
            *("image_size", "num_channels", "layer_norm_eps", "spatial_merge_size", "rope_theta"),
        )
        if self.hidden_size % self.num_attention_heads:
            allowed = f"a divisor of vision_config.hidden_size {self.hidden_size}"
            _fail("vision_config.num_attention_heads", self.num_attention_heads, allowed)
        if self.head_dim % 4:
            allowed = "such that hidden_size / num_attention_heads is a multiple of 4 (rows and columns of 2-D rope)"
            _fail("vision_config.hidden_size", self.hidden_size, allowed)
        if self.image_size < self.patch_size:
            _fail("vision_config.image_size", self.image_size, f"at least patch_size {self.patch_size}")
        if self.hidden_act != "gelu_pytorch_tanh":
            _fail("vision_config.hidden_act", self.hidden_act, "'gelu_pytorch_tanh'")

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
    """The whole model: the fields of the decoder, with sections for sparse attention, rope and the vision encoder."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: RopeScalingConfig
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    sa_config: SparseAttentionConfig
    vision_config: VisionConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    rms_norm_eps: float = 1e-6
    norm_topk_prob: bool = True
    hidden_act: str = "silu"
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        self._require_positive(
            "",
            *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
            *("vocab_size", "max_position_embeddings", "rope_theta", "num_experts", "num_experts_per_tok"),
            *("moe_intermediate_size", "rms_norm_eps"),
        )
        if self.num_attention_heads % self.num_key_value_heads:
            allowed = f"a divisor of num_attention_heads {self.num_attention_heads}"
            _fail("num_key_value_heads", self.num_key_value_heads, allowed)
        self._check_rope()
        if self.num_experts_per_tok > self.num_experts:
            _fail("num_experts_per_tok", self.num_experts_per_tok, f"at most num_experts {self.num_experts}")
        for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                _fail(name, getattr(self, name), f"from 0 to vocab_size - 1 = {self.vocab_size - 1}")
        supported = {
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": (),
        }
        for name, value in supported.items():
            if getattr(self, name) != value:
                _fail(name, getattr(self, name), f"{value!r}, as in the released model")
        if self.dtype not in DTYPES:
            _fail("dtype", self.dtype, " or ".join(DTYPES))

    def _check_rope(self) -> None:
        section, head_dim = self.rope_scaling.mrope_section, self.head_dim
        if len(section) != 3 or min(section, default=0) <= 0:
            _fail("rope_scaling.mrope_section", list(section), "three positive numbers (time, rows, columns)")
        if head_dim % 2 or sum(section) * 2 != head_dim:
            _fail("rope_scaling.mrope_section", list(section), f"such that it sums to head_dim / 2 = {head_dim / 2:g}")
        index_dim = self.sa_config.indexer_head_dim
        if any(count * index_dim % head_dim for count in section):
            allowed = f"such that mrope_section {list(section)} x indexer_head_dim / head_dim {head_dim} is whole"
            _fail("sa_config.indexer_head_dim", index_dim, allowed)

    @classmethod
    def from_file(cls, path: str | Path) -> KeyeConfig:
        """Reads `path`, a `config.json` or a directory that holds one.

        Raises:
          UserError: the file is not JSON, a field is missing, or its value is not allowed.
          FileNotFoundError: there is no such file.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"config: {path} is not JSON: {error}") from error
        return cls.from_dict(values)

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
