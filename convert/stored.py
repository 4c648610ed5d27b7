"""Weights of fewer bits as safetensors files have them: names, shapes, packing, and what they mean.

    layout             tensors of a linear map of K inputs and N outputs
    fp8                weight F8 [N, K], weight_scale_inv [N blocks, K blocks]
    float-quantized    weight F8 [N, K], weight_scale [N blocks, K blocks], [N, 1] or one number
    int-quantized      weight I8 [N, K], weight_scale [N, groups], weight_zero_point I8 [N, groups]
    pack-quantized     weight_packed I32 [N, K / 8], weight_scale [N, groups], weight_zero_point I32 [N / 8, groups],
                       weight_g_idx [K]; 4 or 8 bits, the lowest first, with 8 or 128 added
    awq                qweight I32 [K, N / 8], qzeros I32 [groups, N / 8], scales [groups, N]; in a word the outputs
                       0 2 4 6 1 3 5 7, the lowest bits first
    gptq               qweight I32 [K / 8, N], qzeros I32 [groups, N / 8], scales [groups, N], g_idx [K]

Experts have these tensors one by one, or all in one with the expert as the first dimension. Then the weight's name
takes the place of `weight`, as in `gate_up_proj_scale_inv`; and "fp8" has the matrices as the released layout has
them, [K, N].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from convert import mapping
from convert.mapping import Tensor, expert_pieces
from convert.reader import STORED, TensorEntry
from keye_jax.errors import UserError
from keye_jax.quantization.layouts import StoredScheme
from keye_jax.quantization.quantize import VALUES
from keye_jax.quantization.schemes import grid
from pallas_kernels.quantized import INT4_ZERO, pack_nibbles, unpack_nibbles

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FLOATS = ("BF16", "F16", "F32")
_SUFFIXES = {
    "fp8": {"values": ("",), "scales": ("_scale_inv", "_scale")},
    "float-quantized": {"values": ("",), "scales": ("_scale",)},
    "int-quantized": {"values": ("",), "scales": ("_scale",), "zeros": ("_zero_point",)},
    "pack-quantized": {
        "values": ("_packed",),
        "scales": ("_scale",),
        "zeros": ("_zero_point",),
        "g_idx": ("_g_idx",),
    },
}
_PACKED = {"values": "qweight", "scales": "scales", "zeros": "qzeros", "g_idx": "g_idx"}
# Tensors beside a weight that say nothing about it, or what its shape says.
_BESIDE = ("_shape", "_g_idx", "_scale_2")
_BESIDE_MODULE = ("input_scale", "g_idx", "qzeros", "k_scale", "v_scale", "input_zero_point")


class Source(Protocol):
    """What is asked of a `SafetensorsSource`."""

    entries: dict[str, TensorEntry]

    def read(self, name: str) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A matrix of a weight.

    Attributes:
      module: the name before `.weight`; of fused experts the weight's own.
      expert: its number; None of fused experts, which all are one piece, and of other weights.
      columns: `(start, stop)` of its outputs among the weight's.
    """

    module: str
    expert: int | None
    columns: tuple[int, int]
    fused: bool = False


