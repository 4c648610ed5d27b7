"""Processes that make calls for training."""

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from keye_jax.train.workers import Crashed, Workers


def said(begun: str, text: str) -> str:
    return begun + text


def refuse(begun: str, text: str) -> None:
    raise KeyError(text)


def end(begun: str) -> None:
    os._exit(9)


def wait_for(begun: str, path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


def end_while_sending(begun: str, once: Path, result: bytes) -> bytes:
    """Of the first process, half of the result is sent."""

    def send_half(self, content):
        os.write(self.fileno(), content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    if not once.exists():
        once.touch()
        connection: Any = Connection
        connection._send = send_half
    return result


@pytest.fixture
def workers():
    workers = Workers(1, str, "heard: ")
    yield workers
    workers.close()
    assert not multiprocessing.active_children()


def test_a_call_returns_or_raises_and_costs_no_other_its_process(workers):
    returns, raises = workers.submit(said, "one"), workers.submit(refuse, "two")
    ends, cannot_travel = workers.submit(end), workers.submit(said, threading.Lock())
    follows = workers.submit(said, "five")
    assert returns.result() == "heard: one"
    with pytest.raises(KeyError, match="two") as raised:
        raises.result()
    assert "in refuse" in raised.value.__notes__[0]
    with pytest.raises(Crashed):
        ends.result()
    with pytest.raises(TypeError, match="cannot pickle"):
        cannot_travel.result()
    assert follows.result() == "heard: five"


def test_a_process_that_ends_while_it_sends_does_not_keep_this_one_waiting(workers, tmp_path):
    result = os.urandom(100_000)
    assert workers.submit(end_while_sending, tmp_path / "once", result).result(60) == result


def test_close_ends_what_has_begun_and_cancels_the_rest(workers, tmp_path):
    begun, waits = workers.submit(wait_for, tmp_path / "go"), workers.submit(said, "late")
    while not begun.running():
        time.sleep(0.01)
    closing = threading.Thread(target=workers.close)
    closing.start()
    while not waits.cancelled():
        time.sleep(0.01)
    assert closing.is_alive()
    (tmp_path / "go").touch()
    closing.join()
    assert begun.done() and begun.exception() is None
