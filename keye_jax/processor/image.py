"""Images: their size for the model, opening and decoding them, and cutting them into patches."""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from keye_jax.errors import UserError

MAX_ASPECT_RATIO = 200
# Pillow's own limit against decompression bombs.
MAX_SOURCE_PIXELS = 178_956_970
# Formats that run another program or read another file are left out (EPS runs Ghostscript).
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "TGA")
_ORIENTATION_TAG = 0x0112


def smart_resize(height: int, width: int, *, factor: int = 28, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size at which the model sees an image: multiples of `factor`, within the pixel limits where possible.

    Each side is rounded to the nearest multiple of `factor`, ties to even, and is at least `factor`. If the area is
    then out of bounds, the original sides are scaled by the square root of limit / area, and rounded down if the area
    was too large or up if it was too small. This is the publisher's formula, the one of Qwen2-VL.

    Args:
      height, width: the image's size in pixels.
      factor: side of one token in pixels.
      min_pixels, max_pixels: limits on the area in pixels.

    Returns:
      (height, width) in pixels.

    Raises:
      UserError: a side is not positive, the aspect ratio is above 200, or min_pixels is above max_pixels.
    """
    if height <= 0 or width <= 0:
        raise UserError(f"the image is {height}x{width} (height x width); both must be positive")
    if min_pixels > max_pixels:
        raise UserError(f"min_pixels is {min_pixels}; it must be at most max_pixels {max_pixels}")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise UserError(
            f"the image is {height}x{width} (height x width); its aspect ratio must be at most {MAX_ASPECT_RATIO}"
        )
    new_height = max(factor, round(height / factor) * factor)
    new_width = max(factor, round(width / factor) * factor)
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def open_image(source: Any, field: str) -> Image.Image:
    """Opens an image and reads its header, but not its pixels.

    Args:
      source: a path, the content of a file, a PIL image, or an array uint8 [H, W, 3].
      field: the name of the image in error messages.

    Raises:
      UserError: the source is not an image, is damaged, or has more than `MAX_SOURCE_PIXELS` pixels.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            raise UserError(f"{field} is an array {source.dtype}{list(source.shape)}; it must be uint8 [H, W, 3]")
        return Image.fromarray(source)
    if isinstance(source, Image.Image):
        return source
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats)
    except Image.DecompressionBombError as error:
        raise UserError(f"{field} is too large an image; it must have at most {MAX_SOURCE_PIXELS} pixels") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{field} is not an image in a known format ({_name(source)})") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{field} cannot be read as an image ({_name(source)}): {error}") from error
    if image.width * image.height > MAX_SOURCE_PIXELS:
        size = f"{image.width}x{image.height}"
        raise UserError(f"{field} is {size}; an image must have at most {MAX_SOURCE_PIXELS} pixels")
    return image


def _name(source: Any) -> str:
    return f"{len(source)} bytes" if isinstance(source, bytes) else str(source) if isinstance(source, Path) else "data"


def upright_size(image: Image.Image, field: str) -> tuple[int, int]:
    """(height, width) in pixels of an image turned upright by its EXIF orientation.

    Raises:
      UserError: the file is damaged.
    """
    try:
        turned = image.getexif().get(_ORIENTATION_TAG) in (5, 6, 7, 8)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{field} is a damaged image: {error}") from error
    return (image.width, image.height) if turned else (image.height, image.width)


def to_rgb(image: Image.Image, field: str) -> Image.Image:
    """Decodes an image to upright 8-bit RGB.

    EXIF orientation is applied, transparency is laid over white, and 16-bit values are scaled to 8 bits.

    Raises:
      UserError: the file is damaged.
    """
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16") or image.mode == "I":
            values = np.clip(np.asarray(image).astype(np.float64), 0, 65535)
            image = Image.fromarray((values / 257).round().astype(np.uint8))
        elif image.mode == "F":
            image = Image.fromarray(np.clip(np.nan_to_num(np.asarray(image)), 0, 255).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{field} is a damaged image: {error}") from error


def patchify(pixels: np.ndarray, patch_size: int) -> np.ndarray:
    """Cuts an image into patches, row by row of the patch grid.

    Args:
      pixels: [H, W, 3] of any dtype; H and W are multiples of `patch_size`.
      patch_size: side of one patch in pixels, p.

    Returns:
      [H/p * W/p, 3, p, p] in the dtype of `pixels`.
    """
    height, width, channels = pixels.shape
    rows, cols = height // patch_size, width // patch_size
    grid = pixels.reshape(rows, patch_size, cols, patch_size, channels)
    return grid.transpose(0, 2, 4, 1, 3).reshape(rows * cols, channels, patch_size, patch_size)
