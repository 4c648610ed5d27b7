"""The frames of a video: what there is is found from packets alone, and only what is wanted is decoded."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from keye_jax.errors import UserError
from keye_jax.processor.image import open_image, to_rgb, upright_size
from keye_jax.processor.media import shorten

# Containers that hold their own pictures: no playlist, which would make ffmpeg open other files and addresses.
_FORMATS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,gif,apng,ivf,obu,h264,hevc,m4v,mxf,nut,"
    "yuv4mpegpipe,rm,dv,3gp,wtv,vc1,av1,mp3,wav,aac,flac"
)
# Going on decoding over a few frames is cheaper than starting again at a keyframe.
_SEEK_GAP = 4


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What a video holds, frames in order of presentation.

    Attributes:
      height, width: size in pixels, after rotation.
      native_fps: frames a second; the mean where the rate varies.
      times: float64 [N], seconds from the first frame: index / native_fps at a constant rate, else the file's own.
      pts: int64 [N], the file's time stamps, increasing; None where it has none to go by.
      keyframes: int64 [K], indices of the frames where decoding may start.
      seek_to: int64 [K], the time stamps to look them up by.
      orientation: the display matrix's (a, b, c, d), each -1, 0 or 1.
    """

    height: int
    width: int
    native_fps: float
    times: np.ndarray
    pts: np.ndarray | None = None
    keyframes: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    seek_to: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    orientation: tuple[int, int, int, int] = (1, 0, 0, 1)

    @property
    def num_frames(self) -> int:
        return len(self.times)

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.num_frames / self.native_fps


