"""What a server allows, and how long it waits."""

from __future__ import annotations

import dataclasses
import ipaddress
from pathlib import Path

from keye_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """What a server allows, and how long it waits.

    Attributes:
      host, port: where it listens; port 0 takes a free one.
      api_key: what clients have to send as a bearer token; None if any is accepted.
      cors_origins: origins of pages that browsers may let use the server, such as "https://example.org"; "*" is all.
      max_queue: answers that wait beyond those that are written at once.
      max_connections: connections that are open at once.
      max_body_bytes: of a request, uploads excepted.
      max_file_bytes: of an uploaded file.
      max_stored_bytes: of all uploaded files.
      max_tokens: most tokens of an answer; None for what the model's positions allow.
      heartbeat_s: seconds of silence after which a stream gets a comment.
      stall_s: seconds that a client may take to send its next bytes, or to read what waits for it.
      grace_s: seconds that running answers may take after SIGTERM.
      watchdog_s: seconds without a step, while there is work, after which the server is not healthy.
      log_prompts: whether the log has the bodies of requests.
      state_dir: where files and batches are kept between runs; None for a folder that goes with the server.
      profile_dir: where traces are written; None if none may be asked for.

    Raises:
      UserError: a value is not allowed, or the server would be open to the network without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: bytes | None = None
    cors_origins: tuple[str, ...] = ()
    max_queue: int = 256
    max_connections: int = 1024
    max_body_bytes: int = 64 << 20
    max_file_bytes: int = 8 << 30
    max_stored_bytes: int = 64 << 30
    max_tokens: int | None = None
    heartbeat_s: float = 15.0
    stall_s: float = 30.0
    grace_s: float = 60.0
    watchdog_s: float = 300.0
    log_prompts: bool = False
    state_dir: Path | None = None
    profile_dir: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise UserError(f"--port is {self.port}; it must be from 0 to 65535")
        least = {"max_queue": 0, "max_connections": 1, "max_body_bytes": 1, "max_file_bytes": 1, "max_stored_bytes": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                option = name.removesuffix("_bytes").replace("_", "-")
                raise UserError(f"--{option} is {getattr(self, name)}; it must be at least {value}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"--max-tokens is {self.max_tokens}; it must be at least 1")
        for name in ("heartbeat_s", "stall_s", "watchdog_s"):
            if not getattr(self, name) > 0:
                option = name.removesuffix("_s")
                raise UserError(f"--{option} is {getattr(self, name)}; it must be above 0")
        if not self.grace_s >= 0:
            raise UserError(f"--grace is {self.grace_s}; it must be at least 0")
        if self.api_key is None and not self.is_loopback:
            raise UserError(
                f"--host is {self.host!r}, which others can reach; it must be 127.0.0.1 unless an API key is given "
                "with --api-key-file or KEYE_JAX_API_KEY"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
