"""What matrices are multiplied with, in the prompts that calibrate their scales."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class MatrixInputs:
    """The rows that the matrices of a weight were multiplied with, one matrix for each of e experts.

    Attributes:
      count: int `[e]`, how many rows.
      squares: float32 `[e, in]`, the mean of each input's square; for an expert without rows, that of all rows.
      samples: float32 `[e, r, in]`, the first r rows; zeros behind the last one.
    """

    count: np.ndarray
    squares: np.ndarray
    samples: np.ndarray


class Calibration(Protocol):
    """What calibrates the weights of a checkpoint.

    Attributes:
      digest: tells it from others.
    """

    digest: str

    def inputs(self) -> Mapping[str, MatrixInputs]:
        """Of the weights that it calibrates, by dotted path. Computed when it is called."""
        ...
