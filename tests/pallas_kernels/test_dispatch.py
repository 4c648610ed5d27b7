"""Which implementation runs, and what is refused."""

import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import dispatch
from pallas_kernels.errors import UnsupportedError
from pallas_kernels.flash_attention import flash_attention, paged_flash_attention
from pallas_kernels.select_topk import select_topk

PAIRS = [(operation, name) for operation in dispatch.OPERATIONS for name in dispatch.IMPLEMENTATIONS]


def attend(implementation):
    x = jnp.ones((1, 4, 2, 8))
    return flash_attention(x, x, x, jnp.full(1, 4), scale=1.0, implementation=implementation)


def test_an_unknown_implementation_is_refused():
    message = "select_topk is 'cuda'; it must be one of: mosaic_gpu, cudnn, mosaic_tpu, sparse_core, xla"
    with pytest.raises(ValueError, match=message):
        select_topk(jnp.zeros((1, 4)), jnp.array([4]), 2, implementation="cuda")
    with pytest.raises(ValueError, match=message):
        dispatch.resolve("select_topk", "cuda")


def test_an_implementation_that_the_operation_lacks_is_refused():
    with pytest.raises(UnsupportedError, match="flash_attention has no implementation 'mosaic_gpu'; it has: cudnn, mo"):
        attend("mosaic_gpu")


@pytest.mark.parametrize(("operation", "name"), PAIRS)
def test_every_implementation_exists_or_is_refused(operation, name):
    if name in dispatch.OPERATIONS[operation].implementations:
        assert callable(dispatch.implementation_of(operation, name))
        assert dispatch.resolve(operation, name) == name
    else:
        assert dispatch.resolve(operation, name) == "xla"
        with pytest.raises(UnsupportedError):
            dispatch.candidates(operation, name)


def test_a_preference_that_the_operation_lacks_becomes_the_portable_one():
    np.testing.assert_array_equal(attend(dispatch.resolve("flash_attention", "mosaic_gpu")), attend("xla"))


def test_no_preference_stays_none():
    assert dispatch.resolve("flash_attention", None) is None


def test_arguments_that_the_forced_implementation_refuses_are_an_error():
    q, kv, table = jnp.ones((1, 2, 8, 128)), jnp.ones((1, 64, 4, 128)), jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(UnsupportedError, match="mosaic_gpu: one query per sequence, not 2"):
        paged_flash_attention(q, kv, table, jnp.zeros(1, jnp.int32), scale=1.0, implementation="mosaic_gpu")


def test_the_documentation_lists_the_same_implementations():
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    listed = {}
    for row in re.findall(r"^\| (`\w+`.*)\|$", page, re.M):
        cells = [cell.strip() for cell in row.split("|")]
        if len(cells) == 1 + len(dispatch.IMPLEMENTATIONS):
            names = {n for n, cell in zip(dispatch.IMPLEMENTATIONS, cells[1:], strict=True) if cell != "\N{EN DASH}"}
            listed |= dict.fromkeys(re.findall(r"`(\w+)`", cells[0]), names)
    assert listed == {name: set(operation.implementations) for name, operation in dispatch.OPERATIONS.items()}


def test_the_package_has_the_functions_and_imports_little():
    """Neither JAX before a function is used, nor the kernels of any platform before one is tried, nor the model.

    The package's names are functions, also after the folders of the same names were imported.
    """
    code = (
        "import sys, pallas_kernels; print('jax' in sys.modules)\n"
        "import pallas_kernels.topk_attention.xla\n"
        "from pallas_kernels import *; from pallas_kernels import paging, shapes\n"
        "print(all(callable(getattr(pallas_kernels, name)) for name in pallas_kernels.__all__))\n"
        "print([n for n in sys.modules if n.startswith(('keye_jax', 'convert', 'jax.experimental.pallas'))])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "False\nTrue\n[]\n", done.stdout + done.stderr
    assert set(dispatch.OPERATIONS) < set(pallas_kernels.__all__)
    assert sorted(pallas_kernels.__all__) == sorted(sum(pallas_kernels._MODULES.values(), ()))
    assert (root / "pallas_kernels" / "py.typed").exists()
