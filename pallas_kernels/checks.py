"""What a public function takes: shapes with named sizes, dtypes and numbers, checked while a program is traced.

A shape is written as in docstrings: `"p page_size 2*k d"`. A name stands for the same size in all arguments of a call.
`...` stands for any number of leading axes.
"""

import dataclasses
import math
import numbers
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pallas_kernels.errors import ArgumentError

FLOATS = ("bfloat16", "float16", "float32")
FLOAT32 = ("float32",)
INDEX_FLOATS = ("float8_e4m3fn", *FLOATS)
INTEGERS = ("integers",)

_AT_LEAST_ONE = {"n", "d", "k", "page_size", "in", "out", "f", "tokens", "pages", "c"}
"""Sizes that cannot be 0. Others can: then the operation has nothing to do."""


@dataclasses.dataclass(frozen=True)
class Array:
    """An argument.

    Attributes:
      shape: named sizes, separated by spaces.
      dtypes: names of those allowed. Integers of every width become int32, which kernels read.
      optional: whether None is allowed.
      gradient: whether the operation has a gradient with respect to it; else it counts as a constant.
    """

    shape: str
    dtypes: tuple[str, ...] = FLOATS
    optional: bool = False
    gradient: bool = True


@dataclasses.dataclass(frozen=True)
class Result:
    """A result.

    Attributes:
      shape: sizes of the arguments, or products of them.
      dtype: a dtype's name, or the name of the argument with the same dtype.
      nothing: its elements where the operation has nothing to do.
    """

    shape: str
    dtype: str
    nothing: float = 0


class Sizes(dict[str, Any]):
    """Sizes by name; `...` is a tuple. `source` has the argument that each came from."""

    def __init__(self) -> None:
        super().__init__()
        self.source: dict[str, str] = {}

    def of(self, shape: str) -> tuple[int, ...]:
        """The sizes that a shape names."""
        return tuple(
            size
            for term in shape.split()
            for size in (self[term] if term == "..." else [math.prod(self._factor(x) for x in term.split("*"))])
        )

    def _factor(self, text: str) -> int:
        return int(text) if text.isdecimal() else self[text]

    @property
    def nothing_to_do(self) -> bool:
        """Whether some size is 0."""
        return not all(math.prod(size) if isinstance(size, tuple) else size for size in self.values())


