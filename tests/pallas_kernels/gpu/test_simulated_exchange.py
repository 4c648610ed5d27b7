"""NumPy machines, one in a thread of Python for each GPU, exchange tokens. It tests logic without a GPU."""

import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.decode_layer.mosaic_gpu import combining, exchange
from pallas_kernels.decode_layer.mosaic_gpu.combining import CombineShape, combine
from pallas_kernels.decode_layer.mosaic_gpu.exchange import GatherShape, gather
from pallas_kernels.gpu import peers
from tests.pallas_kernels.gpu import numpy_machine

BF16, EPS = ml_dtypes.bfloat16, 1e-6


@pytest.fixture(autouse=True)
def in_numpy(monkeypatch):
    """Lets launches run in NumPy machines, each at its own pace."""

    def launch(*args, **how):
        run = numpy_machine.numpy_run(*args, **how)

        def later(*arrays):
            time.sleep(np.random.default_rng(threading.get_ident() % 1000).uniform(0, 0.01))
            return run(*arrays)

        return later

    monkeypatch.setattr(combining, "launch", launch)
    monkeypatch.setattr(exchange, "launch", launch)
    monkeypatch.setattr(numpy_machine, "MEMORIES", {})


def addresses(devices) -> Any:
    """Each device's row of a table like that of `peers.peer_addresses`, of memory that is made."""
    table = np.zeros((devices, 2 * devices + 1), np.int32)
    table[:, 0] = np.arange(devices)
    for rank in range(devices):
        low, high = 256 * rank, 7 - rank
        table[:, 2 * rank + 1 : 2 * rank + 3] = low, high
        numpy_machine.MEMORIES[low, high] = np.zeros(peers.memory_words(devices), np.uint32)
    return table


def on_all(devices, run):
    """What `run(rank)` gives on each device, all at once."""
    with ThreadPoolExecutor(devices) as pool:
        return list(pool.map(run, range(devices)))


def numbers(rng, *shape) -> Any:
    return rng.standard_normal(shape).astype(BF16)


@pytest.mark.parametrize(("devices", "size"), [(2, 2048), (3, 256)])
def test_exchanges_follow_each_other(devices, size):
    """Tokens of all devices arrive, and sums are of all devices, in order of their ranks, whatever was sent before."""
    table, rng = addresses(devices), np.random.default_rng(devices)
    for turn, own_tokens in enumerate((1, 2, 1, 3, 1)):
        rows = devices * own_tokens
        x, update = numbers(rng, devices, own_tokens, size), numbers(rng, devices, own_tokens, size)
        one_of_all = GatherShape(own_tokens, size, devices)
        found = on_all(devices, lambda rank: gather(x[rank], update[rank], table[rank], one_of_all)[0])  # noqa: B023
        everyone = (x.astype(np.float32) + update.astype(np.float32)).astype(BF16).reshape(rows, size)
        for each in found:
            np.testing.assert_array_equal(each, everyone, err_msg=f"turn {turn}")

        given, norm = numbers(rng, devices, 2 * rows, size), numbers(rng, size)
        weights: Any = rng.uniform(0, 1, (devices, rows, 2)).astype(np.float32)
        row_of: Any = rng.permutation(2 * rows).reshape(rows, 2).astype(np.int32)
        alone = [
            combine(given[rank], row_of, weights[rank], everyone * 0, norm, None, CombineShape(rows, size, 2, EPS))[0]
            for rank in range(devices)
        ]
        shape = CombineShape(rows, size, 2, EPS, devices)
        found = on_all(
            devices,
            lambda rank: combine(given[rank], row_of, weights[rank], everyone, norm, table[rank], shape),  # noqa: B023
        )
        mixed = functools.reduce(np.add, (each.astype(np.float32) for each in alone)).astype(BF16)
        y = (everyone.astype(np.float32) + mixed.astype(np.float32)).astype(BF16)
        np.testing.assert_array_equal(np.concatenate([each for each, _ in found]), y, err_msg=f"turn {turn}")
        squares = np.mean(np.square(y.astype(np.float32)), axis=1, keepdims=True)
        wanted = y.astype(np.float32) / np.sqrt(squares + EPS) * norm.astype(np.float32)
        normed = np.concatenate([each for _, each in found]).astype(np.float32)
        np.testing.assert_allclose(normed, wanted, rtol=2**-7, atol=0)


def test_places_do_not_overlap():
    devices = 3
    begins = [
        peers.place_of(place, turn, row)
        for place in range(peers.places(devices))
        for turn in (0, 1)
        for row in range(peers.MOST_ROWS)
    ]
    counters = [
        peers.counter_of(devices, kind, row)
        for kind in (exchange.GATHERED, exchange.SUMMED)
        for row in range(peers.MOST_ROWS)
    ]
    assert np.diff(sorted(begins)).min() == 2 * peers.ROW_WORDS
    assert min(counters) == max(begins) + 2 * peers.ROW_WORDS
    assert max(counters) == peers.memory_words(devices) - 1
    assert len({*counters}) == len(counters)