class StoredWeight:
    """One weight in files.

    Args:
      source: the files.
      weight: its row of the table of names, as if it were not made smaller.
      stored: how files store it.

    Attributes:
      names: all tensors that belong to it.
      problems: one sentence for each that is missing, or has another shape or dtype.
    """

    def __init__(self, source: Source, weight: Tensor, stored: StoredScheme) -> None:
        self._source, self._weight, self._stored = source, weight, stored
        self._roles = ["values", "scales", *(["zeros"] if self._has_zeros else []), *(["g_idx"] * stored.act_order)]
        self.problems: list[str] = []
        self.names: set[str] = set()
        fused = _Piece(weight.checkpoint_name, None, (0, self._outputs), fused=weight.part == "experts")
        if weight.part != "experts":
            self._pieces = [dataclasses.replace(fused, module=weight.checkpoint_name.removesuffix(".weight"))]
        elif any(name in source.entries for role in self._roles for name in self._candidates(fused, role)):
            self._pieces = [fused]
        else:
            self._pieces = [
                _Piece(piece.checkpoint_name.removesuffix(".weight"), piece.expert, piece.columns)
                for piece in expert_pieces(weight)
            ]
        for piece in self._pieces:
            self._check(piece)

    @property
    def is_there(self) -> bool:
        """Whether files have any tensor of it."""
        return any(
            name in self._source.entries
            for piece in self._pieces
            for role in self._roles
            for name in self._candidates(piece, role)
        )

    def dtype(self, role: str) -> np.dtype:
        """The dtype of an array as the model holds it."""
        if role != "scales":
            return VALUES[self._stored.scheme.format] if role == "values" else np.dtype(np.int8)
        name = self._name(self._pieces[0], "scales")
        return STORED[self._source.entries[name].dtype] if name else np.dtype(np.float32)

    def read(self, tensor: Tensor, role: str) -> np.ndarray:
        """An array of the weight as the model holds it.

        Args:
          tensor: its row of the table.
          role: "values", "scales" or "zeros".

        Raises:
          UserError: a zero is none that its layout can have.
        """
        scheme, is_expert = self._stored.scheme, self._weight.part == "experts"
        side = scheme.block(self._inputs, self._outputs, parts=mapping.parts_of(self._weight))[1]
        out = np.empty(tensor.shape, self.dtype(role))
        for expert, (start, stop), matrix in self._matrices(role):
            if role == "values":
                found, at = matrix, slice(start, stop)
                if scheme.format == "int4":
                    # The inputs are the first axis here, whichever it is in the model.
                    found = pack_nibbles(found, 0)
            else:
                found = _regrid(matrix, stop - start, scheme.outputs, side)
                at = slice(start // side, start // side + found.shape[1])
            if is_expert:
                out[expert, :, at] = found
            else:
                out[...] = found.T.reshape(tensor.shape)
        return out

    def numbers(self, dtype: np.dtype) -> np.ndarray:
        """What the weight stands for, in its shape in the model."""
        scheme, is_expert = self._stored.scheme, self._weight.part == "experts"
        out = np.empty(self._weight.shape if is_expert else (self._outputs, self._inputs), dtype)
        rest = {role: self._matrices(role) for role in self._roles if role != "values"}
        for expert, (start, stop), values in self._matrices("values"):
            found = {role: next(matrices)[2] for role, matrices in rest.items()}
            rows, columns = np.arange(values.shape[0]), np.arange(values.shape[1])
            rows = found["g_idx"][:, 0] if "g_idx" in found else rows // min(scheme.group or len(rows), len(rows))
            blocks = min(scheme.outputs or stop - start, stop - start)
            if found["scales"].shape[1] not in (1, -(-(stop - start) // blocks)):
                blocks = scheme.block(self._inputs, self._outputs, parts=mapping.parts_of(self._weight))[1]
            where = np.ix_(rows, np.minimum(columns // blocks, found["scales"].shape[1] - 1))
            zeros = np.float32(INT4_ZERO if scheme.format == "int4" else 0)
            if "zeros" in found:
                zeros = found["zeros"].astype(np.float32)[where]
            made = ((values.astype(np.float32) - zeros) * found["scales"].astype(np.float32)[where]).astype(dtype)
            if is_expert:
                out[expert, :, start:stop] = made
            else:
                out[...] = made.T
        return out.reshape(self._weight.shape)

    @property
    def _has_zeros(self) -> bool:
        return self._stored.scheme.zero_points

    @property
    def _inputs(self) -> int:
        shape = self._weight.checkpoint_shape
        return shape[-1] if self._weight.part != "experts" else shape[1]

    @property
    def _outputs(self) -> int:
        shape = self._weight.checkpoint_shape
        return shape[0] if self._weight.part != "experts" else shape[2]

    def _candidates(self, piece: _Piece, role: str) -> list[str]:
        """The names that an array of a piece may have."""
        layout = self._stored.layout
        if layout in ("awq", "gptq"):
            name = _PACKED[role]
            return [f"{piece.module}.{name}", *([f"{piece.module}_{name}"] if piece.fused else [])]
        stem = piece.module if piece.fused else f"{piece.module}.weight"
        return [stem + suffix for suffix in _SUFFIXES[layout].get(role, ())]

    def _name(self, piece: _Piece, role: str) -> str | None:
        return next((name for name in self._candidates(piece, role) if name in self._source.entries), None)

    def _check(self, piece: _Piece) -> None:
        stem = piece.module if piece.fused else f"{piece.module}.weight"
        self.names |= {stem + suffix for suffix in _BESIDE} | {f"{piece.module}.{name}" for name in _BESIDE_MODULE}
        for role in self._roles:
            shapes, dtypes = self._wanted(piece, role)
            name = self._name(piece, role)
            self.names.update(self._candidates(piece, role))
            if name is None:
                first = self._candidates(piece, role)[0]
                self.problems.append(f"{first}: it is missing; its shape must be {list(shapes[0])}")
                continue
            entry = self._source.entries[name]
            if entry.shape not in shapes:
                allowed = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
                self.problems.append(f"{name}: its shape is {list(entry.shape)}; it must be {allowed}")
            elif entry.dtype not in dtypes:
                self.problems.append(f"{name}: its dtype is {entry.dtype}; it must be {' or '.join(dtypes)}")

    def _wanted(self, piece: _Piece, role: str) -> tuple[list[tuple[int, ...]], tuple[str, ...]]:
        """Shapes and dtypes that an array of a piece may have; the first shape is the usual one."""
        layout, scheme = self._stored.layout, self._stored.scheme
        rows, columns = self._inputs, piece.columns[1] - piece.columns[0]
        block = (min(scheme.group or rows, rows), min(scheme.outputs or columns, columns))
        groups, blocks = grid(block, rows, columns)
        each = 32 // scheme.bits
        packed_columns = -(-columns // each)
        if role == "g_idx":
            shapes, dtypes = [(rows,)], ("I32", "I64")
        elif layout in ("awq", "gptq"):
            packed = (rows, packed_columns) if layout == "awq" else (-(-rows // each), columns)
            shapes = [{"values": packed, "scales": (groups, columns), "zeros": (groups, packed_columns)}[role]]
            dtypes = _FLOATS if role == "scales" else ("I32",)
        elif role == "values":
            packs = layout == "pack-quantized"
            shapes = [(columns, -(-rows // each) if packs else rows)]
            dtypes = ("F8_E4M3",) if scheme.format == "fp8" else ("I32",) if packs else ("I8",)
        elif role == "zeros":
            packs = layout == "pack-quantized"
            shapes, dtypes = [(packed_columns if packs else columns, groups)], (("I32",) if packs else ("I8",))
        else:
            shapes, dtypes = [(blocks, groups)], _FLOATS
            if blocks == groups == 1:
                shapes += [(1,), ()]
            if groups == 1:
                shapes += [(blocks,)]
        if not piece.fused:
            return shapes, dtypes
        if layout == "fp8":
            shapes = [shape[::-1] for shape in shapes]
        if role == "scales":
            own = scheme.block(rows, columns, parts=mapping.parts_of(self._weight))
            own_shape = grid(own, rows, columns)
            shapes += [own_shape if layout == "fp8" else own_shape[::-1]]
        return [(self._weight.shape[0], *shape) for shape in shapes], dtypes

    def _matrices(self, role: str) -> Iterator[tuple[int, tuple[int, int], np.ndarray]]:
        """An array of each matrix, `[inputs or groups, outputs or blocks]`; expert, outputs, and the array.

        Values of int4 and their zeros are 0 to 15, unpacked. `g_idx` is `[inputs, 1]`.
        """
        for piece in self._pieces:
            name = self._name(piece, role)
            assert name is not None, "checked before"
            raw = self._source.read(name)
            for expert, matrix in enumerate(raw) if piece.fused else [(piece.expert or 0, raw)]:
                yield expert, piece.columns, self._decode(name, role, matrix, piece)

    def _decode(self, name: str, role: str, raw: np.ndarray, piece: _Piece) -> np.ndarray:
        layout, scheme = self._stored.layout, self._stored.scheme
        columns = piece.columns[1] - piece.columns[0]
        if role == "g_idx":
            groups = grid((min(scheme.group or self._inputs, self._inputs), 1), self._inputs, 1)[0]
            if raw.size and not (raw.min() >= 0 and raw.max() < groups):
                raise UserError(f"{name} has {raw.min()} to {raw.max()}; it must have groups from 0 to {groups - 1}")
            return raw.reshape(-1, 1)
        if role == "scales":
            if layout in ("awq", "gptq") or (piece.fused and layout == "fp8"):
                return raw
            return raw.reshape(raw.shape if raw.ndim == 2 else (raw.size, 1)).T
        bits, offset = scheme.bits, 0
        if layout == "awq":
            found = unpack(raw, bits, 1, _AWQ_ORDER)[:, :columns]
        elif layout == "gptq":
            found = unpack(raw, bits, 0)[: self._inputs] if role == "values" else unpack(raw, bits, 1)[:, :columns]
            offset = self._stored.zero_offset if role == "zeros" else 0
        elif layout == "pack-quantized":
            found = unpack(raw, bits, 1)[:, : self._inputs].T if role == "values" else unpack(raw, bits, 0)[:columns].T
        else:
            return raw if piece.fused and layout == "fp8" else raw.T
        if role == "values":
            return found if bits == 4 else (found.astype(np.int16) - 128).astype(np.int8)
        zeros = found.astype(np.int16) + offset - (0 if bits == 4 else 128)
        if zeros.max(initial=0) > (15 if bits == 4 else 127):
            raise UserError(f"{name} has a zero point behind the largest value, which no matrix of {bits} bits needs")
        return zeros.astype(np.int8)


def _regrid(found: np.ndarray, width: int, outputs: int | None, side: int) -> np.ndarray:
    """Scales `[groups, blocks]` of blocks of `outputs` of `width` outputs, for blocks of `side` outputs."""
    count = -(-width // side)
    old = min(outputs or width, width)
    if found.shape[1] == count:
        return found
    return found[:, np.minimum(np.arange(count) * side // old, found.shape[1] - 1)]


def encode(tensor: Tensor, array: np.ndarray) -> np.ndarray:
    """An array of the model as files have it; `StoredWeight.read` undoes this.

    Args:
      tensor: its row of the table. Tensors that are no part of a weight of fewer bits are returned as they are.
      array: in our shape.
    """
    if tensor.scheme is None or tensor.layout == "fp8":
        return array
    packs = tensor.scheme.format == "int4" and tensor.role != "scales"
    if tensor.part != "experts":
        flat = array.reshape(tensor.checkpoint_shape[0] if tensor.role == "values" else len(array), -1)
        if packs:
            return pack(unpack_nibbles(flat, 1), 4, 1) if tensor.role == "values" else pack(flat.view(np.uint8), 4, 0)
        return flat
    out = np.empty(tensor.checkpoint_shape, np.int32 if packs else array.dtype)
    for expert, matrix in enumerate(array):
        if not packs:
            out[expert] = matrix.T
        elif tensor.role == "values":
            out[expert] = pack(unpack_nibbles(matrix, 0).T, 4, 1)
        else:
            out[expert] = pack(matrix.view(np.uint8).T, 4, 0)
    return out


def unpack(words: np.ndarray, bits: int, axis: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """uint8 of the numbers in int32 words, the lowest bits first, along an axis.

    Args:
      order: which of a word's numbers each of them is; in turn if left out.
    """
    each = 32 // bits
    words = np.moveaxis(words.view(np.uint32), axis, -1)
    out = np.empty((*words.shape, each), np.uint8)
    for place, number in enumerate(order or range(each)):
        out[..., number] = (words >> np.uint32(bits * place)) & np.uint32((1 << bits) - 1)
    return np.moveaxis(out.reshape(*words.shape[:-1], -1), -1, axis)


def pack(numbers: np.ndarray, bits: int, axis: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """int32 words of uint8 numbers, which undoes `unpack`. Numbers that are missing in the last word are 0."""
    each = 32 // bits
    numbers = np.moveaxis(numbers, axis, -1)
    if missing := -numbers.shape[-1] % each:
        numbers = np.concatenate([numbers, np.zeros((*numbers.shape[:-1], missing), np.uint8)], axis=-1)
    grouped = numbers.reshape(*numbers.shape[:-1], -1, each)
    words = np.zeros(grouped.shape[:-1], np.uint32)
    for place, number in enumerate(order or range(each)):
        words |= grouped[..., number].astype(np.uint32) << np.uint32(bits * place)
    return np.moveaxis(words.view(np.int32), -1, axis)
