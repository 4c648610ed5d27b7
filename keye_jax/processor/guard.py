"""What requests of strangers may name, and how large it may be: files below one folder, public addresses, limits."""

from __future__ import annotations

import dataclasses
import ipaddress
import socket
from pathlib import Path

from keye_jax.errors import UserError, shorten

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")


@dataclasses.dataclass(frozen=True)
class MediaGuard:
    """Limits on the media of requests. Sources that are `Path` objects come from the program, and may lie anywhere.

    Attributes:
      root: the folder whose files may be named by a path or a file: URL; None for none.
      max_bytes: of a medium as it is stored or sent.
      max_pixels: of an image, or of a frame of a video, as it is stored.
      max_seconds: of a video.

    Raises:
      UserError: the root is not a folder.
    """

    root: Path | None = None
    max_bytes: int = 8 << 30
    max_pixels: int = 100_000_000
    max_seconds: float = 6 * 3600.0

    def __post_init__(self) -> None:
        if self.root is not None and not self.root.is_dir():
            raise UserError(f"--media-root is {str(self.root)!r}; it must be a folder")

    def file(self, path: Path, field: str) -> Path:
        """Where a file is that a request names by `path`, which begins at the root if it is relative.

        Raises:
          UserError: it does not lie below the root, which links are followed to find out.
        """
        refusal = f"{field} is {shorten(str(path))}"
        if self.root is None:
            raise UserError(f"{refusal}; local files may not be read here, only data: URLs and uploaded files")
        root = self.root.resolve()
        try:
            found = (root / path).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{refusal}; it must be the path of a file") from error
        if not found.is_relative_to(root):
            raise UserError(f"{refusal}; it must lie below the folder of --media-root")
        return found

    def check_bytes(self, size: int, field: str) -> None:
        """Raises UserError if a medium has more bytes than are allowed."""
        if size > self.max_bytes:
            raise UserError(f"{field} has {size:,} bytes; it must have at most {self.max_bytes:,}")

    def check_pixels(self, width: int, height: int, field: str) -> None:
        """Raises UserError if a picture or frame, as it is stored, is larger than allowed."""
        if width * height > self.max_pixels:
            raise UserError(f"{field} has {width}x{height} pixels; it must have at most {self.max_pixels:,}")

    def check_seconds(self, seconds: float, field: str) -> None:
        """Raises UserError if a video is longer than allowed."""
        if seconds > self.max_seconds:
            raise UserError(f"{field} has {seconds:,.0f} seconds; it must have at most {self.max_seconds:,.0f}")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, and does not stand for one that is not.

    IPv6 addresses that hold an IPv4 address (mapped, 6to4 and NAT64) are judged by it.
    """
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        held = found.ipv4_mapped or found.sixtofour
        if found in _NAT64:
            held = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if held is None:
            # Whatever lies outside is unassigned, or of an old way to hold IPv4 addresses.
            return found in _GLOBAL_UNICAST and found.is_global
        found = held
    return found.is_global and not found.is_multicast and not found.is_reserved


def connect_public(name: str, address: tuple[str, int], timeout: float | None) -> socket.socket:
    """Connects as `socket.create_connection` does, but to a public address only.

    A name is looked up once, and the address that was checked is the one that is connected to.

    Args:
      name: the medium in error messages.

    Raises:
      UserError: an address of the host is not public.
      OSError: there is no connection.
    """
    host, port = address
    # A spelling such as 0x7f.1 or 2130706433 is an address to some systems. What it is shows here.
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if not all(is_public(str(target[0])) for *_, target in found):
        raise UserError(f"{name}; its host must have public addresses only")
    failure: OSError = OSError("its host has no address")
    for family, kind, protocol, _, target in found:
        connected = socket.socket(family, kind, protocol)
        try:
            connected.settimeout(timeout)
            connected.connect(target)
            return connected
        except OSError as error:
            connected.close()
            failure = error
    raise failure
