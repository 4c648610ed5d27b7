"""Images, sources of all kinds, options in all places, and the messages about bad ones."""

import base64
import http.server
import io
import json
import math
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.processor import Processor
from keye_jax.processor.image import open_image, patchify, to_rgb, upright_size
from keye_jax.processor.image_size import smart_resize
from keye_jax.testing import write_clip, write_picture, write_processor_files


def plan(processor, *parts):
    return processor.plan([{"role": "user", "content": list(parts)}])


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def data_url(image, form="PNG", kind="image/png", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return f"data:{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def test_patches_are_in_raster_order():
    pixels = noise(42, 28)
    patches = patchify(pixels, 14)
    assert patches.shape == (6, 3, 14, 14)
    for row in range(3):
        for col in range(2):
            window = pixels[row * 14 : row * 14 + 14, col * 14 : col * 14 + 14]
            np.testing.assert_array_equal(patches[row * 2 + col], window.transpose(2, 0, 1))


def test_images_are_bicubic_and_grids_follow(processor):
    arrays = [noise(100, 150), noise(333, 90, seed=1)]
    inputs = processor.process(plan(processor, *({"type": "image", "image": array} for array in arrays)))
    expected, grids = [], []
    for array in arrays:
        height, width = smart_resize(*array.shape[:2], min_pixels=4 * 784, max_pixels=20480 * 784)
        shown = Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC)
        expected.append(patchify(np.asarray(shown), 14))
        grids.append((1, height // 14, width // 14))
    np.testing.assert_array_equal(inputs.image_patches, np.concatenate(expected))
    assert inputs.image_grids.tolist() == [list(grid) for grid in grids]
    assert inputs.image_patches.dtype == np.uint8
    assert inputs.video_patches.shape == (0, 3, 14, 14)
    assert inputs.video_grids.shape == (0, 3)
    assert inputs.frame_times == ()
    assert inputs.input_ids.dtype == inputs.positions.dtype == inputs.image_grids.dtype == np.int32


def test_pixel_scale(processor):
    np.testing.assert_allclose(
        np.arange(256)[:, None] * processor.pixel_scale + processor.pixel_shift,
        np.repeat((np.arange(256)[:, None] / 255 - 0.5) / 0.5, 3, 1),
        atol=1e-6,
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    pixels = noise(8, 12)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    image = open_image(file.getvalue(), "image")
    turned = {
        **{1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1]},
        **{5: pixels.swapaxes(0, 1), 6: np.rot90(pixels, -1)},
        **{7: np.rot90(pixels, 2).swapaxes(0, 1), 8: np.rot90(pixels)},
    }[orientation]
    assert upright_size(image, "image") == turned.shape[:2]
    np.testing.assert_array_equal(np.asarray(to_rgb(image, "image")), turned)


def test_modes():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    rgb = np.repeat(grey[..., None], 3, 2)

    def read(image, form="PNG", **options):
        file = io.BytesIO()
        image.save(file, form, **options)
        return np.asarray(to_rgb(open_image(file.getvalue(), "image"), "image")).astype(int)

    np.testing.assert_array_equal(read(Image.fromarray(grey)), rgb)
    np.testing.assert_array_equal(read(Image.fromarray(grey.astype(np.uint16) * 257)), rgb)
    np.testing.assert_array_equal(read(Image.fromarray(grey).convert("P")), rgb)
    np.testing.assert_array_equal(read(Image.fromarray(grey > 127)), (rgb > 127) * 255)
    np.testing.assert_allclose(read(Image.fromarray(rgb).convert("CMYK"), "TIFF"), rgb, atol=1)
    np.testing.assert_array_equal(read(Image.fromarray(grey.astype(np.float32)), "TIFF"), rgb)
    alpha = np.concatenate([np.zeros_like(rgb), grey[..., None]], 2)
    np.testing.assert_allclose(read(Image.fromarray(alpha)), 255 - rgb.astype(int), atol=1)
    palette = Image.fromarray(grey).convert("P")
    assert read(palette, transparency=0)[0, 0].tolist() == [255] * 3


def test_all_kinds_of_sources_agree(processor, tmp_path):
    write_picture(tmp_path / "a.png")
    image = Image.open(tmp_path / "a.png")
    sources = [
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        (tmp_path / "a.png").as_uri(),
        (tmp_path / "a.png").read_bytes(),
        data_url(image),
        "data:image/png," + "".join(f"%{byte:02x}" for byte in (tmp_path / "a.png").read_bytes()),
        image,
        np.asarray(image),
    ]
    parts = [{"type": "image", "image": source} for source in sources]
    parts += [
        {"type": "image_url", "image_url": sources[0]},
        {"type": "image_url", "image_url": {"url": sources[4], "detail": "high"}},
        {"type": "image", "image_url": {"url": sources[0]}},
    ]
    inputs = processor.process(plan(processor, *parts))
    patches = inputs.image_patches.reshape(len(parts), -1)
    assert (patches == patches[0]).all()


def test_video_sources_agree(processor, clips, clip):
    array = np.stack([clips.picture(index) for index in range(10)])
    url = "data:video/mp4;base64," + base64.b64encode(clip.read_bytes()).decode()
    first, second, frames, listed = (
        processor.process(plan(processor, part))
        for part in (
            {"type": "video", "video": str(clip)},
            {"type": "video_url", "video_url": {"url": url}},
            {"type": "video", "video": array, "sample_fps": 10},
            {"type": "video_url", "video_url": {"url": list(array), "sample_fps": 10}},
        )
    )
    np.testing.assert_array_equal(first.video_patches, second.video_patches)
    np.testing.assert_array_equal(first.input_ids, second.input_ids)
    np.testing.assert_array_equal(frames.video_patches, listed.video_patches)
    np.testing.assert_allclose(frames.frame_times[0], np.arange(10) / 10)
    assert len(processor.process(plan(processor, {"type": "video", "video": array})).frame_times[0]) == 10


@pytest.mark.parametrize(
    "place",
    [
        lambda url, options: {"type": "video_url", "video_url": {"url": url, **options}},
        lambda url, options: {"type": "video_url", "video_url": {"url": url}, **options},
        lambda url, options: {"type": "video_url", "video_url": {"url": url}, "preprocess_kwargs": options},
        lambda url, options: {"type": "video_url", "video_url": {"url": url, "preprocess_kwargs": options}},
        lambda url, options: {"type": "video", "video": url, "preprocess_kwargs": options},
        lambda url, options: {"type": "video", "video": url, **options},
        lambda url, options: {"type": "video", "video": url, **{f"video_{name}": options[name] for name in options}},
        lambda url, options: {
            **{"type": "video", "fps": 9, "min_pixels": 70 * 784, "preprocess_kwargs": {"fps": 8}},
            "video": {"url": url, "fps": None, "preprocess_kwargs": {"fps": 7}, **options},
        },
    ],
)
def test_options_in_all_places(processor, clip, place):
    options = {"fps": 5, "max_frames": 7, "min_pixels": 80 * 784, "max_pixels": 100 * 784, "total_pixels": 90 * 7 * 784}
    (video,) = plan(processor, place(str(clip), options)).videos
    assert video.frames == 7
    assert (video.height, video.width) == smart_resize(48, 128, min_pixels=80 * 784, max_pixels=90 * 784)
    (video,) = plan(processor, place(str(clip), {"fps": 1.0, "min_frames": 3})).videos
    assert video.frames == 4


def test_one_limit_moves_the_other(processor, clip):
    (video,) = plan(processor, {"type": "video", "video": str(clip), "max_pixels": 20 * 784}).videos
    assert video.tokens_per_frame <= 24  # small frames are rounded up
    (video,) = plan(processor, {"type": "video", "video": str(clip), "min_pixels": 500 * 784}).videos
    assert video.tokens_per_frame >= 500


def test_defaults_of_the_processor(checkpoint, config, clip):
    defaults = {"fps": 1, "max_frames": 3, "max_pixels": 70 * 784, "image_max_pixels": 10 * 784}
    processor = Processor.from_checkpoint(checkpoint, config, defaults=defaults)
    made = plan(processor, {"type": "video", "video": str(clip)}, {"type": "image", "image": noise(500, 500)})
    assert made.videos[0].frames == 3
    assert made.videos[0].tokens_per_frame <= 70
    assert made.images[0].num_tokens <= 10
    (video,) = plan(processor, {"type": "video", "video": str(clip), "max_frames": 4}).videos
    assert video.frames == 4
    with pytest.raises(UserError, match=r"^fps is 'x'; it must be a positive number"):
        Processor.from_checkpoint(checkpoint, config, defaults={"fps": "x"})


def test_preprocessor_config(checkpoint, config, clip, tmp_path):
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())

    def load(**changes):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(changes))
        return Processor.from_checkpoint(tmp_path, config)

    part = {"type": "video", "video": str(clip)}
    processor = load(
        fps=5, video_max_pixels=80 * 784, max_pixels=9 * 784, frame_format="[{time:.3f}]", video_processor_type="X"
    )
    made = plan(processor, part, {"type": "image", "image": noise(500, 500)})
    assert made.videos[0].frames == 20
    assert made.videos[0].tokens_per_frame <= 80
    assert made.images[0].num_tokens <= 9
    assert "[2.100]" in processor.detokenize(processor.process(made).input_ids)
    adaptive = load(adaptive_pixels=[[3, 0.001], [10, 0.0015]])
    assert plan(adaptive, part).videos[0].frames == 4
    assert plan(adaptive, part, part).videos[0].frames == 8
    assert plan(adaptive, {**part, "total_pixels": 10**6}).videos[0].frames == 8
    for changes, message in (
        ({"patch_size": 16}, "patch_size is 16; it must be 14, as in config.json"),
        ({"image_mean": [1]}, r"image_mean is \(1.0,\); it must be three numbers"),
        ({"image_std": "x"}, "image_std is 'x'; it must be a list of numbers"),
        ({"frame_format": "{oops}"}, "frame_format is '{oops}'; it must be a format string"),
        ({"adaptive_pixels": [[5, 2]]}, "adaptive_pixels is .* it must be rows"),
        ({"rescale_factor": "0.5"}, "rescale_factor is '0.5'; it must be a number"),
        ({"rescale_factor": True}, "rescale_factor is True; it must be a number"),
        ({"image_std": [math.nan, 1, 1]}, "the number NaN is not finite"),
        ({"do_normalize": False}, "do_normalize is False; it must be true, as the model was trained"),
        ({"max_pixels": -1}, "preprocessor_config.json.max_pixels is -1; it must be a positive integer"),
    ):
        with pytest.raises(UserError, match=message):
            load(**changes)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image", "image": "no/such.png"}, r"content\[0\].image is 'no/such.png'; there is no such file"),
        ({"type": "image_url", "image_url": {"url": "/"}}, r"image_url.url is '/'; it must be a regular file"),
        ({"type": "image", "image": "https://host/a.png"}, "only with --allow-remote"),
        ({"type": "video", "video": "HTTP://host/a.mp4"}, "only with --allow-remote"),
        ({"type": "image", "image": "ftp://host/a"}, "it must be a path or a file:, data:, http: or https: URL"),
        ({"type": "image", "image": "file://host/a"}, "must name a file of this machine"),
        ({"type": "image", "image": "data:image/png;base64"}, "a data: URL must be data:<type>;base64,<data>"),
        ({"type": "image", "image": "data:image/png;base64,a$"}, "its data must be valid base64"),
        ({"type": "image", "image": "data:,"}, "must hold some data"),
        ({"type": "image", "image": "data:,hello"}, r"image is not an image in a known format \(5 bytes\)"),
        ({"type": "image", "image": "a\0b"}, "it must be the path of a file|there is no such file"),
        ({"type": "image", "image": 3}, r"image is 3; it must be a path, a URL, an array or an image"),
        ({"type": "image_url", "image_url": {}}, r"image_url.url is missing"),
        (
            {"type": "image", "image": noise(3, 3).astype(float)},
            r"array float64\[3, 3, 3\]; it must be uint8 \[H, W, 3\]",
        ),
        ({"type": "image", "image": noise(3, 900)}, r"content\[0\].image: the image is 3x900 .* at most 200"),
        (
            {"type": "image", "image": noise(9, 9), "fps": 2},
            r"\[0\].fps is not known; an option of image must be one of min",
        ),
        ({"type": "video", "video": noise(9, 9)}, r"array uint8\[9, 9, 3\]; it must be uint8 \[F, H, W, 3\]"),
        ({"type": "video", "video": Image.new("RGB", (9, 9))}, "is an image; a video must be a file"),
        ({"type": "video", "video": [noise(9, 9), 3]}, r"video\[1\] is 3"),
        ({"type": "video", "video": "x", "fps": 0}, r"content\[0\].fps is 0; it must be a positive number"),
        ({"type": "video", "video": "x", "fps": True}, "fps is True; it must be a positive number"),
        ({"type": "video", "video": "x", "max_frames": 2.5}, "max_frames is 2.5; it must be a positive integer"),
        ({"type": "video", "video": {"url": "x", "max_frames": "9"}}, r"\[0\].video.max_frames is '9'"),
        ({"type": "video", "video": "x", "preprocess_kwargs": {"speed": 1}}, "preprocess_kwargs.speed is not known"),
        (
            {"type": "video", "video": "x", "preprocess_kwargs": [1]},
            r"preprocess_kwargs is \[1\]; it must be an object",
        ),
        (
            {"type": "video", "video": "x", "min_pixels": 9, "max_pixels": 8},
            "min_pixels is 9; it must be at most max_pixels 8",
        ),
        (
            {"type": "video", "video": np.zeros((2, 9, 9, 3), np.uint8), "total_pixels": 99},
            "total_pixels is 99; it must be at",
        ),
    ],
)
def test_bad_parts_give_one_line(processor, part, message):
    with pytest.raises(UserError, match=message) as error:
        plan(processor, part)
    assert str(error.value).startswith("messages[0].content[0]")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_image_of_which_nothing_can_be_decoded(processor, form):
    file = io.BytesIO()
    Image.fromarray(noise(200, 200)).save(file, form)
    data = file.getvalue()
    start = data[: data.index(b"IDAT") + 20 if form == "PNG" else data.index(b"\xff\xda") + 20]
    with pytest.raises(UserError, match=r"content\[0\].image is a damaged image: .*truncated"):
        processor.process(plan(processor, {"type": "image", "image": start}))


