"""Clips whose pixels show the number of the frame, and a processor for the tiny model."""

import dataclasses
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from keye_jax.config import KeyeConfig
from keye_jax.errors import UserError
from keye_jax.processor import Processor
from keye_jax.testing import write_processor_files

ROOT = Path(__file__).parents[3]
BITS = 16


@pytest.fixture(scope="session")
def config():
    return KeyeConfig.from_file(ROOT / "configs/model/tiny.json")


@pytest.fixture(scope="session")
def checkpoint(config, tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    write_processor_files(directory, config)
    return directory


@pytest.fixture(scope="session")
def processor(checkpoint, config):
    return Processor.from_checkpoint(checkpoint, config)


@dataclasses.dataclass
class Clips:
    """A frame is BITS columns, black or white: the number of the frame in binary, highest bit first."""

    height: int = 48
    width: int = 8 * BITS

    def picture(self, number: int) -> np.ndarray:
        bits = number >> np.arange(BITS)[::-1] & 1
        columns = np.repeat(bits * 255, self.width // BITS).astype(np.uint8)
        return np.broadcast_to(columns[None, :, None], (self.height, self.width, 3)).copy()

    @staticmethod
    def number(pixels: np.ndarray) -> int:
        """The number that a frame [H, W, 3] shows."""
        middle = pixels[pixels.shape[0] // 2, :, 0].reshape(BITS, -1).mean(1) > 127
        return int((middle << np.arange(BITS)[::-1]).sum())

    def write(
        self,
        path,
        frames=40,
        *,
        first=0,
        codec="libx264",
        rate=10,
        options=None,
        milliseconds=None,
        rotation=None,
        audio=False,
        ratio=None,
        form=None,
        muxer=None,
    ):
        """Writes a clip of the frames from number `first` on.

        Args:
          milliseconds: the times of the frames in a clip with a variable rate.
          ratio: of a pixel's width to its height.
          form, muxer: the container's name, and its options.
        """
        with av.open(str(path), "w", format=form, options=muxer or {}) as container:
            stream = container.add_stream(codec, rate=rate)
            assert isinstance(stream, av.VideoStream)
            stream.width, stream.height, stream.pix_fmt = self.width, self.height, "yuv420p"
            stream.options = options or {"preset": "veryfast"}
            if rotation is not None:
                stream.set_display_rotation(rotation)
            if ratio is not None:
                stream.codec_context.sample_aspect_ratio = ratio
            if milliseconds is not None:
                stream.codec_context.time_base = Fraction(1, 1000)
            sound = container.add_stream("aac", rate=16000) if audio else None
            for index in range(frames):
                frame = av.VideoFrame.from_ndarray(self.picture(first + index), format="rgb24")
                if milliseconds is not None:
                    frame.pts, frame.time_base = int(milliseconds[index]), Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
            if sound is not None:
                write_sound(container, sound)
        return path

    def write_damaged(self, path, start, stop=float("inf")):
        """Writes a clip with a keyframe a second; packets from `start` to `stop`, in seconds, hold zeros."""
        self.write(path, options={"preset": "ultrafast", "g": "10", "keyint_min": "10", "sc_threshold": "0"})
        data = bytearray(path.read_bytes())
        with av.open(str(path)) as container:
            for packet in container.demux(video=0):
                if not packet.size:
                    continue
                assert packet.pts is not None and packet.time_base is not None and packet.pos is not None
                if start <= packet.pts * packet.time_base < stop:
                    data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
        path.write_bytes(data)
        return path


def write_sound(container, stream, blocks=20):
    for index in range(blocks):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16000, index * 1024, Fraction(1, 16000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


@pytest.fixture(scope="session")
def clips():
    return Clips()


@pytest.fixture(scope="session")
def clip(clips, tmp_path_factory):
    """A clip of 40 frames at 10 frames a second."""
    return clips.write(tmp_path_factory.mktemp("clips") / "clip.mp4")


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "sound.mp4"
    with av.open(str(path), "w") as container:
        write_sound(container, container.add_stream("aac", rate=16000))
    return path


def refused(call, message):
    """Checks that a call is refused in one short line."""
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
