"""Processes that find each other, or say in one line why not. Here they are threads."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

from keye_jax.errors import UserError
from keye_jax.runtime import rendezvous
from tests.keye_jax.processes import free_port


def meet(*numbers, processes, timeout=20.0, address=None):
    """What each of these processes is told; "" for those that may go on."""
    address = address or f"127.0.0.1:{free_port()}"

    def one(number):
        number, count = number if isinstance(number, tuple) else (number, processes)
        try:
            rendezvous.meet(address, count, number, timeout)
        except UserError as error:
            return str(error).replace(address, "ADDRESS")
        return ""

    with ThreadPoolExecutor(len(numbers)) as pool:
        return list(pool.map(one, numbers))


def test_all_go_on_when_all_are_there():
    assert meet(3, 1, 0, 2, processes=4) == [""] * 4


def test_those_that_do_not_arrive_are_named(capsys, monkeypatch):
    monkeypatch.setattr(rendezvous, "_FIRST_S", 0.1)
    expected = "processes 1 and 3 of 4 have not arrived at ADDRESS within 3 s, which --startup-timeout allows"
    assert meet(0, 2, processes=4, timeout=3) == [expected] * 2
    shown = capsys.readouterr().err
    assert all(f"keye-jax: process {number} waits for processes 1 and 3 of 4\n" in shown for number in (0, 2))


def test_a_coordinator_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(rendezvous, "_FIRST_S", 0.1)
    (message,) = meet(1, processes=2, timeout=1)
    assert message.startswith(
        "process 1 cannot reach process 0 at ADDRESS within 1 s, which --startup-timeout allows ("
    )
    assert "process 1 waits for process 0 at 127.0.0.1:" in capsys.readouterr().err
    (message,) = meet(1, processes=2, timeout=0.5, address="no.such.host.invalid:1")
    assert message.startswith("process 1 cannot reach process 0")


def test_a_number_twice():
    host = socket.gethostname()
    expected = f"two processes have process id 1 ({host} and {host}); each needs its own, from 0 to 2"
    assert meet(0, 1, 1, processes=3) == [expected] * 3


def test_another_number_of_processes():
    host = socket.gethostname()
    expected = f"process 1 ({host}) is of 3 processes, and process 0 ({host}) of 2; the number must be the same for all"
    assert meet((0, 2), (1, 3), processes=0) == [expected] * 2


def test_a_port_that_is_in_use():
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        (message,) = meet(0, processes=2, address=f"127.0.0.1:{port}")
    assert message.startswith(f"process 0 cannot listen on port {port} of ADDRESS (")


def test_what_is_no_process_of_the_job_is_no_matter():
    """A scan of ports, a process that ended before the others came, and one that came in its place."""
    port = free_port()

    def strangers():
        connection = None
        while connection is None:
            try:
                connection = socket.create_connection(("127.0.0.1", port))
            except OSError:
                time.sleep(0.05)
        with connection:
            connection.sendall(b"GET / HTTP/1.1\n")
        with socket.create_connection(("127.0.0.1", port)) as gone:
            gone.sendall(json.dumps({"keye-jax": 1, "process": 1, "processes": 3, "host": "gone"}).encode() + b"\n")
            while b'"missing": [2]' not in gone.recv(4096):
                pass
        return meet(1, 2, processes=3, address=f"127.0.0.1:{port}")

    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(strangers)
        assert meet(0, processes=3, address=f"127.0.0.1:{port}") == [""]
        assert told.result() == ["", ""]
