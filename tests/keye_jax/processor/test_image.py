"""Pictures as people have them: turned, deep, transparent, cut off, animated, in all formats that Pillow writes."""

import io
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, TiffImagePlugin

from keye_jax.errors import UserError
from keye_jax.processor import Processor
from keye_jax.processor.image import open_image, to_rgb, upright_size

ROOT = Path(__file__).parents[3]
WHITE = [255, 255, 255]


def file_of(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def read(source, warn=None):
    return np.asarray(to_rgb(open_image(source, "image"), "image", warn)).astype(int)


def plan(processor, *parts):
    return processor.plan([{"role": "user", "content": list(parts)}])


def ramp():
    """uint8 [16, 16], each value once."""
    return np.arange(256, dtype=np.uint8).reshape(16, 16)


def grey_rgb():
    return np.repeat(ramp()[..., None], 3, 2).astype(int)


def corners(height=24, width=40):
    """A picture whose four quarters differ: red, green, blue, white."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2, 0] = 255
    pixels[: height // 2, width // 2 :, 1] = 255
    pixels[height // 2 :, : width // 2, 2] = 255
    pixels[height // 2 :, width // 2 :] = 255
    return pixels


def turned(pixels, orientation):
    return {
        **{1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1]},
        **{5: pixels.swapaxes(0, 1), 6: np.rot90(pixels, -1)},
        **{7: np.rot90(pixels, 2).swapaxes(0, 1), 8: np.rot90(pixels)},
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("PNG", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "jpeg"}),
        ("WEBP", {"lossless": True}),
        ("AVIF", {"quality": 95}),
        ("MPO", {"save_all": True, "append_images": [Image.new("RGB", (40, 24))], "quality": 95}),
    ],
)
def test_orientation_in_every_format(processor, form, options, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(Image.fromarray(corners()), form, exif=exif, **options)
    expected = turned(corners(), orientation)
    image = open_image(data, "image")
    assert upright_size(image, "image") == expected.shape[:2]
    shown = np.asarray(to_rgb(image, "image")).astype(int)
    assert upright_size(image, "image") == expected.shape[:2]
    assert shown.shape == expected.shape
    rows, cols = ([side // 4, 3 * side // 4] for side in expected.shape[:2])
    for row in rows:
        for col in cols:
            np.testing.assert_allclose(shown[row, col], expected[row, col], atol=40)
    (planned,) = plan(processor, {"type": "image", "image": data}).images
    assert (planned.height > planned.width) == (expected.shape[0] > expected.shape[1])


def test_exif_behind_the_pixels_of_a_png():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = file_of(Image.fromarray(corners()), "PNG", exif=exif)
    at = data.index(b"eXIf") - 4
    chunk = data[at : at + 12 + int.from_bytes(data[at : at + 4])]
    end = data.index(b"IEND") - 4
    late = data[:at] + data[at + len(chunk) : end] + chunk + data[end:]
    image = open_image(late, "image")
    assert upright_size(image, "image") == (40, 24)
    assert isinstance(image, ImageFile.ImageFile) and image.tile  # nothing was decoded
    np.testing.assert_array_equal(np.asarray(to_rgb(image, "image")), turned(corners(), 6))


def test_damaged_exif_is_ignored():
    data = file_of(Image.fromarray(corners()), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(range(64)))
    assert upright_size(open_image(data, "image"), "image") == (24, 40)
    assert read(data).shape == (24, 40, 3)


@pytest.mark.parametrize(
    ("values", "form", "options"),
    [
        (ramp().astype(np.uint16) * 257, "PNG", {}),
        (ramp().astype(np.uint16) * 257, "TIFF", {}),
        (ramp().astype(np.uint16) * 257, "TIFF", {"compression": "tiff_lzw"}),
        (ramp().astype(np.uint16) * 257, "PPM", {}),
        (ramp().astype(np.uint16) * 257, "JPEG2000", {}),
        (ramp().astype(np.int32), "TIFF", {}),
        (ramp().astype(np.int32) * 257, "TIFF", {}),
        (ramp().astype(np.int32) * (2**31 // 255), "TIFF", {}),
        (ramp().astype(np.float32) / 255, "TIFF", {}),
        (ramp().astype(np.float32), "TIFF", {}),
        (ramp().astype(np.float32) * 257, "TIFF", {}),
        (ramp().astype(np.float32) * 5e5, "TIFF", {}),
        (ramp().astype(np.float32) / 255, "PPM", {}),
        (ramp().astype(np.float32), "PPM", {}),
    ],
)
def test_deep_values(values, form, options):
    np.testing.assert_allclose(read(file_of(Image.fromarray(values), form, **options)), grey_rgb(), atol=1)
    np.testing.assert_allclose(read(Image.fromarray(values)), grey_rgb(), atol=1)


def tiff(values, kind, bits, photometric=1):
    """A TIFF of raw values, which Pillow cannot write itself."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    height, width = values.shape
    tags[256], tags[257], tags[258], tags[259], tags[262] = width, height, bits, 1, photometric
    tags[277], tags[278], tags[279], tags[339] = 1, height, values.nbytes, kind
    tags[273] = 0  # Pillow adds the length of what it writes
    file = io.BytesIO()
    tags.save(file)
    return file.getvalue() + values.tobytes()


@pytest.mark.parametrize(
    ("values", "kind", "bits", "photometric"),
    [
        (ramp().astype(np.uint32) * 16843009, 1, 32, 1),
        (ramp().astype(np.int16) * 128, 2, 16, 1),
        (65535 - ramp().astype(np.uint16) * 257, 1, 16, 0),
        ((1 - ramp() / 255).astype(np.float32), 3, 32, 0),
    ],
)
def test_deep_tiffs_that_pillow_does_not_write(values, kind, bits, photometric):
    np.testing.assert_allclose(read(tiff(values, kind, bits, photometric)), grey_rgb(), atol=2)


def test_twelve_bits():
    values = (ramp().astype(np.uint32) * 4095 // 255).reshape(-1, 2)
    packed = np.stack([values[:, 0] >> 4, (values[:, 0] & 15) << 4 | values[:, 1] >> 8, values[:, 1] & 255], 1)
    data = tiff(np.zeros((16, 16), np.uint16), 1, 12)[: -16 * 16 * 2] + packed.astype(np.uint8).tobytes()
    np.testing.assert_allclose(read(data), grey_rgb(), atol=1)


def test_floats_with_highlights_and_without_numbers():
    values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16).copy()
    values[0, :3] = np.nan, np.inf, -np.inf
    values[15, 15] = 4.5
    shown = read(Image.fromarray(values))
    assert shown[0, :3, 0].tolist() == [0, 255, 0]
    np.testing.assert_allclose(shown[1:15], grey_rgb()[1:15], atol=1)
    assert shown[15, 15, 0] == 255


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "LA", "La", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"]
)
def test_modes_agree(mode):
    source = Image.fromarray(corners())
    step = {"La": "LA", "PA": "P", "RGBa": "RGBA"}.get(mode, "RGB")
    shown, expected = read(source.convert(step).convert(mode)), corners().astype(int)
    if mode in ("L", "LA", "La", "1"):
        expected = np.repeat(np.asarray(source.convert(mode if mode == "1" else "L").convert("L"))[..., None], 3, 2)
    np.testing.assert_allclose(shown, expected, atol=25 if mode == "LAB" else 3)


