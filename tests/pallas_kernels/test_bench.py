import json
import sys

import jax.numpy as jnp
import pytest

from pallas_kernels.bench.__main__ import main
from pallas_kernels.bench.cases import POOL, TOP_K, selections
from pallas_kernels.bench.timing import seconds_per_call


def test_time_grows_with_the_work():
    small, large = (seconds_per_call(jnp.dot, jnp.ones((n, n)), jnp.ones((n, n))) for n in (64, 1024))
    assert 0 < small < large


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