class FrameList:
    """A video given as its frames: an array uint8 [F, H, W, 3], or a list of opened images."""

    def __init__(self, frames: Sequence[Any] | np.ndarray[Any, Any], native_fps: float, field: str):
        if isinstance(frames, np.ndarray):
            kind, shape = frames.dtype, list(frames.shape)
            if kind != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
                raise UserError(f"{field} is an array {kind}{shape}; it must be uint8 [F, H, W, 3]")
        if not len(frames):
            raise UserError(f"{field} is an empty list; a video must have at least one frame")
        self._frames = frames
        self._field = field
        height, width = upright_size(self._image(0), f"{field}[0]")
        self.info = VideoInfo(height, width, native_fps, np.arange(len(frames)) / native_fps)

    def _image(self, index: int):
        return open_image(self._frames[index], f"{self._field}[{index}]")

    def read(self, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (index, uint8 [H, W, 3]) for each of `indices`."""
        for index in indices.tolist():
            yield index, np.asarray(to_rgb(self._image(index), f"{self._field}[{index}]"))


class VideoFile:
    """A video file: `info` is known at once, `read` decodes frames.

    Args:
      source: a path, or the bytes of a file.
      field: what error messages call it.

    Raises:
      UserError: PyAV is missing, or the file holds no video that can be read.
    """

    def __init__(self, source: Path | bytes, field: str):
        self._source = source
        self.field = field
        self._name = f"{len(source)} bytes" if isinstance(source, bytes) else shorten(str(source))
        self.av = _import_av(field)
        self.info = self._probe()

    def _open(self):
        source = io.BytesIO(self._source) if isinstance(self._source, bytes) else str(self._source)
        options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
        try:
            container = self.av.open(source, options=options)
        except (self.av.FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{self.field} is not a video that can be read ({self._name}): {reason}") from error
        streams = [s for s in container.streams.video if not s.disposition & type(s.disposition).attached_pic]
        if not streams:
            container.close()
            raise UserError(f"{self.field} holds no video stream ({self._name}); it must be a video, not only sound")
        return container, streams[0]

    def _probe(self) -> VideoInfo:
        """Reads every packet's time, and decodes one frame, since only that tells the size and the rotation."""
        container, stream = self._open()
        stamps: list[tuple[int | None, int | None, int, bool]] = []
        frame = None
        with container:
            packets = container.demux(stream)
            while (packet := self._next(packets)) is not None:
                if frame is None:
                    frame = next(iter(self._decode(packet)), None)
                if packet.size and not packet.is_discard:
                    stamps.append((packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe))
            rates = [Fraction(rate) for rate in (stream.average_rate, stream.guessed_rate) if rate]
            tick = float(stream.time_base)
            # AVI stores no presentation times: with B-frames, those of its packets are in decoding order.
            # These are searched by presentation time; others, by decoding time, and come out too late for the former.
            by_pts = container.format.name.startswith(("mov,", "matroska,"))
            ordered = container.format.name != "avi" or not stream.codec_context.has_b_frames
        if frame is None or not stamps:
            raise UserError(f"{self.field} has no frame that can be decoded ({self._name})")
        orientation = _orientation(frame)
        height, width = frame.height, frame.width
        if not orientation[0]:
            height, width = width, height
        stored = [stamp[1] if stamp[0] is None else stamp[0] for stamp in stamps]
        pts = np.array([value for value in stored if value is not None], np.int64)
        if len(pts) < len(stamps):
            fps = float(rates[0]) if rates else 25.0
            return VideoInfo(height, width, fps, np.arange(len(stamps)) / fps, orientation=orientation)
        shown = np.unique(pts)
        last = stamps[int(np.argmax(pts))][2] * tick
        fps, times = _timing((shown - shown[0]) * tick, last, tick, [float(rate) for rate in rates if rate > 0])
        info = VideoInfo(height, width, fps, times, orientation=orientation)
        if not ordered or any(stamp[0] is None for stamp in stamps):
            return info
        keys = {pts[i]: pts[i] if by_pts or dts is None else dts for i, (_, dts, _, key) in enumerate(stamps) if key}
        keyframes = np.searchsorted(shown, np.array(sorted(keys), np.int64))
        seek_to = np.array([keys[stamp] for stamp in sorted(keys)], np.int64)
        return dataclasses.replace(info, pts=shown, keyframes=keyframes, seek_to=seek_to)

    def read(self, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Decodes frames, in order.

        Args:
          indices: int64 [n], increasing, of `info.times`.

        Yields:
          For each, the index of the frame really used (another one only where the file is damaged: the nearest that
          can be decoded), and its pixels, uint8 [H, W, 3], upright.

        Raises:
          UserError: nothing can be decoded.
        """
        container, stream = self._open()
        with container:
            stream.thread_type = "AUTO"
            cursor = _Cursor(self, container, stream)
            for wanted in indices.tolist():
                index, frame = cursor.at(wanted)
                pixels = _turn(frame.to_ndarray(format="rgb24"), self.info.orientation)
                del frame
                yield index, pixels

    def _next(self, packets: Iterator[Any]) -> Any:
        """The next packet; None at the end, or where the file is cut off."""
        try:
            return next(packets, None)
        except self.av.FFmpegError:
            return None

    def _decode(self, packet: Any) -> list[Any]:
        try:
            return packet.decode()
        except self.av.FFmpegError:
            return []

    def frames(self, container: Any, stream: Any, *, from_keyframe: bool) -> Iterator[Any]:
        """Every frame that can be decoded from where the container stands, or from the next keyframe on."""
        packets = container.demux(stream)
        while (packet := self._next(packets)) is not None:
            if from_keyframe and packet.size and not packet.is_keyframe:
                continue
            from_keyframe = False
            for frame in self._decode(packet):
                if not frame.is_corrupt:
                    yield frame


class _Cursor:
    """A place in a file being decoded: the frame at `index`, and the one before it in case a wanted one is missing."""

    def __init__(self, file: VideoFile, container: Any, stream: Any):
        self._file, self._container, self._stream = file, container, stream
        self._info = file.info
        self._restart(from_keyframe=False)

    def _restart(self, *, from_keyframe: bool) -> None:
        self._frames = self._file.frames(self._container, self._stream, from_keyframe=from_keyframe)
        self._before: tuple[int, Any] | None = None
        self._here: tuple[int, Any] | None = None
        self._count = 0

    def at(self, wanted: int) -> tuple[int, Any]:
        """(index, frame) of the frame nearest to `wanted` that can be decoded."""
        keys = self._info.keyframes
        key = int(np.searchsorted(keys, wanted, "right")) - 1
        index = self._here[0] if self._here else self._before[0] if self._before else 0
        sought = key >= 0 and int(keys[key]) > index + _SEEK_GAP and self._seek(key)
        self._advance(wanted)
        step = 1
        # The seek came out too late, or the keyframe is damaged: start further back.
        while sought and self._before is None and (self._here is None or self._here[0] > wanted) and key > 0:
            key, step = max(0, key - step), step * 2
            sought = self._seek(key)
            self._advance(wanted)
        found = [item for item in (self._before, self._here) if item is not None]
        if not found:
            raise UserError(f"{self._file.field} has no frame that can be decoded at {self._info.times[wanted]:.1f} s")
        return min(found, key=lambda item: abs(self._info.times[item[0]] - self._info.times[wanted]))

    def _seek(self, key: int) -> bool:
        try:
            self._container.seek(int(self._info.seek_to[key]), stream=self._stream)
        except self._file.av.FFmpegError:
            return False
        self._restart(from_keyframe=True)
        return True

    def _advance(self, wanted: int) -> None:
        """Moves on until `_here` is `wanted` or later; None after the last frame."""
        while self._here is None or self._here[0] < wanted:
            frame = next(self._frames, None)
            if frame is None:
                self._before, self._here = self._here or self._before, None
                return
            self._before, self._here = self._here or self._before, (self._index(frame), frame)

    def _index(self, frame: Any) -> int:
        """Which of the video's frames this is: by its time, or by counting where there are no times."""
        pts, last = self._info.pts, self._info.num_frames - 1
        if pts is None or frame.pts is None:
            self._count += 1
            return min(self._count - 1, last)
        right = min(int(np.searchsorted(pts, frame.pts)), last)
        left = max(right - 1, 0)
        return left if abs(pts[left] - frame.pts) < abs(pts[right] - frame.pts) else right


def _import_av(field: str) -> Any:
    try:
        import av
    except ImportError as error:
        raise UserError(f"{field} is a video, which needs PyAV: pip install 'keye-jax[video]'") from error
    return av


def _timing(times: np.ndarray, last: float, tick: float, rates: list[float]) -> tuple[float, np.ndarray]:
    """Frames a second, and the time of each frame, from the file's own times.

    Args:
      times: float64 [N], seconds from the first frame.
      last: how long the last frame is shown, in seconds; 0 if unknown.
      tick: resolution of the file's times, in seconds.
      rates: what the file says that its rate is.
    """
    count = len(times)
    if count == 1:
        return (rates[0] if rates else 1 / last if last > 0 else 1.0), times
    span = float(times[-1])
    # Matroska rounds times to milliseconds, and so is exact to one tick; a frame left out is more than that.
    for rate in [*rates, (count - 1) / span]:
        tolerance = min(max(tick, 1e-3), 0.25 / rate) + 1e-6
        even = np.arange(count) / rate
        if np.abs(even - times).max() <= tolerance:
            return rate, even
    return count / (span + (last if last > 0 else span / (count - 1))), times


def _orientation(frame: Any) -> tuple[int, int, int, int]:
    """(a, b, c, d) of the frame's display matrix, which maps (x, y) to (ax + cy, bx + dy), to quarter turns."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return (1, 0, 0, 1)
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    if max(abs(a), abs(d)) >= max(abs(b), abs(c)):
        return (-1 if a < 0 else 1, 0, 0, -1 if d < 0 else 1)
    return (0, -1 if b < 0 else 1, -1 if c < 0 else 1, 0)


def _turn(pixels: np.ndarray, orientation: tuple[int, int, int, int]) -> np.ndarray:
    """Turns and mirrors [H, W, 3] as the display matrix says."""
    a, b, c, d = orientation
    if not a:
        pixels = pixels.swapaxes(0, 1)
    return np.ascontiguousarray(pixels[:: b + d, :: a + c])
