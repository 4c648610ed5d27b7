"""The table of names: those of the released checkpoint, and this project's module paths.

Both directions of a conversion use `TABLE`. Every row is only a reshape, so that converting a checkpoint there and back
keeps every bit. Shapes are written in named sizes:

  V vocabulary, D hidden, N query heads, K key/value heads, H head dim, E experts, F expert hidden,
  NI indexer heads, HI indexer head dim, Dv vision hidden, Nv vision heads, Hv vision head dim, Fv vision MLP hidden,
  C channels, P patch side, G patches of the position table, R rows of the packing position table, M merged width.

`{i}` counts decoder layers, `{j}` vision layers, `{e}` experts.
"""

from __future__ import annotations

import dataclasses
import math
import re

from keye_jax.config import KeyeConfig
from keye_jax.quantization import layouts
from keye_jax.quantization.layouts import Layout
from keye_jax.quantization.schemes import Scheme, grid

# Rows of the packing position table in the released checkpoint. No field of its config holds this number.
PACKING_ROWS = 32768

# A checkpoint may hold these tensors. They are not weights of this model and are not converted.
IGNORED = re.compile(r"visual\.vision_model\.head\..*|(.*\.)?rotary_emb\.inv_freq")

# Names of other layouts: newer transformers put all below `model.`, and wrappers put a prefix before all.
_WRAPPERS = re.compile(r"(?:_orig_mod\.|module\.)+")
_LAYOUTS = (
    (re.compile(r"model\.language_model\.(?=embed_tokens|layers|norm)"), "model."),
    (re.compile(r"(?:model\.)?language_model\.model\."), "model."),
    (re.compile(r"(?:model\.)?language_model\.lm_head\."), "lm_head."),
    (re.compile(r"model\.(?=visual\.|mlp_AR\.|lm_head\.)"), ""),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
      checkpoint_name: the name in a safetensors file, with `{i}` or `{j}` for the layer.
      checkpoint_shape: the dimensions there, expressions over the named sizes.
      path: our module path, dotted, with the same counters.
      shape: our dimensions; their product equals that of `checkpoint_shape`.
      part: the part of the model in the output of `keye-jax inspect`.
      in_model: whether the model uses the array. An unused array may be absent; if it is there, it is converted.
    """

    checkpoint_name: str
    checkpoint_shape: tuple[str, ...]
    path: str
    shape: tuple[str, ...]
    part: str
    in_model: bool = True


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a configuration: a row with the values of its counters and sizes.

    The attributes are those of `Row`, and of an array of a weight of fewer bits some more.

    Attributes:
      free_rows: whether any leading dimension is accepted.
      weight: the weight that the array is of, as it is with all bits.
      role: "values", "scales" or "zeros".
      scheme: of the weight.
      layout: in which files are written.
    """

    checkpoint_name: str
    checkpoint_shape: tuple[int, ...]
    path: tuple[str, ...]
    shape: tuple[int, ...]
    part: str
    in_model: bool
    free_rows: bool = False
    weight: Tensor | None = None
    role: str = ""
    scheme: Scheme | None = None
    layout: Layout | None = None

    @property
    def parameters(self) -> int:
        """Numbers of the model that the array holds; scales and zeros are none."""
        if self.weight is None:
            return self.size
        return self.weight.size if self.role == "values" else 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dotted_path(self) -> str:
        return ".".join(self.path)

    def accepts(self, checkpoint_shape: tuple[int, ...]) -> bool:
        """Whether this tensor may be stored with `checkpoint_shape`."""
        if self.free_rows:
            same_tail = checkpoint_shape[1:] == self.checkpoint_shape[1:]
            return len(checkpoint_shape) == len(self.checkpoint_shape) and same_tail and checkpoint_shape[0] > 0
        return checkpoint_shape == self.checkpoint_shape

    def with_rows(self, rows: int) -> Tensor:
        """The same tensor with the leading dimension `rows`."""
        shapes = {"checkpoint_shape": (rows, *self.checkpoint_shape[1:]), "shape": (rows, *self.shape[1:])}
        return dataclasses.replace(self, **shapes)


@dataclasses.dataclass(frozen=True)
class ExpertPiece:
    """The place of one expert's linear in a fused tensor: `fused[expert, :, columns] = linear.T`.

    Attributes:
      checkpoint_name: the name of the linear.
      checkpoint_shape: `(out, in)`.
      expert: index on the fused tensor's first axis.
      columns: `(start, stop)` on its last axis.
    """

    checkpoint_name: str
    checkpoint_shape: tuple[int, int]
    expert: int
    columns: tuple[int, int]


def _row(name: str, shape: str, path: str, ours: str, part: str, *, in_model: bool = True) -> Row:
    return Row(name, tuple(shape.split()), path, tuple(ours.split()), part, in_model)


def _decoder_rows() -> tuple[Row, ...]:
    source, ours = "model.layers.{i}.", "decoder.layers.{i}."
    attention, indexer = source + "self_attn.", source + "self_attn.sa_indexer."
    return (
        _row(source + "input_layernorm.weight", "D", ours + "input_norm.weight", "D", "norms"),
        _row(attention + "q_proj.weight", "N*H D", ours + "attention.q_proj.weight", "N H D", "attention"),
        _row(attention + "k_proj.weight", "K*H D", ours + "attention.k_proj.weight", "K H D", "attention"),
        _row(attention + "v_proj.weight", "K*H D", ours + "attention.v_proj.weight", "K H D", "attention"),
        _row(attention + "o_proj.weight", "D N*H", ours + "attention.o_proj.weight", "D N H", "attention"),
        _row(attention + "q_norm.weight", "H", ours + "attention.q_norm.weight", "H", "attention"),
        _row(attention + "k_norm.weight", "H", ours + "attention.k_norm.weight", "H", "attention"),
        _row(indexer + "q_proj.weight", "NI*HI+NI D", ours + "indexer.q_proj.weight", "NI*HI+NI D", "indexer"),
        _row(indexer + "k_proj.weight", "HI D", ours + "indexer.k_proj.weight", "HI D", "indexer"),
        _row(indexer + "q_norm.weight", "HI", ours + "indexer.q_norm.weight", "HI", "indexer"),
        _row(indexer + "k_norm.weight", "HI", ours + "indexer.k_norm.weight", "HI", "indexer"),
        _row(indexer + "k_norm.bias", "HI", ours + "indexer.k_norm.bias", "HI", "indexer"),
        _row(source + "post_attention_layernorm.weight", "D", ours + "post_attention_norm.weight", "D", "norms"),
        _row(source + "mlp.gate.weight", "E D", ours + "moe.router.weight", "E D", "router"),
        _row(source + "mlp.experts.gate_up_proj", "E D 2*F", ours + "moe.gate_up_proj", "E D 2*F", "experts"),
        _row(source + "mlp.experts.down_proj", "E F D", ours + "moe.down_proj", "E F D", "experts"),
    )


def _with_bias(name: str, shape: str, path: str, ours: str, bias: str, our_bias: str, part: str) -> tuple[Row, Row]:
    weight = _row(f"{name}.weight", shape, f"{path}.weight", ours, part)
    return weight, _row(f"{name}.bias", bias, f"{path}.bias", our_bias, part)


def _vision_rows() -> tuple[Row, ...]:
    source, ours = "visual.vision_model.", "vision."
    layer, our_layer = source + "encoder.layers.{j}.", ours + "layers.{j}."
    embeddings, heads = source + "embeddings.", ("Dv Dv", "Nv Hv Dv", "Dv", "Nv Hv")
    rows = [
        *_with_bias(
            embeddings + "patch_embedding", "Dv C P P", ours + "patch_embedding", "Dv C*P*P", "Dv", "Dv", "vision"
        ),
        _row(embeddings + "position_embedding.weight", "G Dv", ours + "position_embedding.weight", "G Dv", "vision"),
        _row(
            embeddings + "packing_position_embedding.weight",
            "R Dv",
            ours + "packing_position_embedding.weight",
            "R Dv",
            "unused",
            in_model=False,
        ),
        *_with_bias(layer + "layer_norm1", "Dv", our_layer + "norm1", "Dv", "Dv", "Dv", "vision"),
    ]
    for name in ("q_proj", "k_proj", "v_proj"):
        shape, our_shape, bias, our_bias = heads
        path = f"{our_layer}attention.{name}"
        rows += _with_bias(f"{layer}self_attn.{name}", shape, path, our_shape, bias, our_bias, "vision")
    return (
        *rows,
        *_with_bias(
            layer + "self_attn.out_proj", "Dv Dv", our_layer + "attention.o_proj", "Dv Nv Hv", "Dv", "Dv", "vision"
        ),
        *_with_bias(layer + "layer_norm2", "Dv", our_layer + "norm2", "Dv", "Dv", "Dv", "vision"),
        *_with_bias(layer + "mlp.fc1", "Fv Dv", our_layer + "mlp.fc1", "Fv Dv", "Fv", "Fv", "vision"),
        *_with_bias(layer + "mlp.fc2", "Dv Fv", our_layer + "mlp.fc2", "Dv Fv", "Dv", "Dv", "vision"),
        *_with_bias(source + "post_layernorm", "Dv", ours + "final_norm", "Dv", "Dv", "Dv", "vision"),
    )


TABLE: tuple[Row, ...] = (
    _row("model.embed_tokens.weight", "V D", "decoder.embed_tokens.weight", "V D", "embedding"),
    *_decoder_rows(),
    _row("model.norm.weight", "D", "decoder.norm.weight", "D", "norms"),
    _row("lm_head.weight", "V D", "decoder.lm_head.weight", "V D", "lm_head"),
    *_vision_rows(),
    *_with_bias("mlp_AR.pre_norm", "M", "projector.norm", "M", "M", "M", "projector"),
    *_with_bias("mlp_AR.linear_1", "M M", "projector.linear1", "M M", "M", "M", "projector"),
    *_with_bias("mlp_AR.linear_2", "D M", "projector.linear2", "D M", "D", "D", "projector"),
)

PARTS: tuple[str, ...] = tuple(dict.fromkeys(row.part for row in TABLE))

# Linears of one expert: the name behind `experts.{e}.`, the fused tensor, and the half of its columns.
_EXPERT_LINEARS = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", 0)}
_EXPERT_NAME = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)\d+\.(gate_proj|up_proj|down_proj)\.weight")


