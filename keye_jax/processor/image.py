"""Images: opening and decoding them, and cutting them into patches."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageFile, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from keye_jax.errors import UserError

# What Pillow logs of a damaged file, it also raises. Without a handler, Python prints it on stderr.
logging.getLogger("PIL").addHandler(logging.NullHandler())

# Pillow's own limit against decompression bombs.
MAX_SOURCE_PIXELS = 178_956_970
MAX_SHOWN_PIXELS = 65536 * 784
"""Most pixels of one image or frame as the model sees it: 65,536 tokens, a quarter of the longest context."""
# Formats that run another program or read another file are left out (EPS runs Ghostscript). TGA has no signature, so it
# comes last. HEIF is there once pillow-heif is registered, and Pillow reads MPO as JPEG.
_FORMATS = (
    *("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM", "ICO", "ICNS", "PSD", "DDS"),
    *("QOI", "SGI", "DIB", "PCX", "TGA"),
)
_ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")
_ORIENTATION_TAG = 0x0112
_PHOTOMETRIC_TAG, _BITS_TAG, _SAMPLE_FORMAT_TAG = 262, 258, 339
# What turns an image upright, by its EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pixels that are converted at once, which bounds the memory beside the decoded image.
_STRIP_PIXELS = 1 << 21
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"heif"})
# Bytes that begin a video, with their offset.
_VIDEO_SIGNATURES = (
    *((0, b"\x1a\x45\xdf\xa3"), (8, b"AVI "), (0, b"OggS"), (0, b"FLV"), (4, b"ftyp"), (4, b"moov"), (4, b"mdat")),
    *((0, b"\0\0\1\xba"), (0, b"\0\0\1\xb3"), (0, b"\0\0\0\1"), (0, b"\x30\x26\xb2\x75")),
)


def open_image(source: Any, field: str) -> Image.Image:
    """Opens an image and reads its header, but not its pixels.

    Args:
      source: a path, the content of a file, a PIL image, or an array uint8 [H, W, 3].
      field: the name of the image in error messages.

    Raises:
      UserError: the source is not an image, is damaged, has more than `MAX_SOURCE_PIXELS` pixels, or is HEIC and
        pillow-heif is not installed.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            raise UserError(f"{field} is an array {source.dtype}{list(source.shape)}; it must be uint8 [H, W, 3]")
        return Image.fromarray(source)
    if isinstance(source, Image.Image):
        return source
    try:
        start = _start(source)
        if start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS:
            _register_heif(field)
        Image.init()
        formats = [name for name in _FORMATS if name in Image.OPEN]
        with _quiet():
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats)
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{field} is too large an image; it must have at most {MAX_SOURCE_PIXELS} pixels") from error
    except UnidentifiedImageError as error:
        if _begins_a_video(source):
            raise UserError(
                f"{field} is a video ({_name(source)}); give it with --video, or as a part of type video"
            ) from error
        raise UserError(f"{field} is not an image in a known format ({_name(source)})") from error
    except Exception as error:  # of a damaged file, Pillow's formats raise exceptions of any kind
        raise UserError(f"{field} cannot be read as an image ({_name(source)}): {_reason(error)}") from error
    if image.width * image.height > MAX_SOURCE_PIXELS:
        image.close()
        size = f"{image.width}x{image.height}"
        raise UserError(f"{field} is {size}; an image must have at most {MAX_SOURCE_PIXELS} pixels")
    return image


@contextlib.contextmanager
def opened_image(source: Any, field: str) -> Iterator[Image.Image]:
    """`open_image`, and closes what it opened. A PIL image of the caller stays open."""
    image = open_image(source, field)
    try:
        yield image
    finally:
        if image is not source:
            image.close()


def is_animation(source: Path | bytes) -> bool:
    """Whether a file is an animated GIF, WebP, PNG or AVIF."""
    try:
        Image.init()
        formats = [name for name in _ANIMATED if name in Image.OPEN]
        with (
            _quiet(),
            Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as image,
        ):
            return bool(getattr(image, "is_animated", False))
    except Exception:  # whatever is wrong with the file, its reader will say
        return False


