"""From decoded frames to the pixels that a player shows: upright, square, progressive, opaque, 8-bit sRGB."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import numpy as np
from PIL import Image

from keye_jax.processor.hdr import is_hdr, to_sdr

# Of a pixel's width to its height. What a file says beyond is damage.
_LARGEST_RATIO = 16.0


@dataclasses.dataclass(frozen=True)
class Picture:
    """How the frames of a stream are shown.

    Attributes:
      size: (height, width) in pixels, upright and with square pixels.
      crop: pixels of a frame that are not shown: (top, bottom, left, right), before it is turned.
      orientation: (a, b, c, d), each -1, 0 or 1; a stored point (x, y) is shown at (a x + c y, b x + d y).
      interlaced: whether frames consist of two fields of different times.
    """

    size: tuple[int, int]
    crop: tuple[int, int, int, int] = (0, 0, 0, 0)
    orientation: tuple[int, int, int, int] = (1, 0, 0, 1)
    interlaced: bool = False

    @classmethod
    def of(cls, frame: Any, stream: Any) -> Picture:
        """That of a stream with the given first frame."""
        top, bottom, left, right = crop = _crop(frame, stream)
        height, width = frame.height - top - bottom, frame.width - left - right
        ratio = float(stream.sample_aspect_ratio or 1)
        if 1 / _LARGEST_RATIO <= ratio <= _LARGEST_RATIO:
            width = max(1, round(width * ratio))
        orientation = _orientation(frame)
        size = (height, width) if orientation[0] else (width, height)
        return cls(size, crop, orientation, bool(frame.interlaced_frame))

    def pixels(self, frame: Any, size: tuple[int, int]) -> np.ndarray:
        """A frame, uint8 [H, W, 3], at `size` (H, W)."""
        stored = size if self.orientation[0] else (size[1], size[0])
        if any(self.crop) or _has_alpha(frame):
            pixels = resized_pixels(_cropped(_opaque(frame), self.crop), stored)
        elif is_hdr(frame.color_trc):
            pixels = to_sdr(_scaled(frame, stored, "rgb48le"), frame.color_trc, frame.color_primaries)
        else:
            pixels = _scaled(frame, stored, "rgb24")
        return _turned(pixels, self.orientation)


def deinterlaced(av: Any, frames: list[Any]) -> Any:
    """The middle one of three frames with the lines of its second field made from those around them.

    Args:
      frames: one frame before, the frame itself, and one after it; None where there is none.
    """
    graph = av.filter.Graph()
    source, sink = graph.add_buffer(template=frames[1], time_base=frames[1].time_base), graph.add("buffersink")
    graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:deint=all"), sink).configure()
    given = [frame for frame in frames if frame is not None]
    place = 0 if frames[0] is None else 1
    for number, frame in enumerate(given):
        # The filter orders by time stamps. Those of the file may be missing or jump.
        stamp, frame.pts = frame.pts, number
        graph.vpush(frame)
        frame.pts = stamp
    graph.vpush(None)
    for _ in range(place):
        graph.vpull()
    return graph.vpull()


def _scaled(frame: Any, size: tuple[int, int], form: str) -> np.ndarray:
    """RGB of a frame at `size` (height, width), [H, W, 3]."""
    height, width = size
    return frame.to_ndarray(format=form, width=width, height=height, interpolation="BILINEAR")


def resized_pixels(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] at `size` (height, width)."""
    height, width = size
    if pixels.shape[:2] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def _opaque(frame: Any) -> np.ndarray:
    """A frame over white, uint8 [H, W, 3]."""
    if not _has_alpha(frame):
        return _scaled(frame, (frame.height, frame.width), "rgb24")
    pixels = frame.to_ndarray(format="rgba").astype(np.uint16)
    alpha = pixels[..., 3:]
    return ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _has_alpha(frame: Any) -> bool:
    return frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components)


def _cropped(pixels: np.ndarray, crop: tuple[int, int, int, int]) -> np.ndarray:
    top, bottom, left, right = crop
    return np.ascontiguousarray(pixels[top : len(pixels) - bottom, left : pixels.shape[1] - right])


def _crop(frame: Any, stream: Any) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) that the container cuts off."""
    data = stream.codec_context.coded_side_data.get("frame_cropping")
    if data is None or len(data) < 16:
        return (0, 0, 0, 0)
    top, bottom, left, right = struct.unpack("<4I", bytes(data)[:16])
    if top + bottom >= frame.height or left + right >= frame.width:
        return (0, 0, 0, 0)
    return (top, bottom, left, right)


def _orientation(frame: Any) -> tuple[int, int, int, int]:
    """The frame's display matrix, rounded to quarter turns; see `Picture`."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return (1, 0, 0, 1)
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    if max(abs(a), abs(d)) >= max(abs(b), abs(c)):
        return (-1 if a < 0 else 1, 0, 0, -1 if d < 0 else 1)
    return (0, -1 if b < 0 else 1, -1 if c < 0 else 1, 0)


def _turned(pixels: np.ndarray, orientation: tuple[int, int, int, int]) -> np.ndarray:
    """Rotates and mirrors pixels [H, W, 3] as the display matrix says."""
    a, b, c, d = orientation
    if not a:
        pixels = pixels.swapaxes(0, 1)
    return np.ascontiguousarray(pixels[:: b + d, :: a + c])
