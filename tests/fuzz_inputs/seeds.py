"""The small media files that cases are mutated from, made at run time."""

from __future__ import annotations

import dataclasses
import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageCms

# Pixels. One side is not a multiple of 16, so that decoders crop.
HEIGHT, WIDTH = 40, 64
FRAMES = 8


@dataclasses.dataclass(frozen=True)
class Clip:
    """How one clip is written.

    Attributes:
      codec, pix_fmt: the encoder and the pixels it takes.
      rate: frames a second.
      options, container: options of the encoder and of the container.
      muxer: the container; by default the end of the file's name decides.
      rotation: degrees of the display matrix.
      milliseconds: times of the frames, if the rate varies.
      size: (width, height), in pixels.
    """

    codec: str = "libx264"
    pix_fmt: str = "yuv420p"
    rate: int = 10
    options: dict[str, str] = dataclasses.field(default_factory=dict)
    container: dict[str, str] = dataclasses.field(default_factory=dict)
    muxer: str | None = None
    rotation: int | None = None
    milliseconds: tuple[int, ...] = ()
    size: tuple[int, int] = (WIDTH, HEIGHT)


SUBTITLES = "words.srt"
_UNEVEN = (0, 17, 33, 50, 1000, 1500, 1900, 4000)
_PQ = {"color_primaries": "bt2020", "color_trc": "smpte2084", "colorspace": "bt2020nc"}
CLIPS = {
    "plain.mp4": Clip(options={"g": "4"}),
    "fragments.mp4": Clip(options={"g": "4"}, container={"movflags": "frag_keyframe+empty_moov"}),
    "faststart.mp4": Clip(container={"movflags": "faststart"}),
    "rotated.mp4": Clip(rotation=90),
    "pq.mp4": Clip("libx265", "yuv420p10le", options=_PQ),
    "plain.mov": Clip("mpeg4"),
    "rotated.mov": Clip("mjpeg", "yuvj420p", rotation=180),
    "ffv1.mkv": Clip("ffv1", "bgra"),
    "hevc.mkv": Clip("libx265"),
    "uneven.mkv": Clip(milliseconds=_UNEVEN),
    "vp8.webm": Clip("libvpx"),
    "alpha.webm": Clip("libvpx-vp9", "yuva420p"),
    "mpeg4.avi": Clip("mpeg4", options={"bf": "2"}),
    "mjpeg.avi": Clip("mjpeg", "yuvj422p"),
    "h264.ts": Clip(options={"g": "4"}),
    "interlaced.ts": Clip("mpeg2video", rate=25, options={"flags": "+ilme+ildct", "bf": "2"}),
    "mpeg1.mpg": Clip("mpeg1video", rate=25),
    "mpeg2.vob": Clip("mpeg2video", rate=25, options={"g": "4"}),
    "flv1.flv": Clip("flv"),
    "h264.flv": Clip(),
    "wmv2.asf": Clip("wmv2"),
    "vp8.ogv": Clip("libvpx", muxer="ogg"),
    "ffv1.nut": Clip("ffv1"),
    "mpeg2.mxf": Clip("mpeg2video", rate=25),
    "animation.gif": Clip("gif", "rgb8"),
    "alpha.apng": Clip("apng", "rgba"),
    "raw.h264": Clip(),
    "raw.hevc": Clip("libx265"),
    "raw.m4v": Clip("mpeg4"),
    "vp9.ivf": Clip("libvpx-vp9"),
    "raw.y4m": Clip("wrapped_avframe"),
}


def picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Stripes that move with `number`, uint8 [height, width, 3]."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 5 + number * 9, columns * 3, (rows + columns - number * 4) * 2], -1).astype(np.uint8)


