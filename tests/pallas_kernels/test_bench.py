import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bench import inputs, power, tables, timing
from pallas_kernels.bench.__main__ import main
from pallas_kernels.bench.cases import KINDS, cases
from pallas_kernels.bench.layers import Layer, layers, summary
from pallas_kernels.shapes import KEYE_VL_2 as MODEL


class TestTiming:
    def test_time_grows_with_the_work(self):
        small, large = (timing.seconds_per_call(jnp.dot, jnp.ones((n, n)), jnp.ones((n, n))) for n in (64, 1024))
        assert 0 < small < large

    def test_calls_of_a_program_are_not_merged(self, monkeypatch):
        """Not even if memory is too small for copies and all calls get the same arrays."""
        monkeypatch.setattr(timing, "COPIES_BYTES", 0)
        matrix = jnp.ones((64, 64))
        inputs = timing.copies((matrix, matrix), 5)
        assert all(x is matrix for one in inputs for x in one)
        compiled = timing.program(jnp.dot, 5).lower(inputs).compile().as_text()
        assert compiled.count(" dot(") == 5

    def test_calls_with_the_same_parameters_would_be_merged(self):
        matrix = jnp.ones((64, 64))
        program = jax.jit(lambda a, b: [jnp.dot(a, b) for _ in range(5)])
        compiled = program.lower(matrix, matrix).compile().as_text()
        assert compiled is not None
        assert compiled.count(" dot(") == 1

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


class TestInputs:
    CONTEXT = 16_384

    @pytest.fixture
    def keys(self):
        return inputs.normal(0, self.CONTEXT, MODEL.index_dim)

    @pytest.mark.parametrize("union", [3000, 6000])
    def test_neighbours_select_a_union_of_the_size_asked_for(self, keys, union):
        q, gates = jax.jit(inputs.index_queries, static_argnums=0)(32, keys, self.CONTEXT, union)
        for first in (0, 16):
            group, lengths = slice(first, first + 16), jnp.full(16, self.CONTEXT)
            met = inputs.union_size(q[0, group], gates[0, group], keys, lengths)
            assert met == pytest.approx(union, rel=0.15)

    def test_unrelated_queries_share_what_they_share_by_chance(self, keys):
        q, gates = jax.jit(inputs.index_queries, static_argnums=0)(16, keys, self.CONTEXT, inputs.UNRELATED)
        met = inputs.union_size(q[0], gates[0], keys, jnp.full(16, self.CONTEXT))
        chance = self.CONTEXT * (1 - (1 - MODEL.top_k / self.CONTEXT) ** 16)
        assert met == pytest.approx(chance, rel=0.05)

    def test_a_context_shorter_than_the_union_is_seen_whole(self, keys):
        q, gates = jax.jit(inputs.index_queries, static_argnums=0)(16, keys, 1000, 8192)
        assert inputs.union_size(q[0], gates[0], keys, jnp.full(16, 1000)) == 1000

    def test_spread_positions_are_distinct(self):
        rows = np.asarray(inputs.spread_positions(3, 65_536))[:, 0]
        assert (np.diff(rows) > 0).all() and rows.min() >= 0 and rows.max() < 65_536


class TestLayers:
    def test_what_lies_between_samples_is_interpolated(self):
        layer = Layer(8 * 64, "clustered", 64, (0, 3, 7), (), layers(quick=True)[0].dense)
        rows = [[{"candidate": "dsa", "seconds": x, "union": 1.0}] for x in (1.0, 4.0, 8.0)]
        result = summary(layer, rows, [{"candidate": "cuDNN", "seconds": 72.0}])
        assert result["dsa_seconds"] == pytest.approx(sum(range(1, 9)))
        assert result["ratio"] == pytest.approx(0.5)
        assert [sample["start"] for sample in result["samples"]] == [0, 192, 448]

    def test_without_a_baseline_there_is_no_ratio(self):
        layer = Layer(64, "clustered", 64, (0,), (), layers(quick=True)[0].dense)
        rows = [[{"candidate": "dsa", "seconds": 1.0}]]
        assert "ratio" not in summary(layer, rows, [{"candidate": "cuDNN", "failed": "out of memory"}])

    def test_first_and_last_chunk_are_measured(self):
        for layer in layers(quick=False):
            assert layer.sampled[0] == 0
            assert (layer.sampled[-1] + 1) * layer.chunk == layer.tokens


@pytest.mark.parametrize("quick", [False, True])
def test_arguments_are_those_that_programs_are_compiled_for(quick):
    """JAX takes a weak dtype for another one than the same that is not."""
    for case in cases(quick=quick):
        made = jax.eval_shape(case.make, *(jnp.int32(x) for x in case.settings))
        assert not [x for x in jax.tree.leaves(made) if x.weak_type], (case.operation, case.size)


