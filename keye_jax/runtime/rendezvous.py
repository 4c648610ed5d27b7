"""The processes of a job find each other before JAX starts: who is missing, and what does not fit, is said in one line.

Process 0 listens at the coordinator's address for as long as it takes, and then leaves it to JAX. Every process,
process 0 too, connects to it, says which one it is, and reads lines of JSON until one of them is the last:

  in   {"keye-jax": 1, "process": 2, "processes": 4, "host": "node7"}
  out  {"missing": [1, 3]}         now and then
       {"go": true}                all are there
       {"error": "..."}            they will not be
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import sys
import time
from typing import Any

from keye_jax.errors import UserError, shorten

_RETRY_S = 0.3
# When waiting is shown first, and then how often.
_FIRST_S, _AGAIN_S = 3.0, 15.0
# What process 0 says at the end of its patience arrives a little later.
_SLACK_S = 5.0


def meet(coordinator: str, processes: int, process_id: int, timeout: float) -> None:
    """Waits until all processes are there. Shows on stderr who is waited for.

    Args:
      coordinator: "HOST:PORT" of process 0.
      timeout: seconds.

    Raises:
      UserError: some are missing after that time, two have one number, or the address is not that of process 0.
    """
    end = time.monotonic() + timeout
    server = _Server(coordinator, processes, timeout) if process_id == 0 else None
    try:
        with _connect(coordinator, end, server, process_id, timeout) as connection:
            hello = {"keye-jax": 1, "process": process_id, "processes": processes, "host": socket.gethostname()}
            connection.sendall(json.dumps(hello).encode() + b"\n")
            _wait(connection, server, coordinator, processes, process_id, end)
    finally:
        if server is not None:
            server.close()


def _connect(coordinator: str, end: float, server: _Server | None, process_id: int, timeout: float) -> socket.socket:
    host, _, port = coordinator.rpartition(":")
    why, shown = "", time.monotonic() + _FIRST_S
    while True:
        left = end - time.monotonic()
        try:
            connection = socket.create_connection((host.strip("[]"), int(port)), max(0.1, min(5.0, left)))
            # A connection from a port to itself is no one else's: Linux makes them when no one listens.
            if connection.getsockname() != connection.getpeername():
                return connection
            connection.close()
        except OSError as error:
            why = error.strerror or str(error)
        if left <= 0:
            if server is not None:
                server.serve(0)
            who = "process 0 cannot reach itself" if process_id == 0 else f"process {process_id} cannot reach process 0"
            raise UserError(f"{who} at {coordinator} within {timeout:g} s, which --startup-timeout allows ({why})")
        if time.monotonic() > shown:
            _say(f"process {process_id} waits for process 0 at {coordinator}")
            shown = time.monotonic() + _AGAIN_S
        if server is not None:
            server.serve(_RETRY_S)
        else:
            time.sleep(_RETRY_S)


def _wait(
    connection: socket.socket, server: _Server | None, coordinator: str, processes: int, process_id: int, end: float
) -> None:
    lost = UserError(f"process {process_id} has lost process 0 at {coordinator} while the others were waited for")
    received, shown = b"", time.monotonic() + _FIRST_S
    connection.setblocking(False)
    while True:
        if server is not None:
            server.serve(_RETRY_S)
        if select.select([connection], [], [], 0 if server is not None else _RETRY_S)[0]:
            try:
                piece = connection.recv(65536)
            except OSError as error:
                raise lost from error
            if not piece:
                raise lost
            received += piece
        elif time.monotonic() > end + _SLACK_S:
            raise lost
        *lines, received = received.split(b"\n")
        for line in lines:
            try:
                message = json.loads(line)
                missing = message.get("missing", [])
            except (ValueError, AttributeError, RecursionError) as error:
                raise UserError(f"what answers at {coordinator} is not process 0 of keye-jax") from error
            if message.get("go"):
                return
            if "error" in message:
                raise UserError(str(message["error"]))
            if missing and time.monotonic() > shown:
                _say(f"process {process_id} waits for {_names(missing)} of {processes}")
                shown = time.monotonic() + _AGAIN_S


class _Server:
    """Process 0's part. It is served between the steps of that process's own waiting.

    Raises:
      UserError: the port is not free.
    """

    def __init__(self, coordinator: str, processes: int, timeout: float):
        self._address, self._processes, self._timeout = coordinator, processes, timeout
        self._end, self._told = time.monotonic() + timeout, time.monotonic()
        self._hosts: dict[int, str] = {}
        self._numbers: dict[socket.socket, int] = {}
        self._connections: dict[socket.socket, bytes] = {}
        port = int(coordinator.rpartition(":")[2])
        try:
            self._listening = _listen(port)
        except OSError as error:
            raise UserError(
                f"process 0 cannot listen on port {port} of {coordinator} ({os.strerror(error.errno or 0)}): another "
                "program or another process 0 of this host may have it"
            ) from error
        self._listening.setblocking(False)
        self._over = False

    def serve(self, seconds: float) -> None:
        """Does what there is to do, and waits for it so long."""
        ready, _, _ = select.select([self._listening, *self._connections], [], [], seconds)
        for each in ready:
            if each is not self._listening:
                self._read(each)
                continue
            with contextlib.suppress(OSError):
                connection, _ = self._listening.accept()
                connection.setblocking(False)
                self._connections[connection] = b""
        missing = [number for number in range(self._processes) if number not in self._hosts]
        if self._over:
            return
        if not missing:
            self._tell({"go": True})
            self._over = True
        elif time.monotonic() > self._end:
            self._fail(
                f"{_names(missing)} of {self._processes} {'has' if len(missing) == 1 else 'have'} not arrived at "
                f"{self._address} within {self._timeout:g} s, which --startup-timeout allows"
            )
        elif time.monotonic() > self._told + 1:
            self._tell({"missing": missing})
            self._told = time.monotonic()

    def close(self) -> None:
        """Ends when the others have hung up, so that the port is free for JAX."""
        self._listening.close()
        until = time.monotonic() + 2
        while self._connections and (left := until - time.monotonic()) > 0:
            for each in select.select(list(self._connections), [], [], left)[0]:
                self._read(each)
        for each in self._connections:
            each.close()

    def _read(self, connection: socket.socket) -> None:
        try:
            piece = connection.recv(4096)
        except OSError:
            piece = b""
        received = self._connections[connection] + piece
        if not piece or len(received) > 4096:  # it hung up, or is not one of ours
            connection.close()
            del self._connections[connection]
            if connection in self._numbers and not self._over:
                del self._hosts[self._numbers.pop(connection)]
            return
        self._connections[connection] = received
        if received.endswith(b"\n") and not self._over:
            # Not of ours: whatever a scanner of ports sends.
            with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
                self._arrive(connection, json.loads(received))

    def _arrive(self, connection: socket.socket, hello: dict[str, Any]) -> None:
        if hello["keye-jax"] != 1:
            return
        number, processes, host = int(hello["process"]), int(hello["processes"]), str(hello["host"])
        if processes != self._processes:
            here = socket.gethostname()
            self._fail(
                f"process {number} ({_host(host)}) is of {processes} processes, and process 0 ({here}) of "
                f"{self._processes}; the number must be the same for all"
            )
        elif number in self._hosts:
            self._fail(
                f"two processes have process id {number} ({self._hosts[number]} and {_host(host)}); each needs "
                f"its own, from 0 to {self._processes - 1}"
            )
        else:
            self._hosts[number], self._numbers[connection] = _host(host), number

    def _fail(self, message: str) -> None:
        self._tell({"error": message})
        self._over = True

    def _tell(self, message: dict[str, Any]) -> None:
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(message).encode() + b"\n")


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=1024)


def _host(host: str) -> str:
    """A host's name as another process gives it, for a message."""
    return shorten(host)[1:-1]


def _names(numbers: list[int]) -> str:
    """The numbers of processes in words; of many, the first."""
    first, rest = numbers[:8], len(numbers) - 8
    names = [str(number) for number in first] + ([f"{rest} more"] if rest > 0 else [])
    return f"process{'es' * (len(names) > 1)} " + " and ".join(
        [", ".join(names[:-1]), names[-1]] if len(names) > 1 else names
    )


def _say(text: str) -> None:
    print(f"keye-jax: {text}", file=sys.stderr, flush=True)