@pytest.mark.parametrize("side", [10_000, 20_000])
def test_decompression_bomb(side):
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    if side == 10_000:
        assert open_image(file.getvalue(), "image").width == side
    else:
        with pytest.raises(UserError, match="image is too large an image; it must have at most 178956970 pixels"):
            open_image(file.getvalue(), "image")


def test_no_format_that_runs_programs():
    with pytest.raises(UserError, match="not an image in a known format"):
        open_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "image")


def test_files_can_be_forbidden(checkpoint, config, clip):
    processor = Processor.from_checkpoint(checkpoint, config, allow_files=False)
    for source in (str(clip), clip.as_uri(), "/no/such"):
        with pytest.raises(UserError, match="local files may not be read here"):
            plan(processor, {"type": "video", "video": source})


@pytest.fixture
def server(tmp_path):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if target := {"/file": "file:///etc/passwd", "/ftp": "ftp://host/a", "/again": "/a.png"}.get(self.path):
                self.send_response(302)
                self.send_header("Location", target)
                self.end_headers()
                return
            path = tmp_path / self.path[1:]
            self.send_response(200 if path.is_file() else 404)
            self.end_headers()
            self.wfile.write(path.read_bytes() if path.is_file() else b"")

        def log_message(self, format, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_remote_files(checkpoint, config, server, clip, tmp_path, monkeypatch):
    write_picture(tmp_path / "a.png")
    (tmp_path / "a.mp4").write_bytes(clip.read_bytes())
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(downloads))
    processor = Processor.from_checkpoint(checkpoint, config, allow_remote=True)
    parts = [
        {"type": "image", "image": f"{server}/again"},
        {"type": "video_url", "video_url": {"url": f"{server}/a.mp4"}},
    ]
    with plan(processor, *parts) as made:
        assert len(list(downloads.iterdir())) == 2
        remote = processor.process(made)
    assert not list(downloads.iterdir())
    local = [{"type": "image", "image": tmp_path / "a.png"}, {"type": "video", "video": tmp_path / "a.mp4"}]
    expected = processor.process(plan(processor, *local))
    np.testing.assert_array_equal(remote.image_patches, expected.image_patches)
    np.testing.assert_array_equal(remote.video_patches, expected.video_patches)
    for path, message in (
        ("/file", "cannot be fetched: .*'file:///etc/passwd' is not allowed"),
        ("/ftp", "redirects to 'ftp://host/a'; only http"),
        ("/none", "cannot be fetched: .*404|cannot be fetched: Not Found"),
    ):
        with pytest.raises(UserError, match=message):
            plan(processor, {"type": "image", "image": server + path})
    monkeypatch.setattr("keye_jax.processor.media.MAX_REMOTE_BYTES", 10)
    with pytest.raises(UserError, match="it must have at most 10 bytes"):
        plan(processor, {"type": "image", "image": f"{server}/a.png"})
    with pytest.raises(UserError, match="it cannot be fetched"):
        plan(processor, {"type": "image", "image": "http://127.0.0.1:1/a.png"})
    assert not list(downloads.iterdir())