@dataclasses.dataclass(frozen=True)
class Signature:
    """What an operation takes and gives.

    Attributes:
      operation: its name.
      arrays: by name, in order.
      results: in order; an operation with one result returns it alone.
      same_dtype: names of arguments that must have the dtype of the first of them.
      multiples: pairs of sizes; the first must be a multiple of the second.
      bounds: pairs of a size and a shape's term that it must not exceed.
    """

    operation: str
    arrays: Mapping[str, Array]
    results: tuple[Result, ...]
    same_dtype: tuple[str, ...] = ()
    multiples: tuple[tuple[str, str], ...] = ()
    bounds: tuple[tuple[str, str], ...] = ()

    def check(self, **given: Any) -> tuple[dict[str, Any], Sizes]:
        """The arguments as arrays, and their sizes.

        Raises:
          ArgumentError: an argument is no array, or its shape or dtype does not fit.
        """
        sizes, arrays = Sizes(), {}
        for name, wanted in self.arrays.items():
            if given[name] is None and wanted.optional:
                arrays[name] = None
            else:
                arrays[name] = array = self._array(name, given[name], wanted)
                self._match(name, array.shape, wanted.shape, sizes)
        for name in self.same_dtype[1:]:
            if arrays[name].dtype != (dtype := arrays[self.same_dtype[0]].dtype):
                self._refuse(f"{name} is {arrays[name].dtype}; it must be {dtype}, as {self.same_dtype[0]} is")
        for name, size in sizes.items():
            if name in _AT_LEAST_ONE and not size:
                self._refuse(f"{sizes.source[name]} has {name} = 0; it must be at least 1")
        for name, divisor in self.multiples:
            if sizes[name] % sizes[divisor]:
                self._refuse(
                    f"{sizes.source[name]} has {name} = {sizes[name]}; "
                    f"it must be a multiple of {divisor} = {sizes[divisor]} of {sizes.source[divisor]}"
                )
        for name, limit in self.bounds:
            if sizes[name] > (most := sizes.of(limit)[0]):
                self._refuse(f"{sizes.source[name]} has {name} = {sizes[name]}; it must be at most {limit} = {most}")
        return arrays, sizes

    def _array(self, name: str, given: Any, wanted: Array) -> jax.Array:
        try:
            array = jnp.asarray(given)
        except (TypeError, ValueError):
            self._refuse(f"{name} is {type(given).__name__}; it must be an array [{', '.join(wanted.shape.split())}]")
        if wanted.dtypes == INTEGERS:
            if not jnp.issubdtype(array.dtype, jnp.integer):
                self._refuse(f"{name} is {array.dtype}; it must be of integers")
            return array.astype(jnp.int32)
        if array.dtype.name not in wanted.dtypes:
            self._refuse(f"{name} is {array.dtype}; it must be {' or '.join(wanted.dtypes)}")
        return array if wanted.gradient else jax.lax.stop_gradient(array)

    def _match(self, name: str, shape: tuple[int, ...], wanted: str, sizes: Sizes) -> None:
        terms = wanted.split()
        text = f"{name} has shape {list(shape)}; it must be [{', '.join(terms)}]"
        if terms[:1] == ["..."]:
            leading = shape[: len(shape) - len(terms) + 1]
            if sizes.setdefault("...", leading) != leading:
                self._refuse(f"{text} with ... = {list(sizes['...'])}, as {sizes.source['...']} has")
            sizes.source.setdefault("...", name)
            terms, shape = terms[1:], shape[len(leading) :]
        if len(shape) != len(terms):
            self._refuse(text)
        for size, term in zip(shape, terms, strict=True):
            factor, _, letter = term.rpartition("*")
            if size % int(factor or 1):
                self._refuse(f"{text}, and {size} is no multiple of {factor}")
            if sizes.setdefault(letter, size // int(factor or 1)) != size // int(factor or 1):
                self._refuse(f"{text} with {letter} = {sizes[letter]}, as {sizes.source[letter]} has")
            sizes.source.setdefault(letter, name)

    def _refuse(self, text: str) -> NoReturn:
        raise ArgumentError(f"{self.operation}: {text}")


def number(operation: str, name: str, value: Any) -> float:
    """A finite number that is known while a program is traced.

    Raises:
      ArgumentError: `value` is none.
    """
    if isinstance(value, Tracer):
        raise ArgumentError(f"{operation}: {name} is a traced array; it must be a number, static under jax.jit")
    value = value.item() if isinstance(value, np.ndarray | jax.Array) and value.size == 1 else value
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ArgumentError(f"{operation}: {name} is {_short(value)}; it must be a finite number")
    return float(value)


def count(operation: str, name: str, value: Any, *, least: int = 1) -> int:
    """A whole number from `least` that is known while a program is traced.

    Raises:
      ArgumentError: `value` is none.
    """
    if isinstance(value, Tracer):
        raise ArgumentError(f"{operation}: {name} is a traced array; it must be a whole number, static under jax.jit")
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value < 2**31:
        raise ArgumentError(f"{operation}: {name} is {_short(value)}; it must be a whole number from {least}")
    return int(value)


def flag(operation: str, name: str, value: Any) -> bool:
    """True or False, known while a program is traced.

    Raises:
      ArgumentError: `value` is neither.
    """
    if not isinstance(value, bool | np.bool_):
        raise ArgumentError(f"{operation}: {name} is {_short(value)}; it must be True or False")
    return bool(value)


def _short(value: Any) -> str:
    text = re.sub(r"\s+", " ", repr(value))
    return text if len(text) <= 40 else f"{text[:37]}..."