def is_image(source: Path | bytes) -> bool:
    """Whether a file is an image that does not move."""
    try:
        with opened_image(source, ""):
            return not is_animation(source)
    except UserError:
        return False


def image_notes(image: Image.Image, field: str) -> tuple[str, ...]:
    """Sentences about what an image holds beside the picture that is shown."""
    try:
        with _quiet():
            several = image.format in (*_ANIMATED, "TIFF") and bool(getattr(image, "is_animated", False))
    except Exception:  # a damaged second picture is as good as none
        return ()
    if not several:
        return ()
    if image.format == "TIFF":
        return (f"{field} has several pages; only the first is shown",)
    return (f"{field} is an animation; only its first frame is shown, and --video (a part of type video) shows all",)


def _start(source: Path | bytes) -> bytes:
    """The first bytes of a file."""
    if isinstance(source, bytes):
        return source[:192]
    with Path(source).open("rb") as file:
        return file.read(192)


def _begins_a_video(source: Path | bytes) -> bool:
    start = _start(source)
    transport_stream = start[:1] == start[188:189] == b"G"
    return transport_stream or any(start[offset:].startswith(text) for offset, text in _VIDEO_SIGNATURES)


def _register_heif(field: str) -> None:
    try:
        import pillow_heif
    except ImportError as error:
        raise UserError(f"{field} is a HEIC image, which needs pillow-heif: pip install 'keye-jax[heic]'") from error
    pillow_heif.register_heif_opener()


def _name(source: Any) -> str:
    return f"{len(source)} bytes" if isinstance(source, bytes) else str(source) if isinstance(source, Path) else "data"


def _reason(error: Exception) -> str:
    """The text of an exception in one short line."""
    return " ".join(str(error).split())[:160] or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's warnings, which would go to stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _decoding(field: str) -> Iterator[None]:
    """Turns whatever Pillow raises of a damaged file into a UserError."""
    try:
        with _quiet():
            yield
    except UserError:
        raise
    except Exception as error:  # of a damaged file, Pillow's formats raise exceptions of any kind
        raise UserError(f"{field} is a damaged image: {_reason(error)}") from error


