"""One engine over several processes: all of them take the same turns, and answer as one process does."""

import itertools
import json
import signal
import socket
import threading
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from keye_jax.engine import hosts
from keye_jax.engine.hosts import Command, Hosts, Turn
from keye_jax.engine.media import Pixels
from keye_jax.engine.request import Request
from tests.keye_jax.processes import SHARDING, begin, finish, free_port, told, write_inputs
from tests.near_ties import assert_leads


class Store:
    """JAX's key-value store as far as it is needed, within one process.

    Attributes:
      values: by key.
      largest: bytes of the largest one that was set.
    """

    def __init__(self):
        self.values: dict[str, bytes] = {}
        self.largest = 0
        self._changed = threading.Condition()

    def key_value_set_bytes(self, key, value):
        with self._changed:
            assert key not in self.values
            self.values[key] = value
            self.largest = max(self.largest, len(value))
            self._changed.notify_all()

    def blocking_key_value_get_bytes(self, key, milliseconds):
        with self._changed:
            assert self._changed.wait_for(lambda: key in self.values, 60), key
            return self.values[key]

    def key_value_delete(self, folder):
        assert folder.endswith("/")
        with self._changed:
            self.values = {key: value for key, value in self.values.items() if not key.startswith(folder)}


@pytest.fixture
def store(monkeypatch):
    store = Store()
    monkeypatch.setattr(hosts.distributed, "store", lambda: store)
    return store


@pytest.fixture
def three(monkeypatch, store):
    """The same engine's hosts in three processes."""
    monkeypatch.setattr(hosts, "_engines", itertools.repeat(0))
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 3)
    found, rules = [], cast(Any, SimpleNamespace(sharding=lambda: "over all"))
    for number in range(3):
        monkeypatch.setattr(hosts.jax, "process_index", lambda number=number: number)
        found.append(Hosts(rules))
    return found


def never():
    raise AssertionError("this process does not look")


def follow(process, taken):
    """A thread that takes turns in a process until the engine ends."""

    def run():
        while not taken or not taken[-1].close:
            taken.append(process.exchange(never))

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def frames(seed, megabytes):
    patches = np.random.default_rng(seed).integers(0, 256, (megabytes << 20) // 588 * 588, np.uint8)
    return Pixels(0, 0, 0, np.ones((1, 3), np.int32), 0, 4, patches.reshape(-1, 3, 14, 14), never)


def test_every_process_takes_the_turns_of_the_first(three, store):
    taken = [[], []]
    threads = [follow(process, turns) for process, turns in zip(three[1:], taken, strict=True)]
    request = Request(messages=[{"role": "user", "content": "a" * 5000}], max_tokens=7, stop=("x",))
    raw = Request(prompt=[3] * 5000, grammar="start: 'a'")
    given = [Turn((Command(3, request), Command(2), Command(4, raw)), (frames(0, 9),), warm=True)]
    given += [Turn(media=(frames(index, 5),) if index % 100 == 0 else ()) for index in range(1000)]
    most = 0
    for turn in [*given, Turn(close=True)]:
        assert three[0].exchange(lambda turn=turn: turn) is turn
        most = max(most, sum(map(len, store.values.values())))
    for thread, turns in zip(threads, taken, strict=True):
        thread.join(60)
        assert len(turns) == 1002
        submitted, cancelled, bound = turns[0].commands
        assert bound.request.grammar == raw.grammar and not bound.request.prompt
        assert submitted.job_id == 3 and cancelled == (2, None) and turns[0].warm
        assert (submitted.request.max_tokens, submitted.request.stop) == (7, ("x",))
        assert not submitted.request.messages
        for mine, theirs in zip(given, turns, strict=False):
            assert len(mine.media) == len(theirs.media)
            for ours, others in zip(mine.media, theirs.media, strict=True):
                assert isinstance(ours, Pixels)
                np.testing.assert_array_equal(ours.patches, others.patches)
                others.release()
    assert not store.values, "what was read is deleted"
    assert store.largest <= hosts._PART_BYTES + 64
    assert most <= 3 * hosts._WINDOW_BYTES


def test_a_failure_of_the_first_process_ends_the_others(three):
    taken = []
    thread = follow(three[1], taken)
    three[0].fail(ValueError("a device is broken"))
    thread.join(60)
    assert [turn.close for turn in taken] == [True]


def test_a_failure_elsewhere_ends_that_process(three, monkeypatch):
    crashed = []
    monkeypatch.setattr(hosts.distributed, "crash", crashed.append)
    error = ValueError("a device is broken")
    three[2].fail(error)
    assert crashed == [error]


def test_one_process_needs_no_store(monkeypatch):
    monkeypatch.setattr(hosts.distributed, "store", never)
    alone = Hosts(cast(Any, SimpleNamespace(sharding=lambda: None)))
    turn = Turn(close=True)
    assert alone.is_main and alone.exchange(lambda: turn) is turn
    alone.fail(ValueError())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hosts")
    write_inputs(directory)
    return directory


def ask(files, port, count, number, *more):
    sharding = SHARDING if count > 1 else "-"
    return begin("-m", "tests.keye_jax.engine.asked", files, sharding, port, count, number, *more)


@pytest.fixture(scope="module")
def alone(files):
    """What one process answers."""
    code, out, err = finish(ask(files, 0, 1, 0))
    assert code == 0, err
    return json.loads(out)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_two_processes_answer_as_one_and_name_the_one_that_is_killed(files, alone, victim):
    port = free_port()
    workers = [ask(files, port, 2, number, "on") for number in range(2)]
    try:
        found = json.loads(told(workers[0], "{"))
        answered = {name: answer for name, answer in alone.items() if isinstance(answer, list)}
        assert answered.keys() == {"text", "long", "picture", "video", "raw"}
        for name, (tokens, leads) in answered.items():
            assert_leads(np.asarray(leads), 1e-3)
            assert found[name][0] == tokens
        rest = {name: answer for name, answer in found.items() if name not in answered}
        refused = {"missing": "media", "broken": "media", "too large": "too_large"}
        assert rest == {"bound": "a ball", "stopped": "cancelled", **refused}
        assert rest == {name: answer for name, answer in alone.items() if name not in answered}
        workers[victim].send_signal(signal.SIGKILL)
        code, _, err = finish(workers[1 - victim], seconds=60)
        assert code == 1 and f"keye-jax: process {victim} ({socket.gethostname()}) is lost" in err, err
    finally:
        for worker in workers:
            worker.kill()
