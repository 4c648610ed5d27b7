"""`data:` URLs, read as browsers read them, and base64 without a URL around it."""

from __future__ import annotations

import base64
import binascii
import re
import urllib.parse

from keye_jax.errors import UserError, shorten

_URL_SAFE = bytes.maketrans(b"-_", b"+/")
# What the files of the known kinds begin with.
_MAGIC = re.compile(
    rb"\x89PNG\r\n|\xff\xd8\xff|GIF8|RIFF.{4}(?:WEBP|AVI )|II\*\0|MM\0\*|BM.{4}\0{4}|.{4}(?:jP  |ftyp|moov|mdat)|"
    rb"\x1aE\xdf\xa3|OggS|FLV\x01|\0\0\x01\xba|G.{187}G|0&\xb2u",
    re.DOTALL,
)
_HEAD_CHARACTERS = 256
# Characters. A shorter text is a path, whatever it spells.
_SHORTEST = 40


def is_data_url(text: str) -> bool:
    return text[:_HEAD_CHARACTERS].lstrip()[:5].lower() == "data:"


def read_data_url(url: str, field: str) -> bytes:
    """The content of a `data:` URL.

    White space and a missing padding are allowed in base64, and so is its URL-safe alphabet.

    Raises:
      UserError: the URL has no comma, its base64 is not valid, or it holds nothing.
    """
    header, comma, payload = url.strip().partition("#")[0].partition(",")
    if not comma:
        raise UserError(f"{field} is {shorten(url)}; a data: URL must be data:<type>;base64,<data>")
    data = urllib.parse.unquote_to_bytes(payload.encode(errors="replace"))
    if re.search(r";\s*base64\s*(?:;|$)", header, re.IGNORECASE):
        try:
            data = _decode(data)
        except binascii.Error as error:
            raise UserError(f"{field} is {shorten(url)}; its data must be valid base64 ({error})") from error
    if not data:
        raise UserError(f"{field} is {shorten(url)}; a data: URL must hold some data")
    return data


def split_frames(url: str) -> list[str] | None:
    """The frames of a video `data:video/jpeg;base64,f1,f2,...` as `data:` URLs; None if `url` is something else."""
    header, comma, payload = url.partition(",")
    if not comma or not re.fullmatch(r"\s*data:\s*video/jpe?g\s*(?:;[^,]*)?;\s*base64\s*", header, re.IGNORECASE):
        return None
    return [f"data:image/jpeg;base64,{frame}" for frame in payload.split(",")]


def read_bare_base64(text: str) -> bytes | None:
    """The content of a base64 text that begins like a known kind of image or video; None if it is something else."""
    head = "".join(text[:_HEAD_CHARACTERS].split())
    if len(head) < _SHORTEST or not head.isascii():
        return None
    try:
        if not _MAGIC.match(_decode(head[: len(head) // 4 * 4].encode())):
            return None
        return _decode(text.encode(errors="replace"))
    except binascii.Error:
        return None


def _decode(data: bytes) -> bytes:
    """Decodes base64. Raises binascii.Error if it is not valid."""
    data = b"".join(data.split()).translate(_URL_SAFE)
    if len(data) % 4 != 1:
        data += b"=" * (-len(data) % 4)
    return base64.b64decode(data, validate=True)