def upright_size(image: Image.Image, field: str) -> tuple[int, int]:
    """(height, width) in pixels of an image turned upright by its EXIF orientation.

    Raises:
      UserError: the file is damaged.
    """
    with _decoding(field):
        # Pillow gives the size of a TIFF as that of the upright picture.
        tiff = isinstance(image, TiffImagePlugin.TiffImageFile) and _ORIENTATION_TAG in image.tag_v2
        turned = not tiff and _orientation(image) >= 5
    return (image.width, image.height) if turned else (image.height, image.width)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 if there is none."""
    try:
        if isinstance(image, PngImagePlugin.PngImageFile):
            # To look for EXIF behind the pixels, Pillow would decode them.
            if image.tile and image.fp is not None and image.tell() == 0 and "exif" not in image.info:
                image.info |= _late_exif(image.fp)
            exif = Image.Image.getexif(image)
        else:
            exif = image.getexif()
        value = exif.get(_ORIENTATION_TAG)
        return value if value in _TURNS else 1
    except Exception:  # damaged EXIF is no reason to refuse the picture
        return 1


def _late_exif(file: Any) -> dict[str, bytes]:
    """{"exif": data} of the chunk eXIf of a PNG, if there is one."""
    position = file.tell()
    try:
        file.seek(8)
        while len(header := file.read(8)) == 8:
            length = int.from_bytes(header[:4])
            if header[4:] == b"eXIf":
                return {"exif": b"Exif\0\0" + file.read(length)}
            file.seek(length + 4, 1)
    finally:
        file.seek(position)
    return {}


def to_rgb(image: Image.Image, field: str, warn: Callable[[str], None] | None = None) -> Image.Image:
    """Decodes an image to upright 8-bit RGB.

    EXIF orientation is applied and transparency is laid over white. Colours become sRGB by the ICC profile. 16-bit
    integers are divided by 257. The range of other integers and of floats tells their scale; see `_Levels`.

    Args:
      image: an opened image. It may be the result itself, if it is RGB already.
      field: the name of the image in error messages.
      warn: takes a sentence if the file is cut off or damaged. What can be decoded is then shown, and the rest is
        white. Without it such a file is refused.

    Raises:
      UserError: the file is damaged.
    """
    with _decoding(field):
        # Pillow turns a TIFF itself when it decodes it.
        turn = 1 if isinstance(image, TiffImagePlugin.TiffImageFile) else _orientation(image)
        levels = _Levels(image)
        _scale_transparent_colour(image)
        rows = _load(image, field, warn)
        levels.measure(image)
        transform = _srgb_transform(image)
        plain = image.mode == "RGB" and transform is None and "transparency" not in image.info
        result = image if plain else _convert(image, levels, transform)
        if rows < image.height:
            result = result.copy()
            result.paste("white", (0, rows, image.width, image.height))
        return result.transpose(_TURNS[turn]) if turn in _TURNS else result


def _load(image: Image.Image, field: str, warn: Callable[[str], None] | None) -> int:
    """Decodes an image; returns how many rows there are, which is fewer than its height in a file that is cut off."""
    try:
        image.load()
    except Exception:
        # A TIFF that is not decoded to its end is not turned either.
        if warn is None or not isinstance(image, ImageFile.ImageFile) or image.format == "TIFF":
            raise
        image.tile = []
        try:
            image.load()
            filled = np.flatnonzero(np.asarray(image).reshape(image.height, -1).any(1))
        except Exception:
            filled = np.zeros(0, int)
        if not len(filled):
            raise
        rows = int(filled[-1]) + 1
        missing = math.ceil(100 * (1 - rows / image.height))
        what = f"the lower {missing}% of it are missing and shown white" if missing else "a part of it may be missing"
        warn(f"{field} is cut off or damaged; {what}")
        return rows
    return image.height


def _scale_transparent_colour(image: Image.Image) -> None:
    """Pillow gives the transparent colour of a PNG in the bits of the file; this makes it 8 bits, as the pixels are."""
    colour = image.info.get("transparency")
    if colour is None or not isinstance(image, PngImagePlugin.PngImageFile) or not image.tile:
        return
    bits = image.tile[0][3]
    if bits in ("L;2", "L;4"):
        image.info["transparency"] = colour * (85 if bits == "L;2" else 17)
    elif bits == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in colour)


class _Levels:
    """How the values of an image of 16-bit or 32-bit integers or of floats become 0 to 255.

    | values | white is |
    |---|---|
    | 16-bit integers | 65,535; 4,095 in a TIFF of 12 bits |
    | signed 16-bit integers of a TIFF | 32,767 |
    | other integers: at most 255, at most 65,535, larger | 255, 65,535, the largest value of the type |
    | floats: at most 1, or at most 16 and not all whole | 1 |
    | other floats: at most 255, at most 65,535, larger | 255, 65,535, the largest value in the image |

    Smaller values than 0 and NaN are black. A TIFF whose zero is white is inverted.

    Args:
      image: opened; the tags of a TIFF are gone once it is decoded.
    """

    def __init__(self, image: Image.Image):
        tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
        bits, kinds = tags.get(_BITS_TAG, (0,)), tags.get(_SAMPLE_FORMAT_TAG, (1,))
        self._bits = bits[0] if isinstance(bits, tuple) else bits
        self._kind = kinds[0] if isinstance(kinds, tuple) else kinds
        self._tiff = bool(tags)
        self._inverted = tags.get(_PHOTOMETRIC_TAG) == 0
        self._grey16 = image.format == "PPM" and image.mode == "I"
        self._unsigned32 = self._tiff and self._bits == 32 and self._kind == 1
        self.white = 0.0

    def measure(self, image: Image.Image) -> None:
        """Sets `white`, the value that becomes 255; 0 for an image of 8 bits."""
        if image.mode.startswith("I;16"):
            self.white = 4095.0 if self._tiff and self._bits == 12 else 65535.0
        elif image.mode == "I" and self._grey16:
            self.white = 65535.0
        elif image.mode == "I" and self._tiff and self._bits == 16 and self._kind == 2:
            self.white = 32767.0
        elif image.mode in ("I", "F"):
            largest, whole = 0.0, True
            for strip in _strips(image):
                values = self._values(strip)
                values = values[np.isfinite(values)]
                largest = max(largest, float(values.max(initial=0)))
                whole = whole and bool((values == np.round(values)).all())
            full = largest if image.mode == "F" else 2.0**32 - 1 if self._unsigned32 else 2.0**31 - 1
            if image.mode == "F" and (largest <= 1 or (largest <= 16 and not whole)):
                self.white = 1.0
            else:
                self.white = 255.0 if largest <= 255 else 65535.0 if largest <= 65535 else full

    def _values(self, strip: Image.Image) -> np.ndarray:
        values = np.asarray(strip)
        return values.view(np.uint32) if self._unsigned32 and values.dtype == np.int32 else values

    def grey(self, strip: Image.Image) -> tuple[Image.Image, Image.Image | None]:
        """(grey values, alpha), both of mode L; alpha is None if nothing is transparent."""
        values = self._values(strip)
        share = np.clip(np.nan_to_num(values.astype(np.float64), nan=0.0) / self.white, 0, 1)
        share = 1 - share if self._inverted else share
        grey = Image.fromarray((share * 255).round().astype(np.uint8))
        key = strip.info.get("transparency")
        alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)) if isinstance(key, int) else None
        return grey, alpha


def _strips(image: Image.Image) -> Iterator[Image.Image]:
    """An image in strips of whole rows, from the top."""
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(top + rows, image.height)))


def _convert(image: Image.Image, levels: _Levels, transform: tuple[str, Any] | None) -> Image.Image:
    """A decoded image as RGB over white, not turned."""
    result = Image.new("RGB", image.size)
    top = 0
    for strip in _strips(image):
        result.paste(_convert_strip(strip, levels, transform), (0, top))
        top += strip.height
    return result


def _convert_strip(strip: Image.Image, levels: _Levels, transform: tuple[str, Any] | None) -> Image.Image:
    alpha = None
    if levels.white:
        strip, alpha = levels.grey(strip)
    elif strip.has_transparency_data:
        # La and RGBa are multiplied by their alpha.
        whole = {"La": "LA", "RGBa": "RGBA", "P": "RGBA", "PA": "RGBA"}.get(strip.mode)
        strip = strip.convert(whole) if whole else strip
        alpha = strip.convert("RGBA").getchannel("A")
    if transform is None:
        colours = strip.convert("RGB")
    else:
        mode, apply = transform
        colours = apply(strip.convert(mode))
    return colours if alpha is None else Image.composite(colours, Image.new("RGB", strip.size, "white"), alpha)


def _srgb_transform(image: Image.Image) -> tuple[str, Callable[[Image.Image], Image.Image]] | None:
    """(mode, function from an image of that mode to sRGB); None if there is no ICC profile, or if it changes nothing.

    A profile that is damaged, or that is not for the colours of the image, is ignored, as browsers do.
    """
    profile = image.info.get("icc_profile")
    if not profile or image.mode == "LAB":
        return None
    grey = image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;16")
    own = "L" if grey else "CMYK" if image.mode == "CMYK" else "RGB"
    try:
        source: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        mode = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}.get(space)
        if mode is None or (mode != own and not (own == "L" and mode == "RGB")):
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode != "CMYK" and _changes_nothing(transform, mode):
            return None
    except Exception:  # without littlecms, ImportError
        return None
    return mode, transform.apply


def _changes_nothing(transform: Any, mode: str) -> bool:
    """Whether a transform moves no colour by more than 2 of 255. So are the many spellings of sRGB."""
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    cube = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 1, 3) if mode == "RGB" else steps[:, None]
    sample = Image.fromarray(np.ascontiguousarray(cube))
    before, after = np.asarray(sample.convert("RGB")), np.asarray(transform.apply(sample))
    return bool(np.abs(before.astype(int) - after).max() <= 2)


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
