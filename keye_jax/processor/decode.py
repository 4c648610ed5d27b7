"""The frames of a video. The packets tell which frames there are; only the wanted frames are decoded."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from keye_jax.errors import UserError
from keye_jax.processor.media import shorten

# Containers that hold their own frames. Playlists are left out: they make ffmpeg open other files and addresses.
_FORMATS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,gif,apng,ivf,obu,h264,hevc,m4v,mxf,nut,"
    "yuv4mpegpipe,rm,dv,3gp,wtv,vc1,av1,mp3,wav,aac,flac"
)
# Frames. Over a gap this small, decoding on is cheaper than a seek to a keyframe.
_SEEK_GAP = 4


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """The N frames of a video, in order of presentation.

    Attributes:
      height, width: size of a frame in pixels, after rotation.
      native_fps: frames a second; the mean if the rate varies.
      times: float64 [N], seconds from the first frame. They are index / native_fps at a constant rate, and the file's
        own times at a variable one.
      pts: int64 [N], the file's time stamps in ticks, increasing; None if the file has no usable time stamps.
      keyframes: int64 [K], indices of the frames at which decoding may start.
      seek_to: int64 [K], for each keyframe the time stamp, in ticks, to seek to.
      orientation: (a, b, c, d) of the display matrix, each -1, 0 or 1; see `_orientation`.
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


class VideoFile:
    """A video file. The constructor reads its packets and sets `info`; `read` decodes frames.

    Args:
      source: a path, or the content of a file.
      field: the name of the video in error messages.

    Raises:
      UserError: PyAV is missing, or the file holds no readable video.
    """

    def __init__(self, source: Path | bytes, field: str):
        self._source = source
        self.field = field
        self.warnings: list[str] = []
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
        """Reads the times of all packets and decodes one frame, which tells the size and the rotation."""
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
            # MP4 and Matroska seek by presentation time. Other containers seek by decoding time, and a seek to a
            # presentation time would end behind the keyframe.
            by_pts = container.format.name.startswith(("mov,", "matroska,"))
            # AVI stores no presentation times. With B-frames its packets carry times in decoding order.
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
          indices: int64 [n], increasing, indices into `info.times`.

        Yields:
          For each index, the index of the frame used and its pixels, uint8 [H, W, 3], upright. The two indices differ
          only in a damaged file: then the frame used is the nearest one in time that can be decoded.

        Raises:
          UserError: no frame can be decoded.
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
        """The next packet; None at the end of the file or where it is cut off."""
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
        """Decodes from the container's position, or from the next keyframe; leaves out undecodable frames."""
        packets = container.demux(stream)
        while (packet := self._next(packets)) is not None:
            if from_keyframe and packet.size and not packet.is_keyframe:
                continue
            from_keyframe = False
            for frame in self._decode(packet):
                if not frame.is_corrupt:
                    yield frame


class _Cursor:
    """A position in a file being decoded: the newest frame, and the one before it in case a wanted frame is missing."""

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
        """(index, frame) of the decodable frame nearest in time to the frame `wanted`; UserError if there is none."""
        keys = self._info.keyframes
        key = int(np.searchsorted(keys, wanted, "right")) - 1
        index = self._here[0] if self._here else self._before[0] if self._before else 0
        sought = key >= 0 and int(keys[key]) > index + _SEEK_GAP and self._seek(key)
        self._advance(wanted)
        step = 1
        # The seek ended behind `wanted`, or the keyframe is damaged: start at an earlier keyframe.
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
        """Decodes until `_here` is `wanted` or later. After the last frame `_here` is None."""
        while self._here is None or self._here[0] < wanted:
            frame = next(self._frames, None)
            if frame is None:
                self._before, self._here = self._here or self._before, None
                return
            self._before, self._here = self._here or self._before, (self._index(frame), frame)

    def _index(self, frame: Any) -> int:
        """The index of `frame`, found by its time, or by counting if there are no times."""
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
    """Frames a second, and the times of the frames in seconds, float64 [N], from the file's own times.

    Args:
      times: float64 [N], seconds from the first frame.
      last: duration of the last frame in seconds; 0 if unknown.
      tick: resolution of the file's times, in seconds.
      rates: frames a second that the file states, in the order to try them.
    """
    count = len(times)
    if count == 1:
        return (rates[0] if rates else 1 / last if last > 0 else 1.0), times
    span = float(times[-1])
    # Matroska rounds times to milliseconds, an error of up to one tick. A dropped frame is a larger error.
    for rate in [*rates, (count - 1) / span]:
        tolerance = min(max(tick, 1e-3), 0.25 / rate) + 1e-6
        even = np.arange(count) / rate
        if np.abs(even - times).max() <= tolerance:
            return rate, even
    return count / (span + (last if last > 0 else span / (count - 1))), times


def _orientation(frame: Any) -> tuple[int, int, int, int]:
    """(a, b, c, d) of the frame's display matrix, rounded to quarter turns; it maps (x, y) to (ax + cy, bx + dy)."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return (1, 0, 0, 1)
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    if max(abs(a), abs(d)) >= max(abs(b), abs(c)):
        return (-1 if a < 0 else 1, 0, 0, -1 if d < 0 else 1)
    return (0, -1 if b < 0 else 1, -1 if c < 0 else 1, 0)


def _turn(pixels: np.ndarray, orientation: tuple[int, int, int, int]) -> np.ndarray:
    """Rotates and mirrors pixels [H, W, 3] as the display matrix says."""
    a, b, c, d = orientation
    if not a:
        pixels = pixels.swapaxes(0, 1)
    return np.ascontiguousarray(pixels[:: b + d, :: a + c])
