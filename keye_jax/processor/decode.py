"""The frames of a video. The packets tell which frames there are; only the wanted frames are decoded.

Every packet of a file has a number, its place in the table that the constructor makes. A decoded frame knows the number
of its packet. That gives its place on the time line, whatever the file's stamps are. After a seek the next packets are
looked up in the table, so a seek that ends in the wrong place is noticed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from keye_jax.errors import UserError
from keye_jax.processor.frame_list import AnimatedImage
from keye_jax.processor.image import is_animation
from keye_jax.processor.packets import (
    BROADCAST_FORMATS,
    RAW_FORMATS,
    Packets,
    Source,
    decoded,
    decoder_of,
    import_av,
    is_shown,
    packets_of,
    read_packets,
    stamp,
)
from keye_jax.processor.pixels import Picture, deinterlaced
from keye_jax.processor.timeline import PacketTable, Timeline, VideoInfo, read_timeline

# Packets. Over a gap this small, decoding on is cheaper than a seek to a keyframe.
_SEEK_GAP = 4
# Keyframes. How much further back a seek tries that ended behind the frame it was for.
_SEEKS = (0, 1, 2, 4, 8)
# Packets after a seek that need not be in the table, before the seek counts as failed.
_STRANGERS = 100
# Seconds, and part of its length, by which a file may be shorter than its header says.
_SHORTER, _SHORTER_PART = 1.0, 0.02
# Frames a second that a file may state. Others are damage, or clocks in place of rates.
_SLOWEST, _FASTEST = 1e-3, 1e3


class VideoFile:
    """A video file or an animated picture, closed between calls.

    The constructor reads the packets and sets `info`; `read` decodes frames. It may be pickled.

    Args:
      source: a path, or the content of a file.
      field: the name of the video in error messages.

    Attributes:
      content: the source.
      info: its frames.
      warnings: what is missing, sentences.

    Raises:
      UserError: PyAV is missing, the file holds no readable video, or it is a picture.
    """

    def __init__(self, source: Path | bytes, field: str):
        self.content, self.field = source, field
        self._animation = AnimatedImage(source, field) if is_animation(source) else None
        if self._animation is not None:
            self.info, self.warnings = self._animation.info, self._animation.warnings
            return
        av = import_av(field)
        self._source = Source(source, field)
        container, stream = self._source.open()
        with container:
            first = _First(av, stream)
            packets = read_packets(self._source, container, stream, av, first)
            first.finish()
            form, rates = container.format.name, _rates(container, stream)
            # AVI stores no presentation times. With B-frames its packets carry times in decoding order.
            ordered = form != "avi" or not stream.codec_context.has_b_frames
            if first.frame is None or not len(packets.table):
                raise UserError(f"{field} has no frame that can be decoded ({self._source.name})")
            self._picture = Picture.of(first.frame, stream)
        self._packets = packets.table
        self._timeline = read_timeline(packets.table, rates, broadcast=form in BROADCAST_FORMATS, ordered=ordered)
        # MP4 and Matroska seek by presentation time. Other containers seek by decoding time, and a seek to a
        # presentation time would end behind the keyframe.
        self._seek_stamps = packets.table.pts if form.startswith(("mov,", "matroska,")) else packets.table.dts
        self.info = VideoInfo(
            *self._picture.size,
            self._timeline.fps,
            self._timeline.times,
            self._timeline.constant,
        )
        missing = _cut_short(packets, self._timeline)
        self.warnings = [f"{field} {missing}"] if missing else []

    def read(
        self, indices: np.ndarray, size: tuple[int, int] | None = None, *, threads: int = 0
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Decodes frames, in order.

        Args:
          indices: int64 [n], increasing, indices into `info.times`.
          size: (height, width) of the frames in pixels; `info`'s if left out.
          threads: of the decoder; 0 for one a core.

        Yields:
          For each index, the index of the frame used and its pixels, uint8 [H, W, 3], upright, with square pixels, in
          SDR, over white where they are transparent, and without the combs of interlaced material. The two indices
          differ only in a damaged file: then the frame used is one near in time that can be decoded.

        Raises:
          UserError: no frame can be decoded.
        """
        if self._animation is not None:
            yield from self._animation.read(indices, size)
            return
        wanted = [int(index) for index in indices]
        whole = self._picture.interlaced
        with _Decoder(self._source, self._packets, self._timeline, self._seek_stamps, threads) as decoder:
            decoder.needs(wanted if not whole else None)
            for index in wanted:
                used, frame = decoder.at(index)
                if frame.interlaced_frame:
                    frame = deinterlaced(import_av(self.field), decoder.neighbours())
                pixels = self._picture.pixels(frame, size or self._picture.size)
                del frame
                yield used, pixels


