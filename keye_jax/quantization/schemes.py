"""How weights of fewer bits are stored, as plain data.

A weight is a matrix of inputs and outputs, or one for each expert. A block of `group` inputs and `outputs` outputs
shares a scale, and with `zero_points` a zero. The number is `(value - zero) * scale`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

Format = Literal["fp8", "int8", "int4"]

FORMATS: tuple[Format, ...] = ("fp8", "int8", "int4")
ATTENTION_FORMATS: tuple[Format, ...] = ("fp8", "int8")
GROUP = 128
"""Inputs that share a scale of int4, if nothing else is asked for; and the side of a block of fp8."""

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Linear maps of a decoder layer's attention that can have fewer bits."""


@dataclasses.dataclass(frozen=True)
class Scheme:
    """The scheme of a weight.

    Attributes:
      format: "fp8", float8_e4m3fn; "int8", from -128 to 127; or "int4", from -8 to 7.
      group: inputs that share a scale; None for all.
      outputs: outputs that share a scale; None for all, of gate and of up each.
      zero_points: whether each block has a zero of its own, which is a whole number.
    """

    format: Format
    group: int | None = None
    outputs: int | None = 1
    zero_points: bool = False

    def block(self, inputs: int, outputs: int, *, parts: int = 1) -> tuple[int, int]:
        """Inputs and outputs of a block of a matrix.

        Args:
          inputs, outputs: of the matrix.
          parts: matrices that lie side by side in it, such as gate and up. No block has outputs of two of them: where
            blocks do not end with a part, they are cut into smaller ones with the same scale.
        """
        part = outputs // parts
        side = min(self.outputs or part, part)
        if parts > 1 and part % side:
            side = math.gcd(side, part)
        return min(self.group or inputs, inputs), side

    @property
    def bits(self) -> int:
        """Of one value."""
        return 4 if self.format == "int4" else 8

    def __str__(self) -> str:
        inputs = "all inputs" if self.group is None else f"{self.group} inputs"
        outputs = "all outputs" if self.outputs is None else f"{self.outputs} output{'s' if self.outputs > 1 else ''}"
        return f"{self.format}, a scale for {inputs} x {outputs}{', with zero points' if self.zero_points else ''}"


def grid(block: tuple[int, int], rows: int, columns: int) -> tuple[int, int]:
    """Blocks along the rows and the columns of a matrix; the last ones may be cut off."""
    return -(-rows // block[0]), -(-columns // block[1])


def standard(format: Format, group: int = GROUP) -> Scheme:
    """The scheme that `keye-jax quantize` makes of a format.

    fp8 has blocks of 128 x 128, as other block-FP8 checkpoints have. int8 has a scale for each output: 8 bits are exact
    enough without groups, and a product needs the scale only at its end. int4 has one for `group` inputs of an output.
    """
    if format == "fp8":
        return Scheme("fp8", GROUP, GROUP)
    return Scheme(format, group if format == "int4" else None)


@dataclasses.dataclass(frozen=True)
class Quantization:
    """The schemes of a model's weights. All others keep the dtypes of their files.

    Attributes:
      experts: of all experts.
      attention: of the linear maps `ATTENTION` of all layers.
    """

    experts: Scheme | None = None
    attention: Scheme | None = None

    def __bool__(self) -> bool:
        return self.experts is not None or self.attention is not None

    def of(self, path: tuple[str, ...]) -> Scheme | None:
        """The scheme of the weight at a module path."""
        if path[0] != "decoder" or len(path) < 5:
            return None
        if path[-2] == "moe":
            return self.experts
        return self.attention if path[-3] == "attention" and path[-2] in ATTENTION and path[-1] == "weight" else None

    def __str__(self) -> str:
        parts = {"experts": self.experts, "attention": self.attention}
        return "; ".join(f"{name}: {scheme}" for name, scheme in parts.items() if scheme is not None)