def test_figures_are_printed_and_written_and_read_again(monkeypatch, capsys, tmp_path):
    file = tmp_path / "bench.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--operation", "select_topk", "--json", str(file)])
    main()
    first = capsys.readouterr().out
    assert "lax.top_k" in first
    rows = json.loads(file.read_text())["rows"]
    assert {row["operation"] for row in rows} == {"select_topk"}
    assert all(row["seconds"] > 0 for row in rows)
    monkeypatch.setattr(sys, "argv", ["bench", "--from", str(file)])
    main()
    assert capsys.readouterr().out == first


def test_an_unknown_operation_is_refused(monkeypatch, capsys):
    assert "--operation is 'sort'; it must be one of: DSA attention" in refusal(
        monkeypatch, capsys, "--quick", "--operation", "sort"
    )


class TestPower:
    LINES = ("1575, 700.50, 700.00, Active", "1545, 690.50, 700.00, Not Active", "1560, 695.50, 700.00, Active")

    def test_medians_and_how_often_the_clock_was_held_down(self):
        found = power.read([*self.LINES, "[N/A], [N/A], 700.00, Not Active"])
        assert found == {"clock_hertz": 1.56e9, "watts": 695.5, "limit_watts": 700, "capped": pytest.approx(2 / 3)}
        assert power.read([]) == {}

    def test_the_gpu_is_asked_while_the_program_runs(self, monkeypatch, tmp_path):
        tool, asked = tmp_path / "nvidia-smi", tmp_path / "asked"
        line = f"[ -f {tmp_path / 'runs'} ] && echo '{self.LINES[0]}' || echo '210, 70.00, 700.00, Not Active'"
        tool.write_text(f'#!/bin/sh\necho "$@" > {asked}\nwhile true; do {line}; sleep 0.05; done\n')
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
        assert power.available()
        found = power.record((tmp_path / "runs").touch)
        assert found == {"clock_hertz": 1.575e9, "watts": 700.5, "limit_watts": 700, "capped": 1}
        assert "--id=3 " in asked.read_text()

    def test_without_nvidia_smi_it_is_refused(self, monkeypatch, capsys, tmp_path):
        monkeypatch.setenv("PATH", str(tmp_path))
        assert "--power needs nvidia-smi, which is not on the PATH" in refusal(monkeypatch, capsys, "--power")

    def test_it_has_columns_of_its_own(self, capsys):
        row = {"operation": "sort", "size": "8", "unit": "flops", "candidate": "xla", "seconds": 1, "rate": 1e12}
        result = {"device": "H200", "ceilings": {"flops": None}, "layers": []}
        tables.show(result | {"rows": [row]})
        assert "capped" not in capsys.readouterr().out
        tables.show(result | {"rows": [row, row | {"candidate": "mosaic_gpu"} | power.read(list(self.LINES))]})
        assert " 1,560 │ 696 of 700 │    67% " in capsys.readouterr().out


class TestPlot:
    def test_without_matplotlib_one_sentence_says_what_to_do(self, monkeypatch, capsys):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        message = refusal(monkeypatch, capsys, "--plot", "x.svg")
        assert "--plot needs matplotlib: pip install 'keye-jax[bench]', or draw elsewhere with --from" in message

    def test_another_format_is_refused(self, monkeypatch, capsys):
        assert "--plot is 'x.gif'; it must end in .svg or .png" in refusal(monkeypatch, capsys, "--plot", "x.gif")

    def test_draws(self, monkeypatch, tmp_path):
        pytest.importorskip("matplotlib")
        layer = {"chunk": 2048, "samples": [{"start": 0, "union": 1.0, "seconds": {}}], "dense": "cuDNN"}
        times = {"dsa_seconds": 0.01, "dense_seconds": 0.02, "ratio": 0.5}
        whole = [layer | times | {"tokens": n * 1024, "selections": kind} for n in (8, 16) for kind in KINDS]
        source, target = tmp_path / "bench.json", tmp_path / "bench.svg"
        source.write_text(
            json.dumps({"device": "GPU", "jax": "", "ceilings": {"flops": None}, "rows": [], "layers": whole})
        )
        monkeypatch.setattr(sys, "argv", ["bench", "--from", str(source), "--plot", str(target)])
        main()
        assert "0.50<" in target.read_text()


def refusal(monkeypatch, capsys, *arguments):
    """The command's message on stderr when it refuses its arguments."""
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    return capsys.readouterr().err