def _write_clip(path: Path, clip: Clip) -> None:
    # With one thread and without the time of day, a file is the same on every run.
    with av.open(str(path), "w", format=clip.muxer, options={"fflags": "+bitexact", **clip.container}) as container:
        stream = container.add_stream(clip.codec, rate=clip.rate)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = clip.size
        stream.pix_fmt = clip.pix_fmt
        fast = {"preset": "ultrafast", "bf": "2"} if clip.codec == "libx264" else {}
        if clip.codec == "libx265":
            fast = {"preset": "ultrafast", "x265-params": "log-level=none:pools=none:frame-threads=1"}
        if clip.codec.startswith("libvpx"):
            fast = {"deadline": "realtime", "cpu-used": "8"}
        flags = "+bitexact" + clip.options.get("flags", "")
        stream.options = {"threads": "1", **fast, **clip.options, "flags": flags}
        if clip.rotation is not None:
            stream.set_display_rotation(clip.rotation)
        if clip.milliseconds:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(picture(index, *clip.size), format="rgb24").reformat(format=clip.pix_fmt)
            if clip.milliseconds:
                frame.pts, frame.time_base = clip.milliseconds[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _pictures() -> dict[str, tuple[Image.Image, dict[str, object]]]:
    """Pictures by the names of their files, and what `Image.save` takes for each."""
    rgb = Image.fromarray(picture(0))
    grey = rgb.convert("L")
    rgba = rgb.copy()
    rgba.putalpha(grey)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile[:24] + bytes(12) + profile[36:]  # without the time of its making
    more = {"save_all": True, "append_images": [Image.fromarray(picture(index)) for index in range(1, 4)]}
    return {
        "plain.png": (rgb, {}),
        "alpha.png": (rgba, {}),
        "palette.png": (rgb.quantize(16), {"transparency": 3}),
        "deep.png": (deep, {}),
        "bits.png": (grey.convert("1"), {}),
        "exif.png": (rgb, {"exif": exif, "icc_profile": profile}),
        "plain.jpg": (rgb, {}),
        "exif.jpg": (rgb, {"exif": exif, "icc_profile": profile, "progressive": True}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "grey.jpg": (grey, {}),
        "plain.tif": (rgb, {}),
        "exif.tif": (rgb, {"exif": exif, "compression": "tiff_lzw"}),
        "jpeg.tif": (rgb, {"compression": "jpeg"}),
        "deep.tif": (deep, {"compression": "tiff_adobe_deflate"}),
        "float.tif": (Image.fromarray(np.asarray(grey).astype(np.float32)), {}),
        "integer.tif": (Image.fromarray(np.asarray(grey).astype(np.int32) << 20), {}),
        "pages.tif": (rgb, more),
        "plain.webp": (rgb, {"exif": exif}),
        "alpha.webp": (rgba, {"lossless": True}),
        "animation.webp": (rgb, more),
        "plain.gif": (rgb, {}),
        "pictures.gif": (rgb, more),
        "plain.bmp": (rgb, {}),
        "palette.bmp": (rgb.quantize(16), {}),
        "plain.avif": (rgb, {"exif": exif, "speed": 10, "max_threads": 1}),
        "alpha.avif": (rgba, {"speed": 10, "max_threads": 1}),
        "plain.jp2": (rgb, {}),
        "plain.ico": (rgba, {"sizes": [(16, 16), (32, 32)]}),
        "packed.tga": (rgba, {"compression": "tga_rle"}),
        "plain.ppm": (rgb, {}),
        "bits.pbm": (grey.convert("1"), {}),
        "deep.pgm": (deep, {}),
    }


def make(folder: Path) -> None:
    """Writes all clips and pictures, and the subtitles of a clip, into `folder`."""
    for name, clip in CLIPS.items():
        _write_clip(folder / name, clip)
    for name, (image, options) in _pictures().items():
        file = io.BytesIO()
        image.save(file, Image.registered_extensions()[Path(name).suffix], **options)
        (folder / name).write_bytes(file.getvalue())
    (folder / SUBTITLES).write_text("1\n00:00:00,100 --> 00:00:00,500\n<i>Hello</i>\n", encoding="utf-8")


def is_clip(name: str) -> bool:
    return name in CLIPS