def sizes(config: KeyeConfig) -> dict[str, int]:
    """The named sizes of `config`."""
    vision, sparse = config.vision_config, config.sa_config
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "N": config.num_attention_heads,
        "K": config.num_key_value_heads,
        "H": config.head_dim,
        "E": config.num_experts,
        "F": config.moe_intermediate_size,
        "NI": sparse.indexer_num_heads,
        "HI": sparse.indexer_head_dim,
        "Dv": vision.hidden_size,
        "Nv": vision.num_attention_heads,
        "Hv": vision.head_dim,
        "Fv": vision.intermediate_size,
        "C": vision.num_channels,
        "P": vision.patch_size,
        "G": vision.base_grid**2,
        "M": vision.merged_size,
        "R": PACKING_ROWS,
    }


def _dimension(expression: str, named: dict[str, int]) -> int:
    """A sum of products of named sizes and integers, such as `NI*HI+NI`."""
    terms = (term.split("*") for term in expression.split("+"))
    return sum(math.prod(named.get(factor) or int(factor) for factor in term) for term in terms)


def rows(config: KeyeConfig) -> list[Tensor]:
    """All tensors of a checkpoint of `config`, layer by layer, in the order in which they are written."""
    named = sizes(config)
    counts = {"{i}": config.num_hidden_layers, "{j}": config.vision_config.num_hidden_layers}

    def concrete(row: Row, counter: str = "", index: int = 0) -> Tensor:
        def fill(text: str) -> str:
            return text.replace(counter, str(index)) if counter else text

        return Tensor(
            checkpoint_name=fill(row.checkpoint_name),
            checkpoint_shape=tuple(_dimension(item, named) for item in row.checkpoint_shape),
            path=tuple(fill(row.path).split(".")),
            shape=tuple(_dimension(item, named) for item in row.shape),
            part=row.part,
            in_model=row.in_model,
            free_rows="R" in row.shape,
        )

    tensors: list[Tensor] = []
    pending = list(TABLE)
    while pending:
        counter = next((key for key in counts if key in pending[0].checkpoint_name), "")
        block = [pending.pop(0)]
        while counter and pending and counter in pending[0].checkpoint_name:
            block.append(pending.pop(0))
        for index in range(counts.get(counter, 1)):
            tensors += [concrete(row, counter, index) for row in block]
    return [part for tensor in tensors for part in _arrays(tensor, config)]