@pytest.mark.parametrize("mode", ["LA", "La", "RGBA", "RGBa", "PA"])
def test_transparency_is_white_in_every_mode(mode):
    image = Image.new("LA" if mode in ("LA", "La") else "RGBA", (4, 2))
    image.putalpha(Image.fromarray(np.array([[0, 0, 255, 255]] * 2, np.uint8)))
    if mode == "PA":
        palette = Image.new("P", (4, 2))
        palette.putpalette([0, 0, 0] * 256)
        image = palette.convert("PA")
        image.putalpha(Image.fromarray(np.array([[0, 0, 255, 255]] * 2, np.uint8)))
    elif mode != image.mode:
        image = image.convert(mode)
    assert image.mode == mode
    shown = read(image)
    assert shown[0].tolist() == [WHITE, WHITE, [0, 0, 0], [0, 0, 0]]


def png(bits, colour, raw, transparent):
    """A PNG of one row; `raw` are its bytes."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 2, 1, bits, colour, 0, 0, 0)
    parts = ((b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress(b"\0" + raw)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(
    ("bits", "colour", "raw", "transparent"),
    [
        (1, 0, b"\x00", b"\0\1"),
        (2, 0, b"\x40", b"\0\1"),
        (4, 0, b"\x50", b"\0\5"),
        (8, 0, b"\x55\x00", b"\0\x55"),
        (16, 0, b"\x12\x34\0\0", b"\x12\x34"),
        (8, 2, b"\1\2\3\0\0\0", b"\0\1\0\2\0\3"),
        (16, 2, b"\x12\x34\x56\x78\x9a\xbc" + bytes(6), b"\x12\x34\x56\x78\x9a\xbc"),
    ],
)
def test_transparent_colour_of_a_png(bits, colour, raw, transparent):
    shown = read(png(bits, colour, raw, transparent))
    if bits == 1:
        assert shown[0].tolist() == [[0, 0, 0], [0, 0, 0]]
    else:
        assert shown[0].tolist() == [WHITE, [0, 0, 0]]


def wide_profile():
    """A profile like sRGB whose red and green are swapped: a change that nobody overlooks."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", profile[128:132])[0]
    at = {bytes(profile[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    red, green = at[b"rXYZ"], at[b"gXYZ"]
    profile[red + 4 : red + 12], profile[green + 4 : green + 12] = (
        profile[green + 4 : green + 12],
        profile[red + 4 : red + 12],
    )
    return bytes(profile)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG", "AVIF"])
def test_profiles_become_srgb(form):
    image = Image.new("RGB", (16, 16), (255, 0, 0))
    options = {"WEBP": {"lossless": True}}.get(form, {})
    shown = read(file_of(image, form, icc_profile=wide_profile(), **options))
    np.testing.assert_allclose(shown[8, 8], [0, 255, 0], atol=4)
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = read(file_of(image, form, **options))
    np.testing.assert_array_equal(read(file_of(image, form, icc_profile=own, **options)), plain)
    for bad in (b"no profile", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()):
        np.testing.assert_array_equal(read(file_of(image, form, icc_profile=bad, **options)), plain)


def test_profile_with_transparency():
    pixels = np.zeros((1, 2, 4), np.uint8)
    pixels[0, :, 0] = 255
    pixels[0, 1, 3] = 255
    shown = read(file_of(Image.fromarray(pixels), "PNG", icc_profile=wide_profile()))
    assert shown[0, 0].tolist() == WHITE
    np.testing.assert_allclose(shown[0, 1], [0, 255, 0], atol=2)


@pytest.mark.parametrize(("form", "options"), [("JPEG", {"quality": 90}), ("PNG", {})])
def test_cut_off_pictures_are_shown_as_far_as_they_go(processor, form, options):
    pixels = np.random.default_rng(0).integers(1, 256, (200, 200, 3), np.uint8)
    data = file_of(Image.fromarray(pixels), form, **options)
    whole, seen = read(data), []
    shown = read(data[: len(data) // 2], seen.append)
    assert len(seen) == 1
    assert seen[0].startswith("image is cut off or damaged; the lower ")
    np.testing.assert_array_equal(shown[:64], whole[:64])
    assert (shown[160:] == 255).all()
    inputs = processor.process(plan(processor, {"type": "image", "image": data[: len(data) // 2]}))
    assert inputs.warnings == (seen[0].replace("image", "messages[0].content[0].image", 1),)
    with pytest.raises(UserError, match="image is a damaged image"):
        read(data[: len(data) // 2])
    with pytest.raises(UserError, match="image"):
        read(data[:60], seen.append)


def test_nothing_to_warn_of_is_no_warning(processor):
    data = file_of(Image.fromarray(corners()), "PNG")
    assert processor.process(plan(processor, {"type": "image", "image": data})).warnings == ()


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "AVIF", "TIFF"])
def test_animations_say_that_there_is_more(processor, form):
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    data = file_of(frames[0], form, save_all=True, append_images=frames[1:])
    made = plan(processor, {"type": "image", "image": data})
    (warning,) = made.warnings
    assert "pages" in warning if form == "TIFF" else "--video" in warning
    np.testing.assert_allclose(read(data)[32, 32], [255, 0, 0], atol=6)
    assert processor.process(made).warnings == made.warnings


@pytest.mark.parametrize("form", ["BMP", "DIB", "DDS", "ICO", "ICNS", "JPEG2000", "PCX", "PPM", "QOI", "SGI", "TGA"])
def test_other_formats(form):
    options = {"ICO": {"sizes": [(16, 16)]}, "ICNS": {}}.get(form, {})
    size = 1024 if form == "ICNS" else 16
    pixels = corners(size, size)
    shown = read(file_of(Image.fromarray(pixels).convert("RGB"), form, **options))
    assert shown.shape == pixels.shape
    np.testing.assert_allclose(shown[2, 2], pixels[2, 2], atol=3)


def test_heic():
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(corners(64, 96))
    picture.info["exif"] = exif.tobytes()  # pillow-heif writes it as a transformation of the container
    image = open_image(file_of(picture, "HEIF", quality=95), "image")
    shown = np.asarray(to_rgb(image, "image"))
    assert upright_size(image, "image") == shown.shape[:2] == (96, 64)
    np.testing.assert_allclose(shown[20, 50].astype(int), turned(corners(64, 96), 6)[20, 50], atol=40)


def test_heic_without_pillow_heif(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(UserError, match=r"is a HEIC image, which needs pillow-heif: pip install 'keye-jax\[heic\]'"):
        open_image(b"\0\0\0\x18ftypheic" + bytes(100), "image")


def test_a_video_as_an_image(processor, clip, clips, tmp_path):
    names = ("a.mkv", "a.avi", "a.ts", "a.h264", "a.flv")
    for path in (clip, *(clips.write(tmp_path / name, 3) for name in names)):
        with pytest.raises(UserError, match=r"image is a video .*; give it with --video, or as a part of type video"):
            plan(processor, {"type": "image", "image": str(path)})


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "AVIF", "PPM"])
def test_damage_of_any_kind_is_one_line(form):
    random = np.random.default_rng(0)
    whole = file_of(Image.fromarray(random.integers(0, 256, (40, 40, 3), np.uint8)), form)
    for _ in range(60):
        data = bytearray(whole[: random.integers(1, len(whole) + 1)])
        for at in random.integers(0, len(data), 6):
            data[at] = random.integers(256)
        try:
            to_rgb(open_image(bytes(data), "image"), "image", lambda _: None)
        except UserError as error:
            assert "\n" not in str(error)


def test_plan_keeps_no_file_open_and_no_pixels(processor, tmp_path):
    Image.new("RGB", (30, 30), "red").save(tmp_path / "a.png")
    parts = [{"type": "image", "image": str(tmp_path / "a.png"), "max_pixels": 784, "min_pixels": 784}] * 300
    parts.append({"type": "video", "video": [str(tmp_path / "a.png")] * 300})
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, limits[1]))
    try:
        inputs = processor.process(plan(processor, *parts))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(inputs.image_grids) == 300
    assert len(inputs.video_grids) == 300


def test_a_users_own_picture_stays_open(processor, tmp_path):
    Image.new("RGB", (30, 30), "red").save(tmp_path / "a.png")
    image = Image.open(tmp_path / "a.png")
    for _ in range(2):
        processor.process(plan(processor, {"type": "image", "image": image}))
    assert image.getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.slow
def test_memory_of_many_photographs(tmp_path):
    Image.new("RGB", (4000, 3000), "red").save(tmp_path / "a.jpg")
    program = f"""
import resource
from tests.keye_jax.processor.test_image import *
from keye_jax.config import KeyeConfig
from keye_jax.testing import write_processor_files
config = KeyeConfig.from_file({str(ROOT / "configs/model/tiny.json")!r})
write_processor_files({str(tmp_path / "c")!r}, config)
processor = Processor.from_checkpoint({str(tmp_path / "c")!r}, config)
part = dict(type="image", image={str(tmp_path / "a.jpg")!r}, max_pixels=100 * 784)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
processor.process(plan(processor, *[part] * 40))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 300


def test_decoded_bytes_are_limited(checkpoint, config, clip):
    small = Processor.from_checkpoint(checkpoint, config, max_decoded_bytes=1_000_000)
    picture = {"type": "image", "image": Image.new("RGB", (400, 400))}
    assert plan(small, {**picture, "max_pixels": 50 * 784}).num_tokens
    message = r"messages hold 1 image\(s\) and 0 frame\(s\) of .* bytes .* at most max_decoded_bytes 1,000,000"
    with pytest.raises(UserError, match=message):
        plan(small, picture)
    with pytest.raises(UserError, match=r"0 image\(s\) and 8 frame\(s\)"):
        plan(small, {"type": "video", "video": str(clip)})