def test_plan_tells_the_length_without_decoding(processor, clip, monkeypatch):
    parts = [
        {"type": "video", "video": str(clip)},
        {"type": "image", "image": noise(100, 100)},
        {"type": "text", "text": "?"},
    ]
    made = plan(processor, *parts)
    assert made.num_tokens == made.text_tokens + made.image_tokens + made.video_tokens
    assert made.num_frames == 8
    [video], info = made.videos, made.videos[0].source.info
    assert (video.frames, info.num_frames, info.duration, info.native_fps) == (8, 40, 4.0, 10)
    seen = []
    inputs = processor.process(made, progress=lambda done, total: seen.append((done, total)))
    assert inputs.input_ids.shape == (made.num_tokens,)
    assert inputs.positions.shape == (3, made.num_tokens)
    assert inputs.positions.max() + 1 == made.num_tokens + inputs.position_delta
    assert seen == [(done, 8) for done in range(1, 9)]


def test_time_stamps_follow_the_frames_really_used(processor, clips, tmp_path):
    clips.write_damaged(tmp_path / "a.mp4", 2)
    made = plan(processor, {"type": "video", "video": str(tmp_path / "a.mp4")})
    inputs = processor.process(made)
    assert inputs.frame_times[0].max() == pytest.approx(1.9)
    written = processor.detokenize(inputs.input_ids, skip_special_tokens=False).replace("<|video_pad|>", "")
    assert written.count("<|frame|>1.9") == 4


@pytest.mark.parametrize("name", ["a", "b"])
def test_processor_files_for_a_vocabulary_of_512(config, tmp_path, name):
    values = {"vocab_size": 512, "image_token_id": 505, "video_token_id": 506, "bos_token_id": 497, "eos_token_id": 499}
    values |= {"vision_start_token_id": 502, "vision_end_token_id": 503}
    small = KeyeConfig.from_dict(config.to_dict() | values)
    write_processor_files(tmp_path, small)
    processor = Processor.from_checkpoint(tmp_path, small)
    assert processor.token_id("<|im_end|>") == 499
    for token in range(512):
        assert processor.detokenize([token], skip_special_tokens=False)
    assert processor.plan([{"role": "user", "content": name}]).num_tokens > 5


def test_processor_files_are_the_same_every_time(config, checkpoint, tmp_path):
    write_processor_files(tmp_path, config)
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in checkpoint.iterdir()}
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (checkpoint / file.name).read_bytes()


def test_clip_and_picture(processor, tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_clip(tmp_path / name, seconds=2, fps=5, size=(320, 180))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    made = plan(processor, {"type": "video", "video": Path(tmp_path / "a.mp4")})
    assert made.videos[0].source.info.num_frames == 10
