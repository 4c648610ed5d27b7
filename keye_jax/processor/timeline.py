"""Which frames a video has and when each is shown, from the time stamps of its packets."""

from __future__ import annotations

import dataclasses

import numpy as np

NO_STAMP = np.iinfo(np.int64).min
"""In place of a time stamp that a packet does not have."""

# Seconds. In containers for broadcast a longer pause between two frames is a new time line, as in ffmpeg's own tools.
_LONGEST_PAUSE = 10.0
# Seconds. A stamp that lies further back than this, and than two frames, begins a new time line.
_SMALLEST_RESTART = 0.1


@dataclasses.dataclass(frozen=True, eq=False)
class PacketTable:
    """The packets of a video stream in the order of the file, P of them.

    Attributes:
      pts, dts: int64 [P], when a packet's frame is shown and decoded, in ticks; `NO_STAMP` where the file does not say.
      duration: int64 [P], ticks; 0 where the file does not say.
      position: int64 [P], bytes from the beginning of the file; negative where unknown.
      size: int64 [P], bytes.
      key: bool [P], whether decoding may start there.
      tick: seconds.
    """

    pts: np.ndarray
    dts: np.ndarray
    duration: np.ndarray
    position: np.ndarray
    size: np.ndarray
    key: np.ndarray
    tick: float

    def __len__(self) -> int:
        return len(self.pts)


@dataclasses.dataclass(frozen=True, eq=False)
class Timeline:
    """The N frames of a video, in the order in which they are shown.

    Attributes:
      times: float64 [N], seconds from the first frame, increasing. They are index / fps at a constant rate.
      fps: frames a second; the mean if the rate varies.
      constant: whether the rate is constant.
      frame_of_packet: int64 [P], the frame that each packet holds; None if only decoding tells the order.
      restarts: how many times the file's own time line begins again.
    """

    times: np.ndarray
    fps: float
    constant: bool
    frame_of_packet: np.ndarray | None
    restarts: int = 0


def read_timeline(packets: PacketTable, rates: list[float], *, broadcast: bool, ordered: bool) -> Timeline:
    """The time line of a stream.

    Stamps that begin again, as in files that were joined, go on where the stamps before them end.

    Args:
      packets: of the stream, at least one.
      rates: frames a second that the file states, in the order to try them.
      broadcast: whether the container may begin a new time line anywhere, so that a long pause is none.
      ordered: whether stamps tell the order in which frames are shown.
    """
    stamps = np.where(packets.pts == NO_STAMP, packets.dts, packets.pts)
    if np.any(stamps == NO_STAMP):
        fps = rates[0] if rates else 25.0
        return Timeline(np.arange(len(packets)) / fps, fps, True, None)
    stamps, restarts = _joined(packets, stamps, broadcast=broadcast)
    shown, frame_of_packet = np.unique(stamps, return_inverse=True)
    last = int(packets.duration[np.argmax(stamps)]) * packets.tick
    fps, times, constant = _timing((shown - shown[0]) * packets.tick, last, packets.tick, rates)
    known = ordered and not np.any(packets.pts == NO_STAMP)
    return Timeline(times, fps, constant, frame_of_packet.astype(np.int64) if known else None, restarts)


def _joined(packets: PacketTable, stamps: np.ndarray, *, broadcast: bool) -> tuple[np.ndarray, int]:
    """`stamps` on one rising time line, int64 [P], and how often theirs begins again."""
    if len(stamps) < 2:
        return stamps, 0
    decoded = np.where(packets.dts == NO_STAMP, stamps, packets.dts)
    steps = np.diff(decoded)
    rising = steps[steps > 0]
    usual = int(np.median(rising)) if len(rising) else 1
    # Without decoding times, those of presentation go back and forth within a group of frames.
    reorder = 2 if np.all(packets.dts != NO_STAMP) else 20
    restart = steps < -max(int(_SMALLEST_RESTART / packets.tick), reorder * usual)
    if broadcast:
        restart |= steps > max(int(_LONGEST_PAUSE / packets.tick), reorder * usual)
    starts = np.flatnonzero(restart) + 1
    if not len(starts):
        return stamps, 0
    joined = stamps.copy()
    ends = [*starts[1:], len(stamps)]
    before = stamps[: starts[0]]
    end = int(before.max()) + (int(packets.duration[: starts[0]][np.argmax(before)]) or usual)
    for start, stop in zip(starts, ends, strict=True):
        part = stamps[start:stop]
        joined[start:stop] = part - part.min() + end
        end = int(joined[start:stop].max()) + (int(packets.duration[start:stop][np.argmax(part)]) or usual)
    return joined, len(starts)


def _timing(times: np.ndarray, last: float, tick: float, rates: list[float]) -> tuple[float, np.ndarray, bool]:
    """Frames a second, the times of the frames in seconds, and whether the rate is constant.

    Args:
      times: float64 [N], seconds from the first frame, as the file has them.
      last: duration of the last frame in seconds; 0 if unknown.
      tick: resolution of the file's times, in seconds.
      rates: frames a second that the file states, in the order to try them.
    """
    count = len(times)
    if count == 1:
        return (rates[0] if rates else 1 / last if last > 0 else 1.0), times, True
    span = float(times[-1])
    # Matroska rounds times to milliseconds, an error of up to one tick. A dropped frame is a larger error.
    for rate in [*rates, (count - 1) / span]:
        tolerance = min(max(tick, 1e-3), 0.25 / rate) + 1e-6
        even = np.arange(count) / rate
        if np.abs(even - times).max() <= tolerance:
            return rate, even, True
    return count / (span + (last if last > 0 else span / (count - 1))), times, False