def parts_of(weight: Tensor) -> int:
    """Matrices of an expert that lie side by side in a fused weight: gate and up, or one."""
    return 2 if weight.path[-1] == "gate_up_proj" else 1


def _arrays(weight: Tensor, config: KeyeConfig) -> list[Tensor]:
    """The arrays of a weight of fewer bits; any other tensor alone."""
    scheme = config.quantization.of(weight.path)
    if scheme is None:
        return [weight]
    fp8 = layouts.writes_fp8(config.quantization)
    layout: Layout = "fp8" if fp8 else layouts.written_layout(scheme)
    packed = scheme.format == "int4"
    shape = weight.shape
    if weight.part == "experts":
        experts, inputs, outputs = shape
        blocks = grid(scheme.block(inputs, outputs, parts=parts_of(weight)), inputs, outputs)
        first, stored = (experts,), (experts, inputs // 2, outputs) if packed else shape
        turned = not fp8
    else:
        outputs, inputs = weight.checkpoint_shape
        blocks = grid(scheme.block(inputs, outputs), inputs, outputs)[::-1]
        first, stored = (), (*shape[:-1], shape[-1] // 2) if packed else shape
        turned = False
    scales = (*first, *blocks)
    in_files = (*first, *blocks[::-1]) if turned else scales
    groups = in_files[-1]
    values = (*first, outputs, -(-inputs // 8)) if packed else (*first, outputs, inputs) if turned else None
    zeros = (*first, -(-outputs // 8), groups) if packed else in_files
    name = weight.checkpoint_name
    found = [
        ("values", name + ("_packed" if packed else ""), values or weight.checkpoint_shape, stored),
        ("scales", name + ("_scale_inv" if fp8 else "_scale"), in_files, scales),
    ]
    if scheme.zero_points:
        found.append(("zeros", f"{name}_zero_point", zeros, scales))
    return [
        dataclasses.replace(
            weight,
            checkpoint_name=stored_name,
            checkpoint_shape=stored_shape,
            path=(*weight.path, role),
            shape=our_shape,
            weight=weight,
            role=role,
            scheme=scheme,
            layout=layout,
        )
        for role, stored_name, stored_shape, our_shape in found
    ]


def expert_pieces(tensor: Tensor) -> list[ExpertPiece]:
    """The linears that a fused expert tensor consists of, expert by expert; empty for any other tensor."""
    prefix, _, fused = tensor.checkpoint_name.rpartition(".")
    linears = [(name, half) for name, (owner, half) in _EXPERT_LINEARS.items() if owner == fused]
    if tensor.part != "experts" or not linears or tensor.role:
        return []
    experts, inputs, outputs = tensor.shape
    width = outputs // len(linears)
    return [
        ExpertPiece(f"{prefix}.{expert}.{name}.weight", (width, inputs), expert, (half * width, (half + 1) * width))
        for expert in range(experts)
        for name, half in linears
    ]


def fused_name(checkpoint_name: str) -> str | None:
    """The name of the fused tensor that holds the linear `checkpoint_name`; None if that is no linear of an expert."""
    match = _EXPERT_NAME.fullmatch(checkpoint_name)
    return match.group(1) + _EXPERT_LINEARS[match.group(2)][0] if match else None


def canonical_name(checkpoint_name: str) -> str:
    """The name in the table of a tensor that may have that of another layout, or the prefix of a wrapper."""
    name = checkpoint_name
    if (wrapper := _WRAPPERS.match(name)) is not None:
        name = name[wrapper.end() :]
    for layout, ours in _LAYOUTS:
        if (match := layout.match(name)) is not None:
            return ours + name[match.end() :]
    return name


def is_ignored(checkpoint_name: str) -> bool:
    """Whether the tensor is one of those that are not converted."""
    return IGNORED.fullmatch(checkpoint_name) is not None
