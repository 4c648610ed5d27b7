"""What operations refuse, in one sentence, and what they give where there is nothing to do."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import pallas_kernels
from pallas_kernels import ArgumentError, UnsupportedError, dispatch
from tests.pallas_kernels.calls import calls

CALLS = {str(call): call for call in calls()}


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


def refusal(call, **changed):
    """The message for a call with other arguments."""
    arrays = call.arrays | {name: value for name, value in changed.items() if name in call.arrays}
    static = {name: value for name, value in changed.items() if name not in call.arrays}
    with pytest.raises(ArgumentError) as caught:
        call(*arrays.values(), **static)
    message = str(caught.value)
    assert message.startswith(f"{call.operation}: ") and "\n" not in message
    return message


def documented_shapes(call):
    """The names of every argument's sizes, from the docstring."""
    found = {}
    for names, shape in re.findall(
        r"^ +([\w, ]+): (?:\w+ )?`\[(.*?)\]`", getattr(pallas_kernels, call.operation).__doc__, re.M
    ):
        sizes = [size.strip() for size in shape.replace("...", "b, t").split(",")]
        found |= dict.fromkeys(names.split(", "), sizes)
    return found


class TestArguments:
    def test_every_axis_of_every_array(self, call):
        """Of sizes that two of the arguments have by the documentation, one less does not fit the others."""
        shapes = documented_shapes(call)
        times = collections.Counter(size for name in call.arrays for size in shapes[name])
        for name, array in call.arrays.items():
            assert len(shapes[name]) == array.ndim
            for axis, size in enumerate(shapes[name]):
                if times[size] > 1:
                    less = jnp.take(array, jnp.arange(array.shape[axis] - 1), axis)
                    assert f"{name} has" in refusal(call, **{name: less})
            assert f"{name} has" in refusal(call, **{name: array[..., None, None, None]})

    def test_dtypes(self, call):
        for name, array in call.arrays.items():
            other = jnp.int32 if jnp.issubdtype(array.dtype, jnp.floating) else jnp.float32
            assert f"{name} is {jnp.dtype(other)}; it must be " in refusal(call, **{name: array.astype(other)})
            assert f"{name} is str; it must be an array [" in refusal(call, **{name: "x"})

    def test_numbers(self, call):
        for name in call.static:
            for value in ("x", None, float("nan"), True, jnp.ones(2)):
                assert f"{name} is " in refusal(call, **{name: value})
        if "scale" in call.static:
            with pytest.raises(ArgumentError, match="scale is a traced array; it must be a number, static under"):
                jax.jit(lambda scale: call(*call.arrays.values(), scale=scale))(1.0)

    def test_sentences(self):
        sparse, top = CALLS["sparse_attention"], CALLS["topk_attention"]
        kv, q = sparse.arrays["kv"], sparse.arrays["q"]
        assert refusal(sparse, kv=kv[..., :5]) == (
            "sparse_attention: kv has shape [40, 4, 4, 5]; it must be [p, page_size, 2*k, d] with d = 8, as q has"
        )
        assert refusal(sparse, kv=kv[:, :, :3]).endswith("it must be [p, page_size, 2*k, d], and 3 is no multiple of 2")
        assert refusal(sparse, q=q[:, :, :3]).endswith("q has n = 3; it must be a multiple of k = 2 of kv")
        assert refusal(sparse, kv=kv[:, :0]).endswith("kv has page_size = 0; it must be at least 1")
        assert refusal(top, page_table=top.arrays["page_table"][:, :3]).endswith(
            "scores has s = 640; it must be at most m*page_size = 12"
        )
        assert refusal(CALLS["flash_attention"], v=CALLS["flash_attention"].arrays["v"].astype(jnp.bfloat16)).endswith(
            "v is bfloat16; it must be float32, as q is"
        )
        assert refusal(CALLS["select_topk"], lengths=jnp.zeros(3, jnp.int32)).endswith(
            "lengths has shape [3]; it must be [...] with ... = [8, 17], as scores has"
        )
        assert refusal(CALLS["select_topk"], k=0).endswith("k is 0; it must be a whole number from 1")
        text = "skip_below is -1; it must be a whole number from 0"
        assert refusal(CALLS["indexer_scores"], skip_below=-1).endswith(text)


