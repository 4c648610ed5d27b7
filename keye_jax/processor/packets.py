"""Opening a video file, choosing the stream that is the film, and listing its packets."""

from __future__ import annotations

import array
import contextlib
import dataclasses
import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from keye_jax.errors import UserError, shorten
from keye_jax.processor.image import is_image
from keye_jax.processor.timeline import NO_STAMP, PacketTable

# Containers that hold their own frames. Playlists are left out: they make ffmpeg open other files and addresses.
_FORMATS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,gif,apng,ivf,obu,h264,hevc,m4v,mxf,nut,"
    "yuv4mpegpipe,rm,dv,3gp,wtv,vc1,av1,mp3,wav,aac,flac,mjpeg,h263"
)
_IS_PICTURE = "is a picture; use --image, or a part of type image"
_PICTURE_BRANDS = frozenset(("avif", "heic", "heix", "heim", "heis", "mif1"))
# Streams without a time line of their own. Their rate is that of the codec, or the demuxer's guess.
RAW_FORMATS = frozenset(("h264", "hevc", "m4v", "mpegvideo", "obu", "av1", "vc1", "mjpeg", "h263"))
# Containers in which recordings and broadcasts may begin a new time line anywhere.
BROADCAST_FORMATS = frozenset(("mpegts", "mpeg", "ogg", "wtv"))
# Containers whose header states the length of the whole file.
_STATED_LENGTH = frozenset(("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "asf", "flv"))
_STATED_COUNT = frozenset(("mov,mp4,m4a,3gp,3g2,mj2", "avi"))
_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# Largest frame, in pixels: one of 16,384 by 8,192, the largest of the levels of AV1 and VVC.
MAX_FRAME_AREA = 16384 * 8192
# Bytes from the beginning of an ASF file in which its properties stand, and the GUID before them.
_ASF_HEAD = 2**16
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
# Ticks. Stamps beyond are damage; differences of what is left fit into 64 bits.
_LATEST = 2**60
_END = object()


@dataclasses.dataclass(frozen=True)
class Source:
    """A video file that can be opened again and again.

    Attributes:
      content: a path, or the content of a file.
      field: the name of the video in error messages.
    """

    content: Path | bytes
    field: str

    @property
    def name(self) -> str:
        """For error messages."""
        return f"{len(self.content)} bytes" if isinstance(self.content, bytes) else shorten(str(self.content))

    def file(self) -> BinaryIO:
        """The file itself, for the caller to close. Raises OSError."""
        return io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content.open("rb")

    def open(self) -> tuple[Any, Any]:
        """The container, for the caller to close, and the stream of the film.

        Raises:
          UserError: PyAV is missing, or the file is not a video.
        """
        av = import_av(self.field)
        container = self._container(av)
        try:
            return container, self._film(container)
        except BaseException:
            container.close()
            raise

    def _container(self, av: Any) -> Any:
        content = io.BytesIO(self.content) if isinstance(self.content, bytes) else str(self.content)
        options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
        form = "mjpeg" if self._is_motion_jpeg(av) else None
        try:
            container = av.open(content, format=form, options=options)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise UserError(f"{self.field} {self._fault(error)}") from error
        if container.metadata.get("major_brand") in _PICTURE_BRANDS:
            container.close()
            raise UserError(f"{self.field} {_IS_PICTURE} ({self.name})")
        return container

    def _is_motion_jpeg(self, av: Any) -> bool:
        """Whether the file is several JPEG pictures of one size, one behind the other."""
        with contextlib.suppress(OSError), self.file() as file:
            if file.read(3) != b"\xff\xd8\xff":
                return False
            file.seek(0)
            with contextlib.suppress(av.FFmpegError), av.open(file, format="mjpeg") as container:
                frames = [(frame.height, frame.width) for frame in itertools.islice(container.decode(video=0), 2)]
                return len(frames) == 2 and frames[0] == frames[1]
        return False

    def _fault(self, error: Exception) -> str:
        """Why the file cannot be opened, for a sentence that begins with the field."""
        head = b""
        with contextlib.suppress(OSError), self.file() as file:
            head = file.read(12)
        if head[4:8] == b"ftyp":
            return f"has no index ({self.name}); the file is cut short, or not yet written to its end"
        if is_image(self.content):
            return f"{_IS_PICTURE} ({self.name})"
        reason = getattr(error, "strerror", None) or error
        return f"is not a video that can be read ({self.name}): {reason}"

    def _film(self, container: Any) -> Any:
        """The video stream that a player shows: the default one, then the one of the largest frames."""
        streams = [stream for stream in container.streams.video if not _is_picture(stream)]
        if not streams:
            raise UserError(f"{self.field} holds no video stream ({self.name}); it must be a video, not only sound")
        known = [stream for stream in streams if stream.codec_context is not None]
        if not known:
            raise UserError(f"{self.field} is a video in a format that cannot be decoded ({self.name})")

        def rank(stream: Any) -> tuple[bool, int]:
            flags = stream.disposition
            return bool(flags & type(flags).default), stream.codec_context.width * stream.codec_context.height

        best = max(known, key=rank)
        width, height = best.codec_context.width, best.codec_context.height
        if width * height > MAX_FRAME_AREA:
            allowed = f"a frame must have at most {MAX_FRAME_AREA} pixels"
            raise UserError(f"{self.field} has frames of {width}x{height} ({self.name}); {allowed}")
        return best


@dataclasses.dataclass(frozen=True, eq=False)
class Packets:
    """What the packets of a file say.

    Attributes:
      table: those of the film.
      end: seconds at which the last packet of any stream ends, on the file's own time line; None if unknown.
      stated_end: where the file's header says that it ends; None if it does not.
      count: of the packets of the film, also of those that are not shown.
      stated_count: how many the header states; 0 if it does not.
      torn: whether the file ends within a packet, or cannot be read to its end.
    """

    table: PacketTable
    end: float | None
    stated_end: float | None
    count: int
    stated_count: int
    torn: bool


def is_shown(packet: Any, codec: str) -> bool:
    """Whether a packet of a stream in `codec` holds a frame that is shown."""
    if not packet.size or packet.is_discard:
        return False
    if codec == "vp8":  # frames that are only referred to have packets of their own, and the fifth bit says so
        return bool(memoryview(packet)[0] >> 4 & 1)
    return codec != "theora" or not memoryview(packet)[0] >> 7  # where Ogg files are joined, headers come again


def packets_of(container: Any, av: Any, *streams: Any) -> Iterator[Any]:
    """The packets up to the end of the file; the last one is None if the file cannot be read to its end."""
    packets = container.demux(*streams)
    while True:
        try:
            packet = next(packets, _END)
        except (av.FFmpegError, OSError):
            yield None
            return
        if packet is _END:
            return
        yield packet


def decoder_of(av: Any, stream: Any) -> Any:
    """A decoder for a stream."""
    name, context = stream.codec_context.name, stream.codec_context
    if name in _WITH_ALPHA and "1" in (stream.metadata.get("alpha_mode"), stream.metadata.get("ALPHA_MODE")):
        # The default decoders of VP8 and VP9 leave transparency out.
        context = av.CodecContext.create(_WITH_ALPHA[name], "r")
        context.extradata = stream.codec_context.extradata
    return context


def decoded(av: Any, context: Any, packet: Any) -> list[Any]:
    """The frames that a decoder gives for a packet, none if it is damaged; None in place of the last packet."""
    try:
        return context.decode(packet)
    except (av.FFmpegError, ValueError):
        return []


def read_packets(source: Source, container: Any, stream: Any, av: Any, visit: Callable[[Any], None]) -> Packets:
    """Reads all packets of a file.

    Args:
      visit: is called with each packet of the film, in order.
    """
    columns = {name: array.array("q") for name in ("pts", "dts", "duration", "position", "size")}
    key = array.array("b")
    end: float | None = None
    torn, count = False, 0
    codec = stream.codec_context.name  # PyAV crashes if it is asked for this after a decoder did not open
    for packet in packets_of(container, av):
        torn = packet is None or packet.is_corrupt
        if packet is None:
            break
        begin = packet.pts if packet.dts is None else packet.dts
        if begin is not None and packet.time_base:
            finish = float((begin + (packet.duration or 0)) * packet.time_base)
            end = finish if end is None else max(end, finish)
        if packet.stream.index != stream.index:
            continue
        visit(packet)
        count += packet.size > 0 or packet.dts is not None
        if is_shown(packet, codec):
            columns["pts"].append(stamp(packet.pts))
            columns["dts"].append(stamp(packet.dts))
            columns["duration"].append(min(packet.duration or 0, _LATEST))
            columns["position"].append(-1 if packet.pos is None else packet.pos)
            columns["size"].append(packet.size)
            key.append(packet.is_keyframe)
    table = PacketTable(
        **{name: np.frombuffer(column, np.int64).copy() for name, column in columns.items()},
        key=np.frombuffer(key, np.int8) != 0,
        tick=float(stream.time_base),
    )
    form = container.format.name
    stated = container.duration if form in _STATED_LENGTH else None
    start = (container.start_time or 0) / av.time_base
    with contextlib.suppress(OSError), source.file() as file:
        torn |= _is_torn(file, form)
    stated_end = None if not stated else start + stated / av.time_base
    return Packets(table, end, stated_end, count, stream.frames if form in _STATED_COUNT else 0, torn)


def _is_torn(file: BinaryIO, form: str) -> bool:
    """Whether a file has fewer bytes than its structure says."""
    length = file.seek(0, io.SEEK_END)
    file.seek(0)
    if form == "mpegts":  # packets of 188 bytes, or of 192 or 204 with what some devices add
        return all(length % size for size in (188, 192, 204))
    if form == "asf":
        head = file.read(_ASF_HEAD)
        place = head.find(_ASF_PROPERTIES)
        return place >= 0 and length < int.from_bytes(head[place + 40 : place + 48], "little")
    if form.startswith("mov,"):
        place = 0
        while place + 8 <= length:
            file.seek(place)
            box = file.read(16)
            size = int.from_bytes(box[:4], "big")
            size = int.from_bytes(box[8:], "big") if size == 1 else size or length - place
            if size < 8:
                return False
            place += size
        return place > length
    return False


def stamp(value: int | None) -> int:
    """A packet's time stamp for a table, in ticks."""
    return NO_STAMP if value is None else max(-_LATEST, min(value, _LATEST))


def _is_picture(stream: Any) -> bool:
    flags = stream.disposition
    kinds = type(flags)
    return bool(flags & (kinds.attached_pic | kinds.timed_thumbnails | kinds.still_image))


def import_av(field: str) -> Any:
    """PyAV. Raises UserError if it is not installed."""
    try:
        import av
    except ImportError as error:
        raise UserError(f"{field} is a video, which needs PyAV: pip install 'keye-jax[video]'") from error
    return av
