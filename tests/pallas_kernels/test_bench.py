import json
import sys

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.bench import timing
from pallas_kernels.bench.__main__ import main
from pallas_kernels.bench.cases import POOL, TOP_K, selections


class TestTiming:
    def test_time_grows_with_the_work(self):
        small, large = (timing.seconds_per_call(jnp.dot, jnp.ones((n, n)), jnp.ones((n, n))) for n in (64, 1024))
        assert 0 < small < large

    def test_calls_of_a_program_are_not_merged(self, monkeypatch):
        """Not even where memory is too short for copies, and all calls are given the same arrays."""
        monkeypatch.setattr(timing, "COPIES_BYTES", 0)
        matrix = jnp.ones((64, 64))
        inputs = timing.copies((matrix, matrix), 5)
        assert all(x is matrix for one in inputs for x in one)
        compiled = timing.program(jnp.dot, 5).lower(inputs).compile().as_text()
        assert compiled.count(" dot(") == 5

    def test_calls_with_the_same_parameters_would_be_merged(self):
        matrix = jnp.ones((64, 64))
        program = jax.jit(lambda a, b: [jnp.dot(a, b) for _ in range(5)])
        assert program.lower(matrix, matrix).compile().as_text().count(" dot(") == 1

    def test_copies_are_made_of_the_smallest_arrays_first(self, monkeypatch):
        monkeypatch.setattr(timing, "COPIES_BYTES", 3 * 400 + 100)
        small, large = jnp.ones(100, jnp.float32), jnp.ones(200, jnp.float32)
        inputs = timing.copies((large, small), 4)
        assert len({id(one[0]) for one in inputs}) == 1
        assert len({one[1].unsafe_buffer_pointer() for one in inputs}) == 4

    @pytest.mark.parametrize(
        ("floor_seconds", "nbytes", "calls"),
        [(1e-6, 4, timing.MOST_CALLS), (1e-3, 4, 4), (1.0, 4, 1), (1e-6, 4 * 10**9, 8), (1e-6, 20 * 10**9, 4)],
    )
    def test_number_of_calls(self, floor_seconds, nbytes, calls):
        specs = [jax.ShapeDtypeStruct((nbytes // 4,), jnp.float32)]
        assert timing.number_of_calls(floor_seconds, specs) == calls

    def test_on_a_cpu_there_is_no_device_time(self):
        if jax.default_backend() == "cpu":
            assert timing.device_seconds(lambda: jnp.ones(4) + 1) is None


def test_clustered_selections_share_a_pool():
    rows = selections(32, 65_536, clustered=True)[0]
    for first in (0, 16):
        assert len({*rows[first : first + 16].ravel()}) <= POOL
    assert all(len({*row}) == TOP_K and (row[1:] > row[:-1]).all() for row in rows)


def test_figures_are_printed_and_written(monkeypatch, capsys, tmp_path):
    file = tmp_path / "bench.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--operation", "select_topk", "--json", str(file)])
    main()
    assert "lax.top_k" in capsys.readouterr().out
    rows = json.loads(file.read_text())["rows"]
    assert {row["operation"] for row in rows} == {"select_topk"}
    assert all(row["seconds"] > 0 for row in rows)


def test_an_unknown_operation_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--operation", "sort"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "--operation is 'sort'; it must be one of: expert_mlp" in capsys.readouterr().err
