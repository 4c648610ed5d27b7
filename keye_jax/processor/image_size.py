"""The size at which the model sees an image, the publisher's formula, and what it can come to."""

import math

from keye_jax.errors import UserError

MAX_ASPECT_RATIO = 200


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


def largest_area(*, factor: int = 28, min_pixels: int, max_pixels: int) -> int:
    """Pixels that no size of `smart_resize` exceeds. They may be above `max_pixels`, since sides are rounded up.

    Args:
      factor, min_pixels, max_pixels: as for `smart_resize`.
    """
    # The most extreme image that is too large: its short side becomes `factor`, whatever the area.
    largest = max(max_pixels, factor * math.floor(math.sqrt(max_pixels * MAX_ASPECT_RATIO)))
    # Images that are too small. A short side rounded up to `short` was above `least`, which bounds the long side.
    for short in range(factor, math.ceil(math.sqrt(min_pixels)) + factor, factor):
        least = max(short - factor, math.sqrt(min_pixels / MAX_ASPECT_RATIO))
        largest = max(largest, short * math.ceil(min_pixels / least / factor) * factor)
    return largest
