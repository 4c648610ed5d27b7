"""Clients of `keye_jax.bench.serve`, in a process of their own: they must not share the server's interpreter.

The program reads an object with `port`, `path` and `bodies`, and writes what `stream_all` returns; both are JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any


def stream_all(port: int, path: str, bodies: Sequence[Mapping[str, Any]]) -> list[tuple[float, list[float]]]:
    """Sends all bodies at once, each over a connection of its own, and reads the streams.

    Returns:
      for each when it was sent and when its pieces of text came: seconds of one clock.

    Raises:
      RuntimeError: a request was refused.
    """

    async def run() -> list[tuple[float, list[float]]]:
        return await asyncio.gather(*(_stream(port, path, body) for body in bodies))

    return asyncio.run(run())


async def _stream(port: int, path: str, body: Mapping[str, Any]) -> tuple[float, list[float]]:
    content = json.dumps({**body, "stream": True}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    begun, times = time.perf_counter(), []
    writer.write(head.encode() + content)
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"{status.decode().strip()}: {(await reader.read()).decode()}")
    async for line in reader:
        now = time.perf_counter()
        if line.startswith(b"data: {") and json.loads(line.removeprefix(b"data: "))["choices"][0]["text"]:
            times.append(now)
    writer.close()
    return begun, times


if __name__ == "__main__":
    json.dump(stream_all(**json.load(sys.stdin)), sys.stdout)