class _First:
    """Decodes packets until the first frame comes, which tells the size, the orientation and the colours."""

    def __init__(self, av: Any, stream: Any):
        self._av, self._context = av, decoder_of(av, stream)
        self.frame: Any = None

    def __call__(self, packet: Any) -> None:
        if self.frame is None:
            self.frame = next(iter(decoded(self._av, self._context, packet)), None)

    def finish(self) -> None:
        """Takes the frame that a decoder gives only at the end of the file."""
        if self.frame is None:
            self.frame = next(iter(decoded(self._av, self._context, None)), None)


class _Decoder:
    """A file that is being decoded: the newest frame, the one before it, and the one after it if it was asked for."""

    def __init__(self, source: Source, packets: PacketTable, timeline: Timeline, seek_stamps: np.ndarray, threads: int):
        self._av, self._source, self._threads = import_av(source.field), source, threads
        self._packets, self._timeline, self._seek_stamps = packets, timeline, seek_stamps
        self._needed: np.ndarray | None = None
        # Where stamps begin again, a seek may lead into any part, and may not lead out of it.
        seekable = timeline.frame_of_packet is not None and not timeline.restarts
        self._keys = np.flatnonzero(packets.key) if seekable else np.zeros(0, np.int64)
        in_order = timeline.frame_of_packet
        self._frames_of_keys = self._keys if in_order is None else in_order[self._keys]
        self._container: Any = None
        self._open()

    def __enter__(self) -> _Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def needs(self, indices: list[int] | None) -> None:
        """Says which frames will be read. No others are decoded, but for those that these refer to; None for all."""
        if self._timeline.frame_of_packet is not None and indices is not None:
            self._needed = np.isin(self._timeline.frame_of_packet, indices)

    def at(self, wanted: int) -> tuple[int, Any]:
        """(index, frame) of a frame that can be decoded, near in time to the frame `wanted`.

        Raises:
          UserError: no frame can be decoded.
        """
        place, step = self._key_of(wanted), 1
        if place > 0 and self._keys[place] > self._number + _SEEK_GAP:
            self._seek(place)
        self._advance(wanted)
        # The keyframe is damaged: start at an earlier one.
        while self._before is None and (self._here is None or self._here[0] > wanted) and self._sought > 0:
            place, step = max(0, self._sought - step), step * 2
            self._seek(place)
            self._advance(wanted)
        if self._here is None and self._sought > 0 and self._number < len(self._packets):
            self._open()  # the packets ended too early
            self._advance(wanted)
        times, found = self._timeline.times, [item for item in (self._before, self._here) if item is not None]
        if not found:
            raise UserError(f"{self._source.field} has no frame that can be decoded at {times[wanted]:.1f} s")
        return min(found, key=lambda item: abs(times[item[0]] - times[wanted]))

    def neighbours(self) -> list[Any]:
        """The newest frame between the ones before and after it, None where there is none."""
        if self._here is None:
            return [None, self._before and self._before[1], None]
        if self._after is None:
            self._after = next(self._frames, None)
        return [item and item[1] for item in (self._before, self._here, self._after)]

    def _open(self) -> None:
        """Begins at the beginning of the file."""
        if self._container is not None:
            self._container.close()
        self._container, self._stream = self._source.open()
        self._codec = self._stream.codec_context.name
        self._context = decoder_of(self._av, self._stream)
        self._context.thread_count = self._threads
        self._context.thread_type = "AUTO"
        self._context.copy_opaque = True
        self._begin(self._numbered(0), sought=0)

    def _begin(self, packets: Iterator[tuple[int, Any]], *, sought: int) -> None:
        self._frames = self._decoded(packets)
        self._sought = sought  # the place in `_keys` where decoding began
        self._number = 0 if not sought else int(self._keys[sought])  # of the packet that comes next
        self._count = 0
        self._before: tuple[int, Any] | None = None
        self._here: tuple[int, Any] | None = None
        self._after: tuple[int, Any] | None = None

    def _key_of(self, wanted: int) -> int:
        """The place in `_keys` of the keyframe from which a frame can be decoded; -1 if there is none."""
        return int(np.searchsorted(self._frames_of_keys, wanted, "right")) - 1

    def _seek(self, place: int) -> None:
        """Goes on from a keyframe, an earlier one, or the beginning of the file."""
        for back in _SEEKS:
            if place - back <= 0:
                break
            try:
                self._container.seek(int(self._seek_stamps[self._keys[place - back]]), stream=self._stream)
            except self._av.FFmpegError:
                continue
            self._context.flush_buffers()
            packets = self._numbered(None)
            first = next((item for item in packets if item[0] >= 0 and item[1].is_keyframe), None)
            if first is not None and first[0] <= self._keys[place]:
                self._begin(itertools.chain([first], packets), sought=place - back)
                return
        self._open()

    def _numbered(self, number: int | None) -> Iterator[tuple[int, Any]]:
        """The packets that come, with their numbers; -1 for one that holds no frame to show.

        Args:
          number: of the next packet; None if it has to be looked up.
        """
        strangers = 0
        for packet in packets_of(self._container, self._av, self._stream):
            if packet is None:
                return
            if not is_shown(packet, self._codec):
                if number is not None:
                    yield -1, packet
                continue
            if number is None or number >= len(self._packets) or self._packets.size[number] != packet.size:
                number = self._look_up(packet)
            if number is not None:
                yield number, packet
                number, strangers = number + 1, 0
                continue
            strangers += 1
            if strangers > _STRANGERS:
                return

    def _look_up(self, packet: Any) -> int | None:
        """The number of a packet; None if the table does not have it, or has it more than once."""
        table = self._packets
        alike = table.size == packet.size
        if packet.pos is not None and packet.pos >= 0:
            alike &= table.position == packet.pos
        else:
            alike &= (table.pts == stamp(packet.pts)) & (table.dts == stamp(packet.dts))
        numbers = np.flatnonzero(alike)
        return int(numbers[0]) if len(numbers) == 1 else None

    def _decoded(self, packets: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        """(index, frame) of the frames that can be decoded."""
        for number, packet in packets:
            if number >= 0:
                self._number = number + 1
                packet.opaque = number
                if self._needed is not None:
                    self._context.skip_frame = "DEFAULT" if self._needed[number] else "NONREF"
            for frame in decoded(self._av, self._context, packet):
                if not frame.is_corrupt:
                    yield self._index(frame), frame

    def _advance(self, wanted: int) -> None:
        """Decodes until `_here` is `wanted` or later. After the last frame `_here` is None."""
        while self._here is None or self._here[0] < wanted:
            item, self._after = self._after or next(self._frames, None), None
            self._before, self._here = self._here or self._before, item
            if item is None:
                return

    def _index(self, frame: Any) -> int:
        """The index of `frame`, by its packet, or by counting if packets do not tell the order."""
        in_order = self._timeline.frame_of_packet
        if in_order is not None and frame.opaque is not None:
            return int(in_order[frame.opaque])
        self._count += 1
        return min(self._count, len(self._timeline.times)) - 1


def _rates(container: Any, stream: Any) -> list[float]:
    """Frames a second that a file states, in the order to try them."""
    stated = (stream.average_rate, stream.guessed_rate)
    if container.format.name in RAW_FORMATS:
        # The demuxer of a raw stream states 25 whatever is in it. The codec knows better, if it knows.
        stated = (stream.codec_context.framerate, stream.guessed_rate, stream.average_rate)
    return [float(rate) for rate in stated if rate and _SLOWEST <= rate <= _FASTEST]


def _cut_short(packets: Packets, timeline: Timeline) -> str | None:
    """What is missing at the end of a file, for a sentence that begins with its name; None if nothing is."""
    if packets.end is not None and packets.stated_end is not None and not timeline.restarts:
        missing = packets.stated_end - packets.end
        if missing > max(_SHORTER, _SHORTER_PART * packets.stated_end):
            return f"is cut short: it ends at {packets.end:.1f} s of {packets.stated_end:.1f} s"
    if packets.count < (1 - _SHORTER_PART) * packets.stated_count - 1:
        return f"is cut short: it has {packets.count} of {packets.stated_count} frames"
    if packets.torn:
        return f"is cut short or damaged: after {timeline.times[-1]:.1f} s it cannot be read"
    return None