class TestNothingToDo:
    EMPTY = (
        ("indexer_scores", {"q": 1, "weights": 1}, (8, 0, 640)),
        ("indexer_scores", {"q": 0, "weights": 0, "page_table": 0, "query_start": 0}, (0, 17, 640)),
        ("indexer_scores", {"page_table": 1}, (8, 17, 0)),
        ("indexer_scores", {"keys": 0, "key_scales": 0}, (8, 17, 640)),
        ("select_topk", {"scores": 0, "lengths": 0}, (0, 17, 6)),
        ("select_topk", {"scores": 2}, (8, 17, 6)),
        ("sparse_attention", {"q": 1, "indices": 1}, (8, 0, 4, 8)),
        ("sparse_attention", {"indices": 2}, (8, 17, 4, 8)),
        ("sparse_attention", {"kv": 0}, (8, 17, 4, 8)),
        ("topk_attention", {"q": 0, "scores": 0, "lengths": 0, "page_table": 0}, (0, 17, 4, 8)),
        ("topk_attention", {"scores": 2}, (8, 17, 4, 8)),
        ("flash_attention", {"q": 1}, (8, 0, 4, 8)),
        ("flash_attention", {"k": 1, "v": 1}, (8, 17, 4, 8)),
        ("paged_flash_attention", {"q": 0, "page_table": 0, "query_start": 0}, (0, 17, 4, 8)),
        ("paged_flash_attention", {"page_table": 1}, (8, 17, 4, 8)),
        ("grouped_matmul", {"lhs": 0}, (0, 6)),
        ("grouped_matmul", {"rhs": 0, "group_sizes": 0}, (48, 6)),
        ("expert_mlp", {"lhs": 0}, (0, 8)),
        ("expert_mlp", {"gate_up": 0, "down": 0, "group_sizes": 0}, (48, 8)),
    )

    @pytest.mark.parametrize(("operation", "axes", "shape"), EMPTY, ids=lambda x: x if isinstance(x, str) else None)
    def test_results(self, operation, axes, shape):
        """In every implementation that the operation has, also on a platform that does not run it."""
        call = CALLS[operation]
        arrays = [jnp.take(x, jnp.arange(0), axes[name]) if name in axes else x for name, x in call.arrays.items()]
        nothing = {"indexer_scores": -np.inf, "select_topk": -1}.get(operation, 0)
        for implementation in (None, *dispatch.OPERATIONS[operation].implementations):
            got = call(*arrays, implementation=implementation)
            first, *lse = got if isinstance(got, tuple) else (got,)
            assert first.shape == shape and (np.asarray(first) == nothing).all()
            assert all(x.shape == shape[:3] and np.isneginf(np.asarray(x)).all() for x in lse)
            jax.eval_shape(lambda *arrays, name=implementation: call(*arrays, implementation=name), *arrays)

    def test_a_group_without_rows_is_one_of_many(self):
        lhs, rhs = jnp.ones((4, 8)), jnp.ones((3, 8, 6))
        got = pallas_kernels.grouped_matmul(lhs, rhs, jnp.zeros(3, jnp.int32))
        assert got.shape == (4, 6) and not np.asarray(got).any()


class TestPlatforms:
    def test_a_forced_implementation_on_the_wrong_platform(self, call):
        if jax.default_backend() != "cpu":
            pytest.skip("a CPU is the platform that runs no kernel")
        arrays = list(call.arrays.values())
        if call.operation == "indexer_scores":
            arrays = self.supported_index_arrays()
        elif call.operation == "flash_attention":
            arrays = [x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x for x in arrays]
        message = "runs on TPUs, not on the platform 'cpu'; leave `implementation` out, or pass implementation='xla'"
        with pytest.raises(UnsupportedError, match=message):
            jax.jit(lambda *arrays: call(*arrays, implementation="mosaic_tpu")).lower(*arrays)

    @staticmethod
    def supported_index_arrays():
        q, keys = jnp.zeros((1, 2, 4, 128), jnp.bfloat16), jnp.zeros((2, 64, 128), jnp.bfloat16)
        return [q, jnp.zeros((1, 2, 4)), keys, jnp.zeros((1, 2), jnp.int32), jnp.zeros(1, jnp.int32), None]

    def test_programs_for_another_platform_can_still_be_lowered(self):
        arrays = jnp.zeros((2, 64)), jnp.zeros(2, jnp.int32)
        program = jax.jit(lambda x, lengths: pallas_kernels.select_topk(x, lengths, 8, implementation="mosaic_gpu"))
        assert "mosaic_gpu" in program.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
        with pytest.raises(UnsupportedError, match="'mosaic_gpu' runs on Hopper GPUs, not on the platform 'cpu'"):
            program.lower(*arrays)
        with pytest.raises(UnsupportedError, match="'mosaic_gpu' runs on Hopper GPUs, not on the platform 'cpu'"):
            program(*arrays)

    def test_another_card_of_the_same_platform(self, monkeypatch):
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        with pytest.raises(UnsupportedError, match="'mosaic_gpu' runs on Hopper GPUs, not on cpu; leave"):
            pallas_kernels.select_topk(jnp.zeros((2, 64)), jnp.zeros(2, jnp.int32), 8, implementation="mosaic_gpu")

    def test_interpreted_kernels_are_not_refused(self):
        with pltpu.force_tpu_interpret_mode():
            lhs = jnp.ones((4, 8))
            got = pallas_kernels.grouped_matmul(lhs, jnp.ones((1, 8, 8)), jnp.array([3]), implementation="mosaic_tpu")
        np.testing.assert_array_equal(got, np.outer([8, 8, 8, 0], np.ones(8)))
