"""GPU kernels lowered for sm_90 at the released model's shapes: all of Mosaic's own checks, without a GPU."""

import jax
import pytest

from tests.gpu_compile.cases import CASES, OTHER_MODELS


@pytest.mark.parametrize("case", CASES + OTHER_MODELS, ids=str)
def test_lowering(case):
    program = jax.jit(case.function).trace(*case.arguments).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in program.as_text()
