"""Finds all problems of a checkpoint before anything is written or loaded."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from convert import buckets, mapping
from convert.manifest import Manifest
from convert.reader import DTYPES, SafetensorsSource
from convert.stored import StoredWeight
from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.progress import PhaseProgress
from keye_jax.quantization import layouts
from keye_jax.quantization.quantize import VALUES

if TYPE_CHECKING:
    from convert.orbax_io import OrbaxSource

_ALLOWED = " or ".join(DTYPES)


@dataclasses.dataclass(frozen=True)
class FoundTensor:
    """A tensor that a checkpoint holds.

    Attributes:
      tensor: its entry in the table of names, with the number of rows that the checkpoint has.
      dtype: its stored dtype.
    """

    tensor: mapping.Tensor
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return self.tensor.size * self.dtype.itemsize


def check(source: SafetensorsSource | OrbaxSource, config: KeyeConfig) -> tuple[list[FoundTensor], list[str]]:
    """The tensors of `config` that `source` holds, in the order of the table, and one sentence for each problem."""
    if isinstance(source, SafetensorsSource):
        return _check_safetensors(source, config)
    return _check_orbax(source, config)


def damage(directory: Path, report: PhaseProgress | None = None, *, part: tuple[int, int] = (0, 1)) -> list[str]:
    """Reads every file that the manifest has a checksum of; one sentence for each that is not as it was written.

    Args:
      directory: of a checkpoint, or that of `buckets.local`.
      report: called with "verify", the bytes read and the bytes of all files.
      part: `(i, n)`: only every n-th file, from the i-th on, as when n processes share the work.

    Raises:
      UserError: the manifest is damaged.
    """
    manifest = Manifest.read(directory)
    if manifest is None or not manifest.has_checksums:
        return []
    index, parts = part
    shared = Manifest(dict(list(manifest.files.items())[index::parts]))
    return shared.wrong_content(buckets.blocks_of(directory, manifest), report)


def raise_problems(directory: Path, problems: list[str]) -> None:
    """Raises one `UserError` that lists all `problems`, if there are any; many of one kind are one sentence."""
    found = gather(problems)
    name = buckets.shown(directory)
    if len(found) == 1:
        raise UserError(f"{name}: {found[0]}")
    if found:
        raise UserError("\n".join([f"{name} has {len(found)} problems:", *(f"  {problem}" for problem in found)]))


# More problems of one kind than this are one sentence, with the names of so many.
_ALONE, _NAMED = 3, 3
_KINDS = (
    (r"it is missing; its shape must be ", "tensors are missing"),
    (r"it is not an? (tensor|array) of this model", "tensors are not of this model"),
    (r"its shape is ", "tensors have another shape than config.json says"),
    (r"its dtype is ", "tensors have a dtype that cannot be read"),
    (r"it is missing(?!; its shape)", "files are missing"),
    (r"it is (truncated|too long): ", "files do not have the length that they must have"),
    (r"its content is damaged: ", "files are damaged, by their SHA-256"),
    (r"it cannot be read: ", "files cannot be read"),
)


def gather(problems: list[str]) -> list[str]:
    """`problems`, with those that many tensors have alike in one sentence of how many and the first few."""
    gathered: list[str] = []
    for kind, words in _KINDS:
        alike = [problem for problem in problems if re.match(kind, problem.partition(": ")[2])]
        if len(alike) > _ALONE:
            names = ", ".join(problem.partition(": ")[0] for problem in alike[:_NAMED])
            rest = f" and {len(alike) - _NAMED:,} more"
            gathered.append(f"{len(alike):,} {words}: {names}{rest}")
            problems = [problem for problem in problems if problem not in set(alike)]
    return gathered + problems


def _check_safetensors(source: SafetensorsSource, config: KeyeConfig) -> tuple[list[FoundTensor], list[str]]:
    found: list[FoundTensor] = []
    problems = list(source.problems)
    known: set[str] = set()
    stored = _StoredWeights(source, config, known, problems)
    for tensor in mapping.rows(config):
        name = tensor.checkpoint_name
        if stored.take(tensor, found):
            continue
        known.add(name)
        pieces = mapping.expert_pieces(tensor)
        present = [piece for piece in pieces if piece.checkpoint_name in source.entries]
        if present and name in source.entries:
            problems.append(f"{name}: its experts are stored both fused and one by one; only one may be")
            known |= {piece.checkpoint_name for piece in pieces}
        elif present:
            known |= {piece.checkpoint_name for piece in pieces}
            dtype = _check_pieces(source, tensor, pieces, problems)
            if dtype is not None:
                found.append(FoundTensor(tensor, dtype))
        elif name in source.entries:
            entry = source.entries[name]
            if not tensor.accepts(entry.shape):
                problems.append(_wrong_shape(name, entry.shape, tensor.checkpoint_shape))
            elif entry.dtype not in DTYPES:
                problems.append(f"{name}: its dtype is {entry.dtype}; it must be {_ALLOWED}")
            else:
                actual = tensor.with_rows(entry.shape[0]) if tensor.free_rows else tensor
                found.append(FoundTensor(actual, DTYPES[entry.dtype]))
        elif tensor.in_model and not {name, *(piece.checkpoint_name for piece in pieces)} & source.in_bad_files:
            # A tensor that the index puts into a bad file is reported with the file.
            problems.append(f"{name}: it is missing; its shape must be {list(tensor.checkpoint_shape)}")
    unexpected = sorted(name for name in source.entries.keys() - known if not mapping.is_ignored(name))
    if (prefix := _common_prefix(unexpected, known)) is not None:
        problems.append(f"{len(unexpected):,} names begin with {prefix!r}; without it they are those of this model")
    else:
        problems += [f"{name}: it is not a tensor of this model{_hint(name, config)}" for name in unexpected]
    if prefix is not None or source.is_partly_unknown:
        # What is missing has another name, or is in a file that cannot be read, which is a problem already.
        problems = [problem for problem in problems if ": it is missing; " not in problem]
    return found, problems


class _StoredWeights:
    """Finds the weights that files hold in fewer bits, and what reads them.

    Args:
      known: gets the names of their tensors.
      problems: gets what is wrong with them.
    """

    def __init__(self, source: SafetensorsSource, config: KeyeConfig, known: set[str], problems: list[str]) -> None:
        self._source, self._known, self._problems, self._dtype = source, known, problems, config.jax_dtype
        stated = config.quantization_config
        if stated is None and config.quantization:
            stated = layouts.write(config.quantization)
        self._stated = None if stated is None else layouts.parse(stated)
        self._weights: dict[str, StoredWeight] = {}
        source.readers, source.dequantized = {}, []

    def take(self, tensor: mapping.Tensor, found: list[FoundTensor]) -> bool:
        """Whether `tensor` is of such a weight. If it is whole, adds it to `found`."""
        if self._stated is None:
            return False
        weight = tensor.weight or tensor
        name = weight.checkpoint_name
        if not tensor.role and (entry := self._source.entries.get(name)) is not None and entry.dtype in DTYPES:
            return False
        pieces = mapping.expert_pieces(weight)
        module = pieces[0].checkpoint_name if pieces else name
        scheme = self._stated.of(module.removesuffix(".weight")) if module.endswith(".weight") else None
        if scheme is None:
            return False
        if name not in self._weights:
            stored = StoredWeight(self._source, weight, scheme)
            if not tensor.role and not stored.is_there:
                return False
            self._weights[name] = stored
            self._known |= stored.names
            self._problems += [
                problem for problem in stored.problems if problem.split(":")[0] not in self._source.in_bad_files
            ]
        stored, table_name = self._weights[name], tensor.checkpoint_name
        if stored.problems:
            return True
        if tensor.role:
            self._source.readers[table_name] = functools.partial(stored.read, tensor, tensor.role)
            found.append(FoundTensor(tensor, stored.dtype(tensor.role)))
        else:
            self._source.readers[table_name] = functools.partial(stored.numbers, self._dtype)
            self._source.dequantized.append(table_name)
            found.append(FoundTensor(tensor, self._dtype))
        return True


def _common_prefix(unexpected: list[str], known: set[str]) -> str | None:
    """What all of several unexpected names have before names of this model; None if there is no such prefix."""
    if len(unexpected) < 2:
        return None
    first = unexpected[0]
    starts = (first[: at + 1] for at, letter in enumerate(first) if letter == ".")
    return next((s for s in starts if all(n.startswith(s) and n[len(s) :] in known for n in unexpected)), None)


def _check_pieces(
    source: SafetensorsSource, tensor: mapping.Tensor, pieces: list[mapping.ExpertPiece], problems: list[str]
) -> np.dtype | None:
    """The common dtype of the linears of a fused tensor. If they have problems, adds these to `problems`: None."""
    before = len(problems)
    dtypes: dict[str, str] = {}
    for piece in pieces:
        name = piece.checkpoint_name
        entry = source.entries.get(name)
        if entry is None:
            if name not in source.in_bad_files:
                problems.append(f"{name}: it is missing; its shape must be {list(piece.checkpoint_shape)}")
            continue
        dtypes.setdefault(entry.dtype, name)
        if entry.shape != piece.checkpoint_shape:
            problems.append(_wrong_shape(name, entry.shape, piece.checkpoint_shape))
        elif entry.dtype not in DTYPES:
            problems.append(f"{name}: its dtype is {entry.dtype}; it must be {_ALLOWED}")
    if len(dtypes) > 1:
        names = " and ".join(f"{dtype} ({name})" for dtype, name in dtypes.items())
        problems.append(f"{tensor.checkpoint_name}: its experts have more than one dtype: {names}")
    complete = all(piece.checkpoint_name in source.entries for piece in pieces)
    return DTYPES[next(iter(dtypes))] if complete and len(problems) == before else None


def _hint(name: str, config: KeyeConfig) -> str:
    if mapping.fused_name(name):
        return f" of {config.num_hidden_layers} layers and {config.num_experts} experts"
    return ""


def _wrong_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    return f"{name}: its shape is {list(shape)}; it must be {list(expected)}"


def _check_orbax(source: OrbaxSource, config: KeyeConfig) -> tuple[list[FoundTensor], list[str]]:
    found: list[FoundTensor] = []
    problems = list(source.problems)
    if problems:
        return found, problems
    tensors = {tensor.path: tensor for tensor in mapping.rows(config)}
    for path, tensor in tensors.items():
        entry = source.entries.get(path)
        name = tensor.dotted_path
        if entry is None:
            if tensor.in_model:
                problems.append(f"{name}: it is missing; its shape must be {list(tensor.shape)}")
            continue
        actual = tensor.with_rows(entry.shape[0]) if tensor.free_rows and entry.shape else tensor
        if entry.shape != actual.shape:
            problems.append(_wrong_shape(name, entry.shape, tensor.shape))
        elif entry.dtype not in (allowed := _dtypes(tensor)):
            names = _ALLOWED if len(allowed) > 1 else " or ".join(map(str, allowed))
            problems.append(f"{name}: its dtype is {entry.dtype}; it must be {names}")
        else:
            found.append(FoundTensor(actual, entry.dtype))
    for path in sorted(source.entries.keys() - tensors.keys()):
        problems.append(f"{'.'.join(path)}: it is not an array of this model")
    return found, problems


def _dtypes(tensor: mapping.Tensor) -> list[np.dtype]:
    """The dtypes that an array may have in Orbax."""
    if tensor.scheme is None or tensor.role == "scales":
        return list(DTYPES.values())
    return [VALUES[tensor.scheme.format] if tensor.role == "values" else np.dtype(np.int8)]


# Exponent bits, by item size and dtype. An infinity or NaN has all of them set.
_EXPONENT = {2: {"BF16": 0x7F80, "F16": 0x7C00}, 4: {"F32": 0x7F800000}}
_BLOCK_ELEMENTS = 16 << 20


def count_non_finite(values: np.ndarray) -> int:
    """Counts the infinities and NaNs of an array; one of bfloat16, float16 or float32 is not copied."""
    name = next((name for name, dtype in DTYPES.items() if dtype == values.dtype), None)
    if name is None:
        # Whole numbers are finite, and of float8_e4m3fn only NaNs are not.
        return int(np.isnan(values.astype(np.float32)).sum()) if values.dtype == VALUES["fp8"] else 0
    mask = _EXPONENT[values.dtype.itemsize][name]
    bits = np.ascontiguousarray(values).reshape(-1).view(f"u{values.dtype.itemsize}")
    blocks = (bits[start : start + _BLOCK_ELEMENTS] for start in range(0, bits.size, _BLOCK_ELEMENTS))
    return sum(int(np.count_nonzero((block & mask) == mask)) for block in blocks)
